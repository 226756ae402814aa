"""Boxes of a data set in the COCO layout, read and checked."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Split

# a box may stick out by this many pixels; files round sizes and boxes separately
ROUNDING = 1.0
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Annotations:
    """Boxes of one image.

    Attributes:
        boxes: (N, 4) float32 corners x0, y0, x1, y1 in pixels, inside the image.
        labels: (N,) int64 numbers of classes, from 0.
        crowds: (N,) bool, boxes around many things of a class at once.
        areas: (N,) float32, of the things themselves where the file says it, in pixels.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowds: np.ndarray
    areas: np.ndarray


@dataclass(frozen=True)
class CocoSet:
    """Images of one split with their boxes.

    Attributes:
        paths: image files.
        image_ids: their ids in the file.
        sizes: (N, 2) int64 heights and widths in pixels, as the file says.
        annotations: boxes of each image.
        classes: names, by number.
        category_ids: ids in the file, by number.
        num_degenerate: boxes without an area, left out.
    """

    paths: Sequence[Path]
    image_ids: Sequence[int]
    sizes: np.ndarray
    annotations: Sequence[Annotations]
    classes: Sequence[str]
    category_ids: Sequence[int]
    num_degenerate: int

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def digest(self) -> str:
        """Hash of names, classes, sizes and boxes; not of pixels."""
        state = hashlib.blake2b(digest_size=16)
        state.update(json.dumps([list(self.classes), [path.name for path in self.paths]]).encode())
        state.update(np.ascontiguousarray(self.sizes, dtype="<i8").tobytes())
        for annotation in self.annotations:
            state.update(np.ascontiguousarray(annotation.boxes, dtype="<f4").tobytes())
            state.update(np.ascontiguousarray(annotation.labels, dtype="<i8").tobytes())
        return state.hexdigest()


def coco_files(data: str | Path) -> dict[Split, tuple[Path, Path]]:
    """Annotation file and image folder of each split: `annotations/instances_train2017.json` and `train2017/`.

    What follows `instances_` names the image folder, which may also lie in `images/`; it begins with the split's name.

    Raises:
        FileNotFoundError: no such folder, no annotation file for training, or no image folder.
        ValueError: two annotation files for a split.
    """
    root = Path(data).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder; give one with annotations/instances_*.json and image folders")
    found: dict[Split, tuple[Path, Path]] = {}
    for split in SPLITS:
        files = sorted((root / "annotations").glob(f"instances_{split}*.json"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{root / 'annotations'} has several files for {split} ({names}); leave one")
        if not files:
            continue
        name = files[0].stem.removeprefix("instances_")
        places = [root / name, root / "images" / name]
        folder = next((place for place in places if place.is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{files[0]} has no image folder {places[0]}; put the images there")
        found[split] = (files[0], folder)
    if "train" not in found:
        raise FileNotFoundError(f"{root / 'annotations'} has no instances_train*.json; the COCO layout has one")
    return found


def read_coco(file: Path, folder: Path) -> CocoSet:
    """Read and check an annotation file.

    Raises:
        ValueError: no such JSON; no images or categories; two images or categories with one id; a box of an unknown
            image or category, without four finite numbers, or outside of its image by more than rounding.
        FileNotFoundError: an image without a file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON file: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file} has no list {key!r}; the COCO layout has images, annotations and categories")
    for key in ("images", "categories"):
        if not content[key]:
            raise ValueError(f"{file} has no {key}; there is nothing to read")
        ids = [record["id"] for record in content[key]]
        if len(set(ids)) < len(ids):
            raise ValueError(f"{file} has two {key} with one id; give each its own")
    categories = sorted(content["categories"], key=lambda record: record["id"])
    numbers = {record["id"]: number for number, record in enumerate(categories)}
    images = sorted(content["images"], key=lambda record: record["id"])
    boxes: dict[int, list[tuple[list[float], int, bool, float]]] = {record["id"]: [] for record in images}
    sizes = {record["id"]: (int(record["height"]), int(record["width"])) for record in images}
    for record in images:
        if not (folder / record["file_name"]).is_file():
            raise FileNotFoundError(f"{file} names the image {record['file_name']}, which is not in {folder}")
    degenerate = 0
    for record in content["annotations"]:
        corners = _corners(record, file, numbers, sizes)
        if corners is None:
            degenerate += 1
            continue
        area = float(record.get("area", (corners[2] - corners[0]) * (corners[3] - corners[1])))
        boxes[record["image_id"]].append(
            (corners, numbers[record["category_id"]], bool(record.get("iscrowd", 0)), area)
        )
    return CocoSet(
        paths=[folder / record["file_name"] for record in images],
        image_ids=[int(record["id"]) for record in images],
        sizes=np.array([sizes[record["id"]] for record in images], dtype=np.int64),
        annotations=[_arrays(boxes[record["id"]]) for record in images],
        classes=[str(record["name"]) for record in categories],
        category_ids=[int(record["id"]) for record in categories],
        num_degenerate=degenerate,
    )


def _corners(
    record: dict[str, Any], file: Path, numbers: dict[int, int], sizes: dict[int, tuple[int, int]]
) -> list[float] | None:
    """Corners of a box cut off at the image's edges; None for one without an area."""
    name = f"{file}: annotation {record.get('id')}"
    image, category, box = record.get("image_id"), record.get("category_id"), record.get("bbox")
    if image not in sizes:
        raise ValueError(f"{name} is of image {image}, which the file does not have")
    if category not in numbers:
        known = ", ".join(str(number) for number in list(numbers)[:5])
        raise ValueError(f"{name} has category {category}, which the file does not have; there are {known}, ...")
    if not isinstance(box, list) or len(box) != 4 or not np.isfinite(box).all():
        raise ValueError(f"{name} has the box {box}; a box is four numbers: left, top, width, height in pixels")
    height, width = sizes[image]
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    out = max(-left, -top, right - width, bottom - height)
    if out > ROUNDING:
        raise ValueError(
            f"{name} has a box that is {out:.1f} pixels outside of its image of {width} x {height}; boxes are left, "
            f"top, width, height in pixels"
        )
    corners = [max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)]
    return corners if corners[2] > corners[0] and corners[3] > corners[1] else None


def _arrays(found: list[tuple[list[float], int, bool, float]]) -> Annotations:
    return Annotations(
        boxes=np.array([box for box, _, _, _ in found], dtype=np.float32).reshape(-1, 4),
        labels=np.array([label for _, label, _, _ in found], dtype=np.int64),
        crowds=np.array([crowd for _, _, crowd, _ in found], dtype=bool),
        areas=np.array([area for _, _, _, area in found], dtype=np.float32),
    )
