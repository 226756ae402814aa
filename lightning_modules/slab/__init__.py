"""SLAB: batch norms that replace layer norms in training and vanish at inference, and simplified linear attention."""

from . import causal_attention as _causal_attention  # noqa: F401 (registers `relu_linear`)
from . import modeling as _modeling  # noqa: F401 (fills the decoder's norm slots)
from . import plans as _plans  # noqa: F401 (who reads which norm)
from . import presets as _presets  # noqa: F401 (registers the sizes)
from . import vision as _vision  # noqa: F401 (fills the slots of image backbones)
from . import vision_plans as _vision_plans  # noqa: F401 (who reads their norms)
from .attention import SimplifiedLinearAttention
from .convert import FusedDecoderForCausalLM, FusedLlamaForCausalLM, fused_model
from .fusion import ChannelAffine, NormSite, fuse_norms, register_plan, statistics_norms
from .llama import PRepBNLlamaConfig, PRepBNLlamaForCausalLM
from .masks import follow_attention_mask, set_token_mask
from .norms import ProgressiveNorm, RepBatchNorm
from .replace import progressive_norm, replace_norms
from .vision_convert import fused_classifier, fused_detector

__all__ = [
    "ChannelAffine",
    "FusedDecoderForCausalLM",
    "FusedLlamaForCausalLM",
    "NormSite",
    "PRepBNLlamaConfig",
    "PRepBNLlamaForCausalLM",
    "ProgressiveNorm",
    "RepBatchNorm",
    "SimplifiedLinearAttention",
    "follow_attention_mask",
    "fuse_norms",
    "fused_classifier",
    "fused_detector",
    "fused_model",
    "progressive_norm",
    "register_plan",
    "replace_norms",
    "set_token_mask",
    "statistics_norms",
]
