"""`CocoDetectionDataModule`: images with boxes to batches for transformers' detectors, resumable."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .assets import resolve
from .coco import CocoSet, coco_files, read_coco
from .documents import Split
from .image import EpochSampler
from .image_transforms import Normalise
from .packing import split_loader

Resize = Literal["shortest", "square"]


def resized(height: int, width: int, *, size: int, max_size: int | None, mode: Resize) -> tuple[int, int]:
    """Height and width after resizing.

    >>> resized(480, 640, size=240, max_size=None, mode="shortest")
    (240, 320)
    >>> resized(480, 640, size=240, max_size=300, mode="shortest")
    (225, 300)
    >>> resized(480, 640, size=240, max_size=None, mode="square")
    (240, 240)
    """
    if mode == "square":
        return size, size
    factor = size / min(height, width)
    if max_size is not None:
        factor = min(factor, max_size / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


class ImagesWithBoxes(Dataset[dict[str, Any]]):
    """Items of `CocoDetectionDataModule`: `pixel_values` (C, h, w), `labels` and `annotations`.

    An (epoch, number) is augmented, by draws that depend on these and the seed alone; a plain number is not, see
    `LabelledImages`.

    Args:
        images: what is read.
        indices: which images of these.
        sizes: sides to resize to in training; the last one counts in evaluation.
        max_size: of the longest side, or None.
        resize: `shortest` keeps the shape, `square` does not.
        flip: probability of a left-right flip.
        normalise: channels and moments.
        seed: of the draws.
    """

    def __init__(
        self,
        images: CocoSet,
        indices: np.ndarray,
        *,
        sizes: Sequence[int],
        max_size: int | None,
        resize: Resize,
        flip: float,
        normalise: Normalise,
        seed: int,
    ) -> None:
        self.images, self.indices, self.sizes, self.max_size = images, indices, tuple(sizes), max_size
        self.resize, self.flip, self.normalise, self.seed = resize, flip, normalise, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.indices)

    def __getitem__(self, place: int | tuple[int, int]) -> dict[str, Any]:
        """One image.

        Raises:
            ValueError: the file is no image, or has another size than the annotations say.
        """
        from PIL import Image, UnidentifiedImageError

        rng = None if isinstance(place, int) else np.random.default_rng([self.seed, *place])
        number = int(self.indices[place if isinstance(place, int) else place[1]])
        path, annotation = self.images.paths[number], self.images.annotations[number]
        height, width = (int(side) for side in self.images.sizes[number])
        try:
            image = self.normalise.mode(Image.open(path))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} is no readable image: {error}") from error
        if (image.height, image.width) != (height, width):
            raise ValueError(
                f"{path} has {image.width} x {image.height} pixels, its annotations say {width} x {height}; the boxes "
                f"would be elsewhere"
            )
        size = self.sizes[-1] if rng is None else self.sizes[int(rng.integers(len(self.sizes)))]
        shape = resized(height, width, size=size, max_size=self.max_size, mode=self.resize)
        if shape != (height, width):
            image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        corners = annotation.boxes / np.array([width, height, width, height], dtype=np.float32)
        if rng is not None and rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            corners = np.stack([1 - corners[:, 2], corners[:, 1], 1 - corners[:, 0], corners[:, 3]], axis=1)
        centres = np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)
        kept = ~annotation.crowds
        return {
            "pixel_values": self.normalise.tensor(image),
            "labels": {
                "class_labels": torch.from_numpy(annotation.labels[kept]),
                "boxes": torch.from_numpy(centres[kept]),
                "size": torch.tensor(shape),
                "orig_size": torch.tensor([height, width]),
                "image_id": torch.tensor(self.images.image_ids[number]),
            },
            "annotations": {
                "boxes": torch.from_numpy(annotation.boxes),
                "labels": torch.from_numpy(annotation.labels),
                "iscrowd": torch.from_numpy(annotation.crowds.astype(np.int64)),
                "area": torch.from_numpy(annotation.areas),
            },
        }


class PaddedBatch:
    """Makes a batch of images of different sizes, padded below and to the right.

    Args:
        size_divisor: height and width of a batch are multiples of it, in pixels.
    """

    def __init__(self, size_divisor: int) -> None:
        self.size_divisor = size_divisor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """See `CocoDetectionDataModule`."""
        images: list[Tensor] = [item["pixel_values"] for item in items]
        height, width = (
            -(-max(image.shape[axis] for image in images) // self.size_divisor) * self.size_divisor for axis in (1, 2)
        )
        pixels = images[0].new_zeros(len(images), images[0].shape[0], height, width)
        mask = torch.zeros(len(images), height, width, dtype=torch.long)
        for number, image in enumerate(images):
            pixels[number, :, : image.shape[1], : image.shape[2]] = image
            mask[number, : image.shape[1], : image.shape[2]] = 1
        return {
            "pixel_values": pixels,
            "pixel_mask": mask,
            "labels": [item["labels"] for item in items],
            "annotations": [item["annotations"] for item in items],
        }


class CocoDetectionDataModule(LightningDataModule):
    """Batches of images with boxes, as transformers' detectors take them.

    A batch has `pixel_values` (B, C, H, W), zeros where padded; `pixel_mask` (B, H, W), 1 at the image; `labels`, for
    each image a dict with `class_labels` (n,), `boxes` (n, 4) as centre, width and height in shares of the image
    without padding, `size` and `orig_size` (height and width in pixels, after and before resizing) and `image_id`; and
    `annotations`, for each image the boxes that it is scored with: corners in pixels of the image before resizing,
    `labels`, `iscrowd` and `area`. Crowds are in `annotations` only, boxes without an area in neither.

    Order, sizes and flips depend on seed, epoch and image alone, so that a checkpoint inside an epoch continues with
    the same next batch.

    Args:
        data: a folder with `annotations/instances_train*.json` and the image folder of the same name, and the like for
            `val` and `test`, see `coco_files`; `asset:NAME` too.
        size: side to resize to in pixels, of the shortest side or of both; a list is drawn from in training, and its
            last entry counts in evaluation.
        max_size: limit of the longest side in pixels; null for none.
        resize: `shortest` keeps the shape, `square` makes both sides `size`.
        size_divisor: batches are padded to multiples of this many pixels.
        batch_size: images per batch and process, B.
        eval_batch_size: the same for validation and test; `batch_size` by default.
        flip: probability of a left-right flip in training.
        keep_empty: train on images without boxes too.
        mean: of each channel, in shares of 255; ImageNet's by default.
        std: standard deviation of each channel, likewise.
        seed: of order, sizes and flips.
        num_workers: loader processes.

    Raises:
        ValueError: numbers out of range; annotations that are wrong, see `read_coco`; splits with other categories;
            nothing to train on.
        FileNotFoundError: a missing folder, annotation file or image.
    """

    def __init__(
        self,
        data: str,
        *,
        size: int | list[int] = 800,
        max_size: int | None = 1333,
        resize: Resize = "shortest",
        size_divisor: int = 32,
        batch_size: int = 2,
        eval_batch_size: int | None = None,
        flip: float = 0.5,
        keep_empty: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sizes = [size] if isinstance(size, int) else list(size)
        if not sizes or min(sizes) < 1 or batch_size < 1 or size_divisor < 1 or (eval_batch_size or 1) < 1:
            raise ValueError(
                f"size {size}, batch_size {batch_size}, eval_batch_size {eval_batch_size} and size_divisor "
                f"{size_divisor} must be at least 1"
            )
        if max_size is not None and resize == "shortest" and max_size < max(sizes):
            raise ValueError(
                f"max_size {max_size} is below the shortest side {max(sizes)}; raise it, or set it to null"
            )
        if resize not in ("shortest", "square"):
            raise ValueError(f"resize {resize!r} is not one of shortest, square")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip {flip} is not between 0 and 1")
        if seed < 0:
            raise ValueError(f"seed {seed} must not be negative")
        for name, moments in (("mean", mean), ("std", std)):
            if moments is not None and len(moments) != 3:
                raise ValueError(f"{name} has {len(moments)} values for 3 channels")
        self.data, self.batch_size, self.eval_batch_size = data, batch_size, eval_batch_size or batch_size
        self.sizes, self.max_size, self.resize, self.size_divisor = sizes, max_size, resize, size_divisor
        self.flip, self.keep_empty, self.seed, self.num_workers = flip, keep_empty, seed, num_workers
        self.normalise = Normalise(mean=None if mean is None else tuple(mean), std=None if std is None else tuple(std))
        self.classes: list[str] | None = None
        self._splits: dict[Split, CocoSet] = {}

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None before the data are set up."""
        return None if self.classes is None else len(self.classes)

    @property
    def image_size(self) -> int:
        """Side that tables of positions are made for, in pixels."""
        return self.sizes[-1]

    @property
    def category_ids(self) -> list[int]:
        """Ids of the classes in the annotation files, by number."""
        return list(self._splits["train"].category_ids)

    def folder(self) -> str:
        """Where the data lie."""
        return resolve(self.data)

    def prepare_data(self) -> None:
        """Fetch an asset where the data are one."""
        self.folder()

    def setup(self, stage: str) -> None:
        """Read and check the annotations."""
        if self._splits:
            return
        sets = {split: read_coco(*files) for split, files in coco_files(self.folder()).items()}
        train = sets["train"]
        for split, images in sets.items():
            if (list(images.category_ids), list(images.classes)) != (list(train.category_ids), list(train.classes)):
                raise ValueError(
                    f"{split} has other categories than train ({len(images.classes)} and {len(train.classes)}); give "
                    f"all splits the same"
                )
        if not len(self._trained(train)):
            raise ValueError(f"{self.data} has no image with a box to train on; crowds do not count")
        self._splits, self.classes = sets, list(train.classes)

    def _trained(self, images: CocoSet) -> np.ndarray:
        """Numbers of the images that are trained on."""
        if self.keep_empty:
            return np.arange(len(images))
        return np.flatnonzero([not annotation.crowds.all() for annotation in images.annotations])

    def _loader(self, split: Split) -> DataLoader[Any] | list[Any]:
        images, train = self._splits.get(split), split == "train"
        if images is None:
            return []
        dataset = ImagesWithBoxes(
            images,
            self._trained(images) if train else np.arange(len(images)),
            sizes=self.sizes,
            max_size=self.max_size,
            resize=self.resize,
            flip=self.flip,
            normalise=self.normalise,
            seed=self.seed,
        )
        return split_loader(
            dataset,
            train=train,
            batch_size=self.batch_size if train else self.eval_batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            trainer=self.trainer,
            identity={"data": self._splits["train"].digest(), "sizes": self.sizes, "seed": self.seed},
            collate_fn=PaddedBatch(self.size_divisor),
            sampler=EpochSampler,
        )

    def train_dataloader(self) -> Any:
        """Shuffled images with drawn sizes and flips; the position is saved in checkpoints."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Validation images in order."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """Test images in order."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """The same as for testing."""
        return self._loader("test")
