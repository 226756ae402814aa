"""Labelled images from folders, WebDataset tar files, Parquet files and packages, as lists with random access."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Split

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLIT_NAMES: dict[str, Split] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
PACKAGED = "packaged:"


@dataclass(frozen=True)
class ImageSet:
    """Images with one class each.

    Attributes:
        keys: a name for each image, the same in every run.
        labels: (N,) int64 numbers of classes.
        classes: their names.
        read: gives the image of a number as a PIL image.
    """

    keys: Sequence[str]
    labels: np.ndarray
    classes: Sequence[str]
    read: Callable[[int], Any]

    def digest(self) -> str:
        """Hash of names, classes and their order; not of pixels, which may be many gigabytes."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([list(self.classes), list(self.keys)]).encode())
        state.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        return state.hexdigest()


def open_images(data: str, *, image_field: str = "image", label_field: str = "label") -> dict[Split | None, ImageSet]:
    """Images of a source, by split, or under None where the source names no splits.

    Splits are named by folders (`train/class/x.png`) or by the beginning of file names (`train-0000.tar`,
    `validation-00000-of-00001.parquet`); all splits have the same classes then.

    Args:
        data: a folder of class folders; a `.tar` or `.parquet` file or a folder of them; the folder of the npm package
            emoji-datasource-google (its categories are the classes); `packaged:digits`.
        image_field: column of a Parquet file with encoded images.
        label_field: column with class numbers or names.

    Raises:
        FileNotFoundError: no such path.
        ValueError: nothing to read, or splits that do not fit together.
    """
    if data.startswith(PACKAGED):
        return {None: _packaged(data.removeprefix(PACKAGED))}
    path = Path(data).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a folder of class folders, .tar or .parquet files, or packaged:digits"
        )
    if (path / "emoji.json").is_file():
        return {None: _emoji(path)}
    sets: dict[Split | None, ImageSet]
    if files := _files(path, ".tar"):
        sets = {split: _webdataset(group) for split, group in _by_split(files).items()}
    elif files := _files(path, ".parquet"):
        sets = {
            split: _parquet(group, image_field=image_field, label_field=label_field)
            for split, group in _by_split(files).items()
        }
    elif path.is_dir():
        folders: dict[Split | None, Path] = {
            SPLIT_NAMES[child.name]: child for child in sorted(path.iterdir()) if child.name in SPLIT_NAMES
        }
        sets = {split: _folder(folder) for split, folder in (folders or {None: path}).items()}
    else:
        raise ValueError(f"{path} is no folder and no .tar or .parquet file; give one of these")
    classes = {tuple(images.classes) for images in sets.values()}
    if len(classes) > 1:
        sizes = ", ".join(f"{split} {len(images.classes)}" for split, images in sets.items())
        raise ValueError(f"the splits of {data} do not have the same classes ({sizes}); give each split all classes")
    return sets


def _files(path: Path, ending: str) -> list[Path]:
    return sorted(path.glob(f"*{ending}")) if path.is_dir() else [path] if path.name.endswith(ending) else []


def _by_split(files: Iterable[Path]) -> dict[Split | None, list[Path]]:
    groups: dict[Split | None, list[Path]] = {}
    for file in files:
        found = re.match(r"[a-z]+", file.name)
        groups.setdefault(SPLIT_NAMES.get(found[0]) if found else None, []).append(file)
    if None in groups and len(groups) > 1:
        raise ValueError(
            f"{groups[None][0]} begins with no split's name while others do; rename it, or move it elsewhere"
        )
    return groups


def _decoded(content: bytes, name: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name} is no readable image: {error}") from error
    return image


