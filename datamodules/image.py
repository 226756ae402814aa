"""`ImageDataModule`: labelled images from anywhere to augmented batches, resumable."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from .assets import resolve
from .documents import Split, split_of
from .image_mixing import Mixing
from .image_sources import ImageSet, open_images, select
from .image_transforms import Augmentation, Normalise, augmented, centred
from .packing import ResumableSampler, split_loader


class EpochSampler(ResumableSampler):
    """`ResumableSampler` that gives the epoch with each number, so that augmentation can depend on both alone.

    Args:
        *args: as for `ResumableSampler`.
        **options: as for `ResumableSampler`.
    """

    def __iter__(self) -> Iterator[Any]:
        """Pairs of epoch and number."""
        epoch = self.epoch + self.epoch_offset
        return iter([(epoch, index) for index in super().__iter__()])


class LabelledImages(Dataset[dict[str, Any]]):
    """Items with `pixel_values` (C, S, S), `label`, and `place`, the (epoch, number) of an augmented item or None.

    An (epoch, number) is augmented, by draws that depend on these and the seed alone. A plain number is not: whoever
    puts another sampler here (recalibration of batch norms, overfitting) sees images as in evaluation.

    Args:
        images: what is read.
        size: side in pixels.
        normalise: channels and moments.
        augmentation: for pairs of epoch and number; None for none.
        crop_ratio: for plain numbers, see `centred`.
        seed: of the draws.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        size: int,
        normalise: Normalise,
        augmentation: Augmentation | None,
        crop_ratio: float,
        seed: int,
    ) -> None:
        self.images, self.size, self.normalise = images, size, normalise
        self.augmentation, self.crop_ratio, self.seed = augmentation, crop_ratio, seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images.labels)

    def __getitem__(self, place: int | tuple[int, int]) -> dict[str, Any]:
        """One image."""
        index = place if isinstance(place, int) else place[1]
        image = self.images.read(index)
        if isinstance(place, int) or self.augmentation is None:
            x = centred(image, size=self.size, normalise=self.normalise, crop_ratio=self.crop_ratio)
        else:
            rng = np.random.default_rng([self.seed, *place, 0])
            x = augmented(image, rng, size=self.size, normalise=self.normalise, augmentation=self.augmentation)
        return {
            "pixel_values": x,
            "label": int(self.images.labels[index]),
            "place": None if isinstance(place, int) else place,
        }


