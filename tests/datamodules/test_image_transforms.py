"""Geometry, operations and random erasing of image transforms, against arithmetic on pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from tenfold.datamodules.image_transforms import Augmentation, Normalise, augmented, centred, draw_box
from tenfold.datamodules.randaugment import OPERATIONS, rand_augment

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)
SAME = Normalise(mean=(0.0,) * 3, std=(1.0,) * 3)


def apply(name: str, level: float, seed: int = 0) -> np.ndarray:
    return np.asarray(OPERATIONS[name](IMAGE, level, (7, 8, 9), np.random.default_rng(seed)))


def test_operations_on_pixels() -> None:
    np.testing.assert_array_equal(apply("invert", 0.9), 255 - PIXELS)
    # 4 - int(4 * 0.5) = 2 bits are kept
    np.testing.assert_array_equal(apply("posterize", 0.5), PIXELS & 0b1100_0000)
    np.testing.assert_array_equal(apply("solarize", 0.5), np.where(PIXELS < 128, PIXELS, 255 - PIXELS))
    brighter = np.where(PIXELS < 128, np.minimum(PIXELS.astype(int) + 55, 255), PIXELS)
    np.testing.assert_array_equal(apply("solarize_add", 0.5), brighter)
    low, high = PIXELS.min((0, 1)).astype(float), PIXELS.max((0, 1))
    stretched = (PIXELS - low) * 255 / (high - low)
    assert np.abs(apply("autocontrast", 0.5) - stretched).max() <= 1


def test_brightness_goes_both_ways() -> None:
    found = {round(float(apply("brightness", 0.5, seed).mean() / PIXELS.mean()), 1) for seed in range(20)}
    # clipping at 255 takes something from 1.45
    assert 0.5 <= min(found) <= 0.6
    assert 1.2 <= max(found) <= 1.5


def test_translation_moves_by_a_share_of_the_side_and_fills() -> None:
    # 0.45 * level * 16 = 2 and 0.45 * level * 12 = 3 pixels, one way or the other
    for name, side, pixels in (("translate_x", 16, 2), ("translate_y", 12, 3)):
        axis = 1 if name == "translate_x" else 0
        source = np.moveaxis(PIXELS, axis, 0)
        seen = set()
        for seed in range(12):
            out = np.moveaxis(apply(name, pixels / side / 0.45, seed), axis, 0)
            if (out[:pixels] == (7, 8, 9)).all():
                seen.add("forward")
                np.testing.assert_allclose(out[pixels:], source[:-pixels], atol=1)
            else:
                seen.add("backward")
                np.testing.assert_allclose(out[:-pixels], source[pixels:], atol=1)
        assert seen == {"forward", "backward"}


@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "color", "contrast", "sharpness"])
def test_no_strength_is_no_change(name: str) -> None:
    np.testing.assert_allclose(apply(name, 0.0).astype(int), PIXELS, atol=1)


def test_operations_are_left_out_half_of_the_time() -> None:
    unchanged = sum(rand_augment(IMAGE, np.random.default_rng(seed), layers=1) is IMAGE for seed in range(400))
    assert 160 < unchanged < 240


def test_greyscale_goes_through_every_operation() -> None:
    grey = IMAGE.convert("L")
    for name, operation in OPERATIONS.items():
        out = operation(grey, 0.9, 3, np.random.default_rng(0))
        assert (out.size, out.mode) == (grey.size, "L"), name


def test_boxes_have_the_asked_area_and_shape() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        box = draw_box(60, 80, rng, scale=(0.1, 0.4), ratio=(0.5, 2.0))
        assert box is not None
        top, left, height, width = box
        assert 0 <= top <= 60 - height
        assert 0 <= left <= 80 - width
        assert 0.08 < height * width / 4800 < 0.43
        assert 0.46 < width / height < 2.2
    assert draw_box(10, 10, rng, scale=(1.0, 1.0), ratio=(4.0, 4.0)) is None


def test_centre_crop() -> None:
    wide = np.zeros((20, 40, 3), dtype=np.uint8)
    wide[:, :15], wide[:, 25:] = 255, 255
    # the short side goes to 16 of which 8 are taken: 10 of the 20 rows, 10 of the 40 columns, all black but the edge
    x = centred(Image.fromarray(wide), size=8, normalise=SAME, crop_ratio=0.5)
    assert x.shape == (3, 8, 8)
    assert x[..., 1:-1].abs().max() < 0.05
    moved = centred(Image.fromarray(np.roll(wide, 6, 1)), size=8, normalise=SAME, crop_ratio=0.5)
    assert moved[..., 0].min() > 0.9


def test_normalisation_and_channels() -> None:
    square = IMAGE.crop((0, 0, 12, 12))
    x = centred(square, size=12, normalise=Normalise(), crop_ratio=1.0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor(PIXELS[:, :12] / 255).float() - mean) / std
    torch.testing.assert_close(x, expected.permute(2, 0, 1))
    grey = centred(square, size=12, normalise=Normalise(num_channels=1), crop_ratio=1.0)
    torch.testing.assert_close(grey[0], torch.tensor((np.asarray(square.convert("L")) / 255 - 0.5) / 0.5).float())


def test_transparency_becomes_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert torch.equal(centred(clear, size=8, normalise=SAME, crop_ratio=1.0), torch.ones(3, 8, 8))


def test_erasing_fills_one_box_with_noise() -> None:
    black = Image.new("RGB", (32, 32))
    only = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, magnitude=None, erasing=1.0)
    shares, values = [], []
    for seed in range(100):
        x = augmented(black, np.random.default_rng(seed), size=32, normalise=SAME, augmentation=only)
        erased = (x != 0).all(0)
        rows, columns = erased.any(1).nonzero().flatten(), erased.any(0).nonzero().flatten()
        assert erased.sum() == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        shares.append(float(erased.float().mean()))
        values.append(x[:, erased].flatten())
    assert 0.01 < min(shares) < 0.05
    assert 0.25 < max(shares) < 0.36
    noise = torch.cat(values)
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_flip_and_crop_come_from_the_image() -> None:
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1)))
    normalise = Normalise(num_channels=1, mean=(0.0,), std=(1.0,))
    plain = Augmentation(scale=(0.2, 0.5), flip=0.5, magnitude=None, erasing=0.0)
    rising = 0
    for seed in range(60):
        row = augmented(ramp, np.random.default_rng(seed), size=16, normalise=normalise, augmentation=plain)[0, 8]
        steps = row.diff()
        assert (steps >= -1e-6).all() or (steps <= 1e-6).all()
        rising += bool(steps.sum() > 0)
        # a crop of a fifth to a half of the area is 0.39 to 0.82 of the side wide
        assert 0.3 < float(row.max() - row.min()) / (31 * 8 / 255) < 0.9
    assert 18 < rising < 42
