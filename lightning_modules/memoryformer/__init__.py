"""MemoryFormer: fully-connected layers replaced by hash tables (arXiv 2411.12992)."""

from . import presets as _presets  # noqa: F401 (registers the sizes)
from .inference import MemoryFormerConfig, MemoryFormerForCausalLM
from .keyed import KeyedMemory
from .layer import MemoryLayer
from .modeling import MemoryAttentionProjection, MemoryFeedForward

__all__ = [
    "KeyedMemory",
    "MemoryAttentionProjection",
    "MemoryFeedForward",
    "MemoryFormerConfig",
    "MemoryFormerForCausalLM",
    "MemoryLayer",
]
