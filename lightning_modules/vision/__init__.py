"""Image backbones (DeiT, Swin, PVT, CSwin) whose norms and attention are slots, registered with transformers."""

from transformers import AutoBackbone, AutoConfig, AutoModelForImageClassification

from . import attention as _attention  # noqa: F401 (registers `softmax`)
from .configuration import VisionConfig
from .modeling import VisionBackbone, VisionForImageClassification
from .presets import vision_config

AutoConfig.register(VisionConfig.model_type, VisionConfig)
AutoModelForImageClassification.register(VisionConfig, VisionForImageClassification)
AutoBackbone.register(VisionConfig, VisionBackbone)

__all__ = ["VisionBackbone", "VisionConfig", "VisionForImageClassification", "vision_config"]
