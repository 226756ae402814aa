"""Fused image classifiers as plain folders."""

import copy
from typing import Any

from ..vision.modeling import VisionForImageClassification
from .fusion import fuse_norms


def fused_classifier(model: VisionForImageClassification) -> VisionForImageClassification:
    """A copy without norms that computes the same, and that `save_pretrained` and the auto classes understand.

    Args:
        model: after training, with lambda at 0; not changed.

    Raises:
        ValueError: see `fuse_norms`.
    """
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    config: Any = copy.deepcopy(model.config)
    config.norm, config.norm_options = "identity", None
    plain: Any = VisionForImageClassification(config)
    plain.to(model.device, model.dtype)
    plain.load_state_dict(fused.state_dict())
    return plain.train(model.training)
