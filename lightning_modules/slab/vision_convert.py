"""Fused image classifiers and detectors as plain folders."""

import copy
from typing import Any

from ..vision.modeling import VisionBackbone, VisionForImageClassification
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


def fused_detector(model: Any) -> Any:
    """A copy of a detector whose backbone has no norms, that computes the same, and saves and loads like the detector.

    Norms of the backbone's maps become an affine per channel, as what reads them differs from detector to detector.
    The detector's own norms stay.

    Args:
        model: a model of transformers with a `backbone_config` of ours, after training with lambda at 0; not changed.

    Raises:
        ValueError: a model without such a backbone, or see `fuse_norms`.
    """
    backbone_config = getattr(model.config, "backbone_config", None)
    if not any(isinstance(part, VisionBackbone) for part in model.modules()) or backbone_config is None:
        raise ValueError(f"{type(model).__name__} is not built around a VisionBackbone; there is nothing to fuse")
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    config: Any = copy.deepcopy(model.config)
    config.backbone_config.norm, config.backbone_config.norm_options = "identity", None
    config.backbone_config.map_norm = "affine"
    plain: Any = type(model)(config)
    plain.to(model.device, model.dtype)
    plain.load_state_dict(fused.state_dict())
    return plain.train(model.training)
