"""RandAugment (arXiv 1909.13719) on PIL images, in the form of SLAB's vision recipe: m9, mstd 0.5, increasing."""

from collections.abc import Callable
from typing import Any

import numpy as np

Draw = np.random.Generator
# the scale of magnitudes: 10 is the strongest
STRONGEST = 10.0


def _affine(image: Any, matrix: tuple[float, ...], fill: Any, rng: Draw) -> Any:
    from PIL import Image

    how = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=how, fillcolor=fill)


def _signed(value: float, rng: Draw) -> float:
    return -value if rng.random() < 0.5 else value


def _rotate(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import Image

    how = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.BICUBIC
    return image.rotate(_signed(30.0 * level, rng), resample=how, fillcolor=fill)


def _shear_x(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    return _affine(image, (1, _signed(0.3 * level, rng), 0, 0, 1, 0), fill, rng)


def _shear_y(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    return _affine(image, (1, 0, 0, _signed(0.3 * level, rng), 1, 0), fill, rng)


def _translate_x(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    return _affine(image, (1, 0, _signed(0.45 * level, rng) * image.width, 0, 1, 0), fill, rng)


def _translate_y(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    return _affine(image, (1, 0, 0, 0, 1, _signed(0.45 * level, rng) * image.height), fill, rng)


def _enhance(kind: str) -> Callable[[Any, float, Any, Draw], Any]:
    def apply(image: Any, level: float, fill: Any, rng: Draw) -> Any:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, kind)(image).enhance(max(0.1, 1.0 + _signed(0.9 * level, rng)))

    return apply


def _autocontrast(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import ImageOps

    return ImageOps.equalize(image)


def _invert(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import ImageOps

    return ImageOps.invert(image)


def _posterize(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import ImageOps

    # PIL needs at least one bit
    return ImageOps.posterize(image, max(1, 4 - int(4 * level)))


def _solarize(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    from PIL import ImageOps

    return ImageOps.solarize(image, 256 - int(256 * level))


def _solarize_add(image: Any, level: float, fill: Any, rng: Draw) -> Any:
    pixels = np.asarray(image).astype(np.int64)
    added = np.minimum(pixels + min(128, int(110 * level)), 255)
    return _from_array(np.where(pixels < 128, added, pixels))


def _from_array(pixels: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(pixels.astype(np.uint8))


OPERATIONS: dict[str, Callable[[Any, float, Any, Draw], Any]] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance("Color"),
    "contrast": _enhance("Contrast"),
    "brightness": _enhance("Brightness"),
    "sharpness": _enhance("Sharpness"),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def rand_augment(
    image: Any, rng: Draw, *, magnitude: float = 9.0, deviation: float = 0.5, layers: int = 2, fill: Any = 0
) -> Any:
    """Operations drawn at random, each left out half of the time.

    Args:
        image: PIL image, RGB or greyscale.
        rng: draws operations, signs and strengths.
        magnitude: strength, 0 to 10.
        deviation: standard deviation of the strength.
        layers: operations drawn.
        fill: colour of what moves in from outside.
    """
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=layers):
        if rng.random() < 0.5:
            continue
        level = float(np.clip(rng.normal(magnitude, deviation), 0, STRONGEST)) / STRONGEST
        image = OPERATIONS[names[int(number)]](image, level, fill, rng)
    return image