def _named(names: Sequence[str], of: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Numbers of names, and the names in order: numbers by value, words by letters."""
    classes = sorted(set(of), key=lambda name: (0, int(name), "") if name.isdigit() else (1, 0, name))
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], dtype=np.int64), classes


@dataclass(frozen=True)
class _FileReader:
    paths: Sequence[Path]

    def __call__(self, index: int) -> Any:
        return _decoded(self.paths[index].read_bytes(), str(self.paths[index]))


def _folder(root: Path) -> ImageSet:
    classes = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    paths = [
        (path, number)
        for number, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in EXTENSIONS and path.is_file()
    ]
    if not paths:
        raise ValueError(f"{root} has no class folders with images ({', '.join(EXTENSIONS)}); expected class/name.png")
    keys = [path.relative_to(root).as_posix() for path, _ in paths]
    return ImageSet(keys, np.array([n for _, n in paths], dtype=np.int64), classes, _FileReader([p for p, _ in paths]))


@dataclass(frozen=True)
class _TarReader:
    """Reads a member where the index says it is, without a pass over the archive."""

    members: Sequence[tuple[Path, int, int, str]]

    def __call__(self, index: int) -> Any:
        path, offset, size, name = self.members[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return _decoded(file.read(size), f"{path}:{name}")


def _webdataset(files: Sequence[Path]) -> ImageSet:
    """Samples of WebDataset archives: members `key.png` (or another image) and `key.cls` or `key.json` (`label`)."""
    images: dict[str, tuple[Path, int, int, str]] = {}
    labels: dict[str, str] = {}
    for file in files:
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    # the key of a sample ends at the first dot of its last part
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    key = "/".join(part for part in (file.name, folder, stem) if part)
                    if f".{extension.lower()}" in EXTENSIONS:
                        images[key] = (file, member.offset_data, member.size, member.name)
                    elif extension in ("cls", "json") and member.isfile():
                        content = archive.extractfile(member)
                        assert content is not None
                        text = content.read().decode()
                        if extension == "cls":
                            labels[key] = text.strip()
                        elif "label" in (record := json.loads(text)):
                            labels.setdefault(key, str(record["label"]))
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no uncompressed tar file: {error}; unpack or repack it") from error
    missing = sorted(images.keys() - labels.keys())
    if missing or not images:
        example = f"{missing[0]} has no label" if missing else f"{files[0]} holds no image"
        raise ValueError(f"{example}; a sample is key.jpg with key.cls, or with key.json that has `label`")
    keys = sorted(images)
    numbers, classes = _named([labels[key] for key in keys], [labels[key] for key in keys])
    return ImageSet(keys, numbers, classes, _TarReader([images[key] for key in keys]))


@dataclass(frozen=True)
class _ColumnReader:
    rows: Any
    field: str

    def __call__(self, index: int) -> Any:
        value = self.rows[index][self.field]
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ValueError(f"row {index} of the Parquet files has no image bytes in {self.field!r}")
        return _decoded(content, f"row {index}")


def _parquet(files: Sequence[Path], *, image_field: str, label_field: str) -> ImageSet:
    """Rows with an encoded image (bytes, or a record with `bytes`) and a class; memory-mapped by `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("images in Parquet files need: pip install 'tenfold[images]'") from error
    rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
    for field in (image_field, label_field):
        if field not in rows.column_names:
            raise ValueError(f"{files[0]} has no column {field!r}; there are {', '.join(rows.column_names)}")
    if isinstance(rows.features[image_field], datasets.Image):
        rows = rows.cast_column(image_field, datasets.Image(decode=False))
    names = getattr(rows.features[label_field], "names", None)
    values = list(rows[label_field])
    if names is not None:
        numbers, classes = np.array(values, dtype=np.int64), list(names)
    else:
        numbers, classes = _named([str(value) for value in values], [str(value) for value in values])
    keys = [f"{number}" for number in range(len(values))]
    return ImageSet(keys, numbers, classes, _ColumnReader(rows, image_field))


def _emoji(root: Path) -> ImageSet:
    """Emoji of 64 x 64 pixels by category; parts of others (skin tones, hair) are none."""
    records = json.loads((root / "emoji.json").read_text(encoding="utf-8"))
    folder = root / "img" / "google" / "64"
    kept = [
        (record["category"], record["image"])
        for record in records
        if record.get("has_img_google", True) and record["category"] != "Component"
    ]
    kept = [(category, name) for category, name in kept if (folder / name).is_file()]
    if not kept:
        raise ValueError(
            f"{folder} holds none of the images that {root / 'emoji.json'} names; unpack the package whole"
        )
    categories = [category for category, _ in kept]
    numbers, classes = _named(categories, categories)
    return ImageSet([name for _, name in kept], numbers, classes, _FileReader([folder / name for _, name in kept]))


@dataclass(frozen=True)
class _ArrayReader:
    pixels: np.ndarray

    def __call__(self, index: int) -> Any:
        from PIL import Image

        return Image.fromarray(self.pixels[index])


def _packaged(name: str) -> ImageSet:
    if name != "digits":
        raise ValueError(f"{PACKAGED}{name} is not known; there is packaged:digits; assets are asset:mnist-5k, ...")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("packaged:digits needs: pip install 'tenfold[images]'") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    keys = [str(number) for number in range(len(pixels))]
    return ImageSet(keys, digits.target.astype(np.int64), [str(n) for n in range(10)], _ArrayReader(pixels))


def select(images: ImageSet, indices: np.ndarray) -> ImageSet:
    """The images with these numbers."""
    keys = [images.keys[index] for index in indices]
    return ImageSet(keys, images.labels[indices], images.classes, _Selected(images.read, indices))


@dataclass(frozen=True)
class _Selected:
    read: Callable[[int], Any]
    indices: np.ndarray

    def __call__(self, index: int) -> Any:
        return self.read(int(self.indices[index]))
