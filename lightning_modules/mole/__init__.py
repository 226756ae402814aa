"""Mixture of Lookup Experts: experts on token embeddings, re-parameterised into a table after training."""

from . import presets as _presets  # noqa: F401 (registers the sizes)
from .lookup import MoLELookupConfig, MoLELookupForCausalLM
from .modeling import MoLEFeedForward, MoLEForCausalLM
from .table import LookupTable

__all__ = ["LookupTable", "MoLEFeedForward", "MoLEForCausalLM", "MoLELookupConfig", "MoLELookupForCausalLM"]
