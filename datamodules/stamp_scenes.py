"""A detection data set in the COCO layout: stamps with transparency pasted onto crops of real photographs."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from .assets import cache_dir, resolve
from .coco import SPLITS
from .detection import CocoDetectionDataModule
from .documents import Split, split_of
from .image_sources import EXTENSIONS, ImageSet, open_images

# a pixel of a stamp belongs to the thing from half opacity on
OPAQUE = 128
# each split sees its own strip of every photograph: shares of the width
STRIPS: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """What the scenes look like.

    Attributes:
        size: side of a scene in pixels.
        train: number of scenes.
        val: likewise.
        test: likewise.
        stamps: least and greatest number of stamps in a scene.
        share: smallest and largest side of a stamp, its longer one, over the side of the scene.
        max_occlusion: largest share of a stamp's pixels that others may cover, 0 to 1.
        classes: names of the stamps' classes to use; all by default.
        seed: of everything that is drawn.
    """

    size: int = 96
    train: int = 2000
    val: int = 200
    test: int = 400
    stamps: tuple[int, int] = (1, 3)
    share: tuple[float, float] = (0.25, 0.5)
    max_occlusion: float = 0.3
    classes: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.size < 16 or min(self.train, self.val, self.test) < 1:
            raise ValueError(
                f"size {self.size} must be at least 16, and train {self.train}, val {self.val}, test {self.test} at "
                f"least 1"
            )
        if not 1 <= self.stamps[0] <= self.stamps[1]:
            raise ValueError(f"stamps {tuple(self.stamps)} is no range of numbers from 1 up")
        if not 0 < self.share[0] <= self.share[1] <= 1:
            raise ValueError(f"share {tuple(self.share)} is not a range of shares from above 0 up to 1")
        if not 0 <= self.max_occlusion < 1:
            raise ValueError(f"max_occlusion {self.max_occlusion} is not from 0 up to 1")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must not be negative")


def build_stamp_scenes(
    stamps: str, settings: SceneSettings, *, photographs: str | None = None, folder: Path | None = None
) -> Path:
    """Write the scenes, unless they are there, and give their folder.

    Splits share neither stamps (a hash of the stamp's name decides) nor regions of photographs. Boxes are the extent of
    a stamp's opaque pixels, the covered ones too; `area` counts all of them.

    Args:
        stamps: pictures with transparency in class folders, or another source of `open_images`.
        settings: number and look of the scenes.
        photographs: a folder of photographs; scikit-learn's two (640 x 427) by default.
        folder: where to write; a folder in the cache named after settings, names of stamps and photographs by default.

    Raises:
        ValueError: unknown classes, a split without stamps of a class, photographs that are too small, or a folder
            with other scenes.
        FileNotFoundError: no such stamps or photographs.
    """
    pictures = _photographs(photographs, settings.size)
    groups = _stamps_by_split(stamps, settings)
    state = hashlib.blake2b(json.dumps([FORMAT, asdict(settings)], sort_keys=True).encode(), digest_size=8)
    for split in SPLITS:
        state.update(json.dumps([[name, keys] for name, (_, keys) in groups[split].items()]).encode())
    for name, pixels in pictures:
        state.update(name.encode())
        state.update(np.ascontiguousarray(pixels).tobytes())
    digest = state.hexdigest()
    target = folder or cache_dir() / "stamp-scenes" / digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if (target / "scenes.json").is_file():
            found = json.loads((target / "scenes.json").read_text(encoding="utf-8"))["digest"]
            if found != digest:
                raise ValueError(f"{target} holds scenes of other settings, stamps or photographs; give another folder")
            return target
        if target.exists() and any(target.iterdir()):
            raise ValueError(f"{target} is not empty and holds no scenes; give another folder")
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            for number, split in enumerate(SPLITS):
                _write_split(partial, split, number, groups[split], pictures, settings)
            record = {"digest": digest, "settings": asdict(settings), "stamps": stamps, "photographs": photographs}
            (partial / "scenes.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            partial.chmod(0o755)
            if target.exists():
                target.rmdir()
            os.replace(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


Group = dict[str, tuple[list[int], list[str]]]


def _stamps_by_split(stamps: str, settings: SceneSettings) -> dict[Split, Any]:
    """For each split, by class: numbers of stamps and their names; and the reader under ''."""
    sets = open_images(stamps)
    if None not in sets:
        raise ValueError(f"{stamps} has splits of its own; give a folder of class folders")
    images: ImageSet = sets[None]
    chosen = list(images.classes) if settings.classes is None else list(settings.classes)
    for name in chosen:
        if name not in images.classes:
            raise ValueError(f"{stamps} has no class {name!r}; there are {', '.join(images.classes)}")
    groups: dict[Split, Any] = {split: _Stamps(images) for split in SPLITS}
    for split in SPLITS:
        for name in chosen:
            groups[split][name] = ([], [])
    for index, key in enumerate(images.keys):
        name = images.classes[int(images.labels[index])]
        if name in chosen:
            split = split_of(f"{name}/{key}", val_fraction=0.15, test_fraction=0.15)
            groups[split][name][0].append(index)
            groups[split][name][1].append(key)
    for split in SPLITS:
        for name in chosen:
            if not groups[split][name][0]:
                raise ValueError(f"class {name!r} of {stamps} has no stamp for {split}; add stamps, or leave it out")
    return groups


class _Stamps(Group):
    """Stamps of a split by class, and what reads them."""

    def __init__(self, images: ImageSet) -> None:
        super().__init__()
        self.images = images

    def trimmed(self, index: int) -> Any:
        """A stamp as an RGBA image without its transparent border; None where nothing is opaque."""
        image = self.images.read(index).convert("RGBA")
        box = image.getchannel("A").point(lambda value: 255 if value >= OPAQUE else 0).getbbox()
        return None if box is None else image.crop(box)


def _photographs(folder: str | None, size: int) -> list[tuple[str, np.ndarray]]:
    """Names and (H, W, 3) uint8 pixels."""
    from PIL import Image

    if folder is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError as error:
            raise ValueError("scenes on scikit-learn's photographs need: pip install 'tenfold[detection]'") from error
        found = [(name, np.asarray(load_sample_image(name))) for name in ("china.jpg", "flower.jpg")]
    else:
        if not Path(folder).expanduser().is_dir():
            raise FileNotFoundError(f"{folder} is no folder of photographs")
        paths = sorted(p for p in Path(folder).expanduser().rglob("*") if p.suffix.lower() in EXTENSIONS)
        found = [(path.name, np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    if not found:
        raise ValueError(f"{folder} has no photographs ({', '.join(EXTENSIONS)})")
    for name, pixels in found:
        narrowest = min(end - start for start, end in (_columns(pixels, strip) for strip in STRIPS.values()))
        if min(narrowest, pixels.shape[0]) < size:
            raise ValueError(
                f"{name} has {pixels.shape[1]} x {pixels.shape[0]} pixels; a fifth of its width and its height must "
                f"be at least the scene's {size}"
            )
    return found


def _columns(pixels: np.ndarray, strip: tuple[float, float]) -> tuple[int, int]:
    """First column of a strip, and the first one behind it."""
    return round(pixels.shape[1] * strip[0]), round(pixels.shape[1] * strip[1])


def _write_split(
    root: Path,
    split: Split,
    number: int,
    stamps: _Stamps,
    photographs: Sequence[tuple[str, np.ndarray]],
    settings: SceneSettings,
) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    (root / "annotations").mkdir(exist_ok=True)
    for index in range(getattr(settings, split)):
        rng = np.random.default_rng([settings.seed, number, index])
        scene, things = draw_scene(rng, stamps, photographs, settings, STRIPS[split])
        name = f"{index:06d}.png"
        scene.save(root / split / name)
        images.append({"id": index + 1, "file_name": name, "height": settings.size, "width": settings.size})
        annotations += [
            {"id": len(annotations) + k, "image_id": index + 1, "iscrowd": 0, **thing}
            for k, thing in enumerate(things, start=1)
        ]
    content = {
        "info": {"description": f"stamps on photographs, {split}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(stamps, start=1)],
    }
    file = root / "annotations" / f"instances_{split}.json"
    file.write_text(json.dumps(content), encoding="utf-8")


def draw_scene(
    rng: np.random.Generator,
    stamps: Any,
    photographs: Sequence[tuple[str, np.ndarray]],
    settings: SceneSettings,
    strip: tuple[float, float],
) -> tuple[Any, list[dict[str, Any]]]:
    """A scene as an RGB image, and for each stamp `category_id`, `bbox` (left, top, width, height) and `area`.

    Args:
        rng: draws everything.
        stamps: numbers and names by class, with `trimmed`.
        photographs: names and pixels.
        settings: look of the scenes.
        strip: part of the photographs to crop from, in shares of their width.
    """
    from PIL import Image

    size, classes = settings.size, list(stamps)
    scene = _background(rng, photographs, size, strip)
    visible: list[np.ndarray] = []
    totals: list[int] = []
    things: list[dict[str, Any]] = []
    for _ in range(int(rng.integers(settings.stamps[0], settings.stamps[1] + 1))):
        category = int(rng.integers(len(classes)))
        numbers = stamps[classes[category]][0]
        stamp = stamps.trimmed(numbers[int(rng.integers(len(numbers)))])
        if stamp is None:
            continue
        side = size * rng.uniform(*settings.share)
        factor = side / max(stamp.size)
        shape = tuple(max(1, round(length * factor)) for length in stamp.size)
        stamp = stamp.resize(shape, Image.Resampling.BILINEAR)
        opaque = np.asarray(stamp.getchannel("A")) >= OPAQUE
        if not opaque.any():
            continue
        for _ in range(20):
            left, top = (int(rng.integers(size - length + 1)) for length in shape)
            mask = np.zeros((size, size), dtype=bool)
            mask[top : top + shape[1], left : left + shape[0]] = opaque
            left_over = [int((earlier & ~mask).sum()) for earlier in visible]
            limit = 1 - settings.max_occlusion
            if all(rest >= limit * total for rest, total in zip(left_over, totals, strict=True)):
                break
        else:
            continue
        scene.paste(stamp, (left, top), stamp)
        visible = [*(earlier & ~mask for earlier in visible), mask]
        totals.append(int(mask.sum()))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
        things.append({"category_id": category + 1, "bbox": [float(value) for value in box], "area": float(mask.sum())})
    return scene, things


def _background(
    rng: np.random.Generator, photographs: Sequence[tuple[str, np.ndarray]], size: int, strip: tuple[float, float]
) -> Any:
    from PIL import Image

    _, pixels = photographs[int(rng.integers(len(photographs)))]
    start, end = _columns(pixels, strip)
    part = pixels[:, start:end]
    side = int(rng.integers(size, min(part.shape[:2]) + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in part.shape[:2])
    crop = Image.fromarray(part[top : top + side, left : left + side])
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return crop.resize((size, size), Image.Resampling.BICUBIC)


class StampScenesDataModule(CocoDetectionDataModule):
    """`CocoDetectionDataModule` of scenes that are drawn when they are first needed, see `build_stamp_scenes`.

    Args:
        data: the stamps, see `build_stamp_scenes`; `asset:NAME` too.
        photographs: a folder of photographs; scikit-learn's two by default.
        folder: where to write the scenes; in the cache by default.
        classes: names of the stamps' classes to use; all by default.
        scene_size: side of a scene in pixels.
        scenes: number of scenes for training, validation and testing.
        stamps: least and greatest number of stamps in a scene.
        share: smallest and largest side of a stamp over the side of the scene.
        max_occlusion: largest share of a stamp that others may cover, 0 to 1.
        scene_seed: of the scenes.
        size: side that scenes are resized to in pixels; `scene_size` by default.
        **options: as for `CocoDetectionDataModule`.

    Raises:
        ValueError: see `SceneSettings`, `build_stamp_scenes` and `CocoDetectionDataModule`.
    """

    def __init__(
        self,
        data: str = "asset:emoji",
        *,
        photographs: str | None = None,
        folder: str | None = None,
        classes: Sequence[str] | None = None,
        scene_size: int = 96,
        scenes: tuple[int, int, int] = (2000, 200, 400),
        stamps: tuple[int, int] = (1, 3),
        share: tuple[float, float] = (0.25, 0.5),
        max_occlusion: float = 0.3,
        scene_seed: int = 0,
        size: int | list[int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data, size=scene_size if size is None else size, **options)
        self.settings = SceneSettings(
            size=scene_size,
            train=scenes[0],
            val=scenes[1],
            test=scenes[2],
            stamps=(stamps[0], stamps[1]),
            share=(share[0], share[1]),
            max_occlusion=max_occlusion,
            classes=None if classes is None else tuple(classes),
            seed=scene_seed,
        )
        self.photographs, self.target = photographs, folder

    def folder(self) -> str:
        """Where the scenes lie; drawn now if they are not there."""
        target = None if self.target is None else Path(self.target)
        return str(build_stamp_scenes(resolve(self.data), self.settings, photographs=self.photographs, folder=target))
