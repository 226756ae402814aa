"""SLAB: batch norms that replace layer norms in training and vanish at inference, and simplified linear attention."""

from . import modeling as _modeling  # noqa: F401 (fills the decoder's norm slots)
from . import presets as _presets  # noqa: F401 (registers the sizes)
from .llama import PRepBNLlamaConfig, PRepBNLlamaForCausalLM
from .masks import follow_attention_mask, set_token_mask
from .norms import ProgressiveNorm, RepBatchNorm
from .replace import progressive_norm, replace_norms

__all__ = [
    "PRepBNLlamaConfig",
    "PRepBNLlamaForCausalLM",
    "ProgressiveNorm",
    "RepBatchNorm",
    "follow_attention_mask",
    "progressive_norm",
    "replace_norms",
    "set_token_mask",
]