class ImageDataModule(LightningDataModule):
    """Batches of labelled images: `pixel_values` (B, C, S, S) and `labels`.

    Labels are (B,) int64, and (B, classes) shares where mixup or CutMix mixed a batch of training. Order, augmentation
    and mixing depend on seed, epoch and item alone, so that a checkpoint inside an epoch continues with the same next
    batch. Where the source names no splits, each image is sent to one by a hash of its name.

    Args:
        data: see `open_images`; `asset:NAME` too.
        image_size: side of the images in pixels, S.
        num_channels: 1 for greyscale, 3 for RGB, C.
        batch_size: images per batch and process, B.
        eval_batch_size: the same for validation and test; `batch_size` by default.
        val_fraction: share of images for validation (0 to 1), where the source names no splits.
        test_fraction: share of images for testing, likewise.
        split_seed: another seed holds out other images.
        augment: random crops, flips, RandAugment and erasing in training.
        scale: smallest and largest share of the area that a crop takes.
        flip: probability of a left-right flip; 0 for digits and letters.
        magnitude: of RandAugment, 0 to 10; null for none.
        erasing: probability of random erasing.
        mixup: parameter of mixup's beta distribution; 0 for none.
        cutmix: likewise for CutMix.
        crop_ratio: in evaluation, side of the centre crop over the image's short side.
        mean: of each channel, in shares of 255; ImageNet's for RGB and 0.5 for greyscale by default.
        std: standard deviation of each channel, likewise.
        seed: of order, augmentation and mixing.
        num_workers: loader processes.
        image_field: column of Parquet files with encoded images.
        label_field: column of Parquet files with classes.

    Raises:
        ValueError: numbers out of range; a source that cannot be read; an empty split.
        FileNotFoundError: no such path.
    """

    def __init__(
        self,
        data: str = "packaged:digits",
        *,
        image_size: int = 224,
        num_channels: int = 3,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        augment: bool = True,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        magnitude: float | None = 9.0,
        erasing: float = 0.25,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        crop_ratio: float = 0.875,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        seed: int = 0,
        num_workers: int = 0,
        image_field: str = "image",
        label_field: str = "label",
    ) -> None:
        super().__init__()
        for name, value in (
            ("val_fraction", val_fraction),
            ("test_fraction", test_fraction),
            ("flip", flip),
            ("erasing", erasing),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is not between 0 and 1")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on; lower them"
            )
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels {num_channels} is not 1 (greyscale) or 3 (RGB)")
        if image_size < 1 or batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(
                f"image_size {image_size}, batch_size {batch_size} and eval_batch_size {eval_batch_size} must be at "
                f"least 1"
            )
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale {tuple(scale)} is not a range of shares from above 0 up to 1")
        if magnitude is not None and not 0 <= magnitude <= 10:
            raise ValueError(f"magnitude {magnitude} is not between 0 and 10")
        if mixup < 0 or cutmix < 0 or seed < 0:
            raise ValueError(f"mixup {mixup}, cutmix {cutmix} and seed {seed} must not be negative")
        if not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio {crop_ratio} is not above 0 and at most 1")
        for name, moments in (("mean", mean), ("std", std)):
            if moments is not None and len(moments) != num_channels:
                raise ValueError(f"{name} has {len(moments)} values for {num_channels} channels")
        self.data, self.image_size, self.num_channels = data, image_size, num_channels
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.fractions: dict[str, Any] = {
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "split_seed": split_seed,
        }
        self.normalise = Normalise(
            num_channels=num_channels,
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
        )
        self.augmentation = (
            Augmentation(scale=(scale[0], scale[1]), flip=flip, magnitude=magnitude, erasing=erasing)
            if augment
            else None
        )
        self.mixup, self.cutmix, self.crop_ratio = mixup, cutmix, crop_ratio
        self.seed, self.num_workers = seed, num_workers
        self.fields = {"image_field": image_field, "label_field": label_field}
        self.classes: list[str] | None = None
        self._splits: dict[Split, ImageSet] = {}

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None before the data are set up."""
        return None if self.classes is None else len(self.classes)

    def prepare_data(self) -> None:
        """Fetch an asset where the data are one."""
        resolve(self.data)

    def setup(self, stage: str) -> None:
        """Index the images and split them."""
        if self._splits:
            return
        sets = open_images(resolve(self.data), **self.fields)
        whole = sets.pop(None, None)
        if whole is not None:
            names = np.array([split_of(key, **self.fractions) for key in whole.keys])
            splits: tuple[Split, ...] = ("train", "val", "test")
            sets = {name: select(whole, np.flatnonzero(names == name)) for name in splits}
        found: dict[Split, ImageSet] = {name: images for name, images in sets.items() if name is not None}
        if "train" not in found or not len(found["train"].labels):
            raise ValueError(f"{self.data} has no image to train on; there are {', '.join(found) or 'no splits'}")
        held_out: tuple[Split, ...] = ("val", "test")
        for name in held_out:
            if whole is not None and self.fractions[f"{name}_fraction"] > 0 and not len(found[name].labels):
                raise ValueError(
                    f"no image of {self.data} falls into the {name} split; raise {name}_fraction or set it to 0"
                )
        self._splits = found
        self.classes = list(found["train"].classes)

    def _dataset(self, split: Split) -> LabelledImages | None:
        images = self._splits.get(split)
        if images is None or not len(images.labels):
            return None
        return LabelledImages(
            images,
            size=self.image_size,
            normalise=self.normalise,
            augmentation=self.augmentation if split == "train" else None,
            crop_ratio=self.crop_ratio,
            seed=self.seed,
        )

    def _loader(self, split: Split) -> DataLoader[Any] | list[Any]:
        dataset, train = self._dataset(split), split == "train"
        if dataset is None:
            return []
        assert self.classes is not None
        return split_loader(
            dataset,
            train=train,
            batch_size=self.batch_size if train else self.eval_batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            trainer=self.trainer,
            identity={"data": self._splits["train"].digest(), "image_size": self.image_size, "seed": self.seed},
            collate_fn=Mixing(mixup=self.mixup, cutmix=self.cutmix, num_classes=len(self.classes), seed=self.seed),
            sampler=EpochSampler,
        )

    def train_dataloader(self) -> Any:
        """Shuffled, augmented and mixed images; the position is saved in checkpoints."""
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
