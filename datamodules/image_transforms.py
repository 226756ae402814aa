"""From PIL images to normalised tensors: augmented for training, centred for evaluation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .randaugment import rand_augment

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Normalise:
    """Pixels of 0 to 255 to standardised tensors.

    Attributes:
        num_channels: 1 for greyscale, 3 for RGB.
        mean: of each channel, in shares of 255; ImageNet's for RGB and 0.5 for greyscale by default.
        std: standard deviation of each channel; likewise.
    """

    num_channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel."""
        mean, std = IMAGENET if self.num_channels == 3 else ((0.5,), (0.5,))
        return self.mean or mean, self.std or std

    def mode(self, image: Any) -> Any:
        """The image with the wanted channels, transparency on white."""
        from PIL import Image

        if image.mode in ("RGBA", "LA", "P", "PA"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB" if self.num_channels == 3 else "L")

    def fill(self) -> Any:
        """The mean as a colour."""
        colour = tuple(round(255 * value) for value in self.moments()[0])
        return colour if self.num_channels == 3 else colour[0]

    def tensor(self, image: Any) -> Tensor:
        """(C, H, W) float32."""
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).div_(255)
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in self.moments())
        return ((pixels - mean) / std).contiguous()


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random part of SLAB's vision recipe.

    Attributes:
        scale: smallest and largest share of the area that a crop takes.
        ratio: least and greatest width over height of a crop.
        flip: probability of a left-right flip.
        magnitude: of RandAugment, 0 to 10; None for none.
        erasing: probability that a box becomes noise.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    magnitude: float | None = 9.0
    erasing: float = 0.25


def draw_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a box with a share of the area in `scale` and a shape in `ratio`.

    The logarithm of the ratio is uniform. None where ten draws do not fit.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return None


def augmented(
    image: Any, rng: np.random.Generator, *, size: int, normalise: Normalise, augmentation: Augmentation
) -> Tensor:
    """Crop, flip, RandAugment and random erasing: (C, size, size).

    Args:
        image: PIL image.
        rng: draws everything.
        size: side in pixels.
        normalise: channels and moments.
        augmentation: what is drawn.
    """
    from PIL import Image

    image = normalise.mode(image)
    box = draw_box(image.height, image.width, rng, scale=augmentation.scale, ratio=augmentation.ratio)
    top, left, height, width = (0, 0, image.height, image.width) if box is None else box
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    if rng.random() < augmentation.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augmentation.magnitude is not None:
        image = rand_augment(image, rng, magnitude=augmentation.magnitude, fill=normalise.fill())
    x = normalise.tensor(image)
    if rng.random() < augmentation.erasing:
        box = draw_box(size, size, rng, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3))
        if box is not None:
            top, left, height, width = box
            noise = rng.standard_normal((len(x), height, width), dtype=np.float32)
            x[:, top : top + height, left : left + width] = torch.from_numpy(noise)
    return x


def centred(image: Any, *, size: int, normalise: Normalise, crop_ratio: float) -> Tensor:
    """Resize the short side and take the centre: (C, size, size).

    Args:
        image: PIL image.
        size: side in pixels.
        normalise: channels and moments.
        crop_ratio: side of the crop over the short side of the resized image, 0.875 for 224 out of 256.
    """
    from PIL import Image

    image = normalise.mode(image)
    side = max(size, round(size / crop_ratio))
    factor = side / min(image.size)
    shape = tuple(max(side, round(length * factor)) for length in image.size)
    image = image.resize(shape, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return normalise.tensor(image.crop((left, top, left + size, top + size)))
