"""Packaged pictures into folders that `open_images` reads: MNIST digits, emoji, Tux Paint's stamps."""

import gzip
import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

_STAMPS = "usr/share/tuxpaint/stamps/"
_STAMPS_COPYRIGHT = "usr/share/doc/tuxpaint-stamps-default/copyright"
_EMOJI = "package/"
_EMOJI_KEPT = ("emoji.json", "LICENSE", "img/google/64/")


def write_digits(files: list[Path], folder: Path) -> None:
    """Write `class/number.png`, greyscale, from rows of 784 pixels (0 to 255) and the class; number is the row's.

    Raises:
        ValueError: rows of another form.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError("MNIST's digits are written as PNG, which needs: pip install 'tenfold[images]'") from error
    try:
        with gzip.open(files[0], "rt", encoding="ascii") as source:
            rows = np.loadtxt(source, delimiter=",", dtype=np.uint8, ndmin=2)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{files[0]} does not hold rows of numbers from 0 to 255: {error}") from error
    if rows.shape[1] != 28 * 28 + 1 or rows[:, -1].max() > 9:
        raise ValueError(f"{files[0]} does not hold rows of 784 pixels and a digit: {rows.shape[1]} columns")
    for label in range(10):
        (folder / str(label)).mkdir()
    for number, row in enumerate(rows):
        Image.fromarray(row[:-1].reshape(28, 28)).save(folder / str(row[-1]) / f"{number:04d}.png")


def write_emoji(files: list[Path], folder: Path) -> None:
    """Write `emoji.json`, the licence and the pictures of 64 x 64 pixels, where they lie in the npm package.

    Raises:
        ValueError: the archive is damaged or of another package.
    """
    try:
        with tarfile.open(files[0], "r:gz") as archive:
            for name, content in _members(archive):
                if name.startswith(_EMOJI) and name.removeprefix(_EMOJI).startswith(_EMOJI_KEPT):
                    _write(folder, name.removeprefix(_EMOJI), content.read())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{files[0]} is no whole npm package: {error}") from error
    if not (folder / "emoji.json").is_file():
        raise ValueError(f"{files[0]} holds no emoji.json: another package")


def write_stamps(files: list[Path], folder: Path) -> None:
    """Write the PNG stamps in their folders, `captions.json` (path to English caption) and the copyright.

    The Debian package is unpacked by dpkg-deb. Sounds, vector drawings and translations are left out.

    Raises:
        OSError: dpkg-deb is missing.
        ValueError: the package is damaged or another one.
    """
    command = ["dpkg-deb", "--fsys-tarfile", str(files[0])]
    captions: dict[str, str] = {}
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise OSError(f"{files[0].name} needs dpkg-deb to be unpacked; install the package dpkg") from error
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for name, content in _members(archive):
                    if name == _STAMPS_COPYRIGHT:
                        _write(folder, "copyright", content.read())
                    elif name.startswith(_STAMPS) and name.endswith(".png"):
                        _write(folder, name.removeprefix(_STAMPS), content.read())
                    elif name.startswith(_STAMPS) and name.endswith(".txt"):
                        # the first line is English; translations follow
                        caption = content.read().decode("utf-8", errors="replace").split("\n", 1)[0].strip()
                        captions[name.removeprefix(_STAMPS).removesuffix(".txt") + ".png"] = caption
        except tarfile.TarError as error:
            process.kill()
            reason = process.stderr.read().decode(errors="replace").strip().splitlines()
            raise ValueError(f"{files[0]} is no whole Debian package: {(reason or [str(error)])[-1]}") from error
    found = {name: text for name, text in sorted(captions.items()) if text and (folder / name).is_file()}
    if process.returncode != 0 or not found:
        raise ValueError(f"{files[0]} holds no stamps with captions: a damaged or another package")
    (folder / "captions.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, BinaryIO]]:
    """Names, without `./` in front, and contents of an archive's files, in their order."""
    for member in archive:
        if member.isfile():
            content = archive.extractfile(member)
            assert content is not None
            yield member.name.removeprefix("./"), content  # type: ignore[misc]


def _write(folder: Path, name: str, content: bytes) -> None:
    path = folder / name
    if ".." in path.parts:
        raise ValueError(f"{name} leads out of the archive")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
