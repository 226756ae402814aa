"""Batches of images, mixed in pairs for training: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899)."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Puts items into a batch; those of training are mixed with the batch in reverse order.

    One draw per batch decides between mixup and CutMix, each half of the time where both are on. It depends on seed,
    epoch and the first item alone.

    Attributes:
        mixup: parameter of the beta distribution of shares; 0 for none.
        cutmix: likewise for CutMix.
        num_classes: width of mixed labels.
        seed: of the draws.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    num_classes: int
    seed: int = 0

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """`pixel_values` (B, C, H, W) and `labels`: (B,) int64, or (B, classes) shares where items were mixed."""
        x = torch.stack([item["pixel_values"] for item in items])
        labels = torch.tensor([item["label"] for item in items])
        if items[0]["place"] is None or not (self.mixup or self.cutmix):
            return {"pixel_values": x, "labels": labels}
        rng = np.random.default_rng([self.seed, *items[0]["place"], 1])
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        share = float(rng.beta(alpha, alpha))
        if use_cutmix:
            share = cut_and_paste(x, share, rng)
        else:
            x = x * share + x.flip(0) * (1 - share)
        hot = F.one_hot(labels, self.num_classes).to(x.dtype)
        return {"pixel_values": x, "labels": hot * share + hot.flip(0) * (1 - share)}


def cut_and_paste(x: Tensor, share: float, rng: np.random.Generator) -> float:
    """Put a box of the reversed batch into (B, C, H, W), in place.

    Args:
        x: images.
        share: of the area that is to stay; the box is cut off at the edges.
        rng: draws the centre.

    Returns:
        The share of the area that did stay.
    """
    height, width = x.shape[-2:]
    side = math.sqrt(1 - share)
    row, column = int(rng.integers(height)), int(rng.integers(width))
    half = int(height * side) // 2, int(width * side) // 2
    top, bottom = max(0, row - half[0]), min(height, row + half[0])
    left, right = max(0, column - half[1]), min(width, column + half[1])
    x[..., top:bottom, left:right] = x.flip(0)[..., top:bottom, left:right]
    return 1 - (bottom - top) * (right - left) / (height * width)
