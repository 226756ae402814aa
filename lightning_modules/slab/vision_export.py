"""Fused image classifiers written as folders, with what folding did to their logits."""

from pathlib import Path
from typing import Any

import torch

from ..vision.modeling import VisionForImageClassification
from .fusion import fixed_norms
from .vision_convert import fused_classifier


@torch.no_grad()
def export_fused_classifier(model: VisionForImageClassification, folder: Path) -> dict[str, Any]:
    """Write the fused form of a classifier as a folder that `AutoModelForImageClassification` loads.

    Args:
        model: after training, with lambda at 0; not changed.
        folder: an existing, empty folder.

    Returns:
        `norms`, the number of those folded, and `max_abs_logit_diff` on random images.

    Raises:
        ValueError: another kind of model, or see `fuse_norms`.
    """
    if not isinstance(model, VisionForImageClassification):
        raise ValueError(
            f"only a classifier of this project has a fused form that loads again, this is a {type(model).__name__}; "
            f"fuse_norms fuses any model in place"
        )
    fused = fused_classifier(model)
    fused.save_pretrained(folder)
    return {"norms": len(fixed_norms(model)), "max_abs_logit_diff": image_logit_difference(model, fused)}


@torch.no_grad()
def image_logit_difference(one: Any, other: Any, *, num_images: int = 4) -> float:
    """Largest difference of two classifiers' logits, in evaluation, on random images of the size of their tables."""
    size = (num_images, one.config.num_channels, one.config.image_size, one.config.image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(one.device, one.dtype)
    modes = one.training, other.training
    logits = [model.eval()(pixel_values=images).logits.float() for model in (one, other)]
    for model, mode in zip((one, other), modes, strict=True):
        model.train(mode)
    return float((logits[0] - logits[1]).abs().max())
