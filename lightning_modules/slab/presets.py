"""SLAB's language model (arXiv 2405.11582, LLaMA-350M of the released code), with its own norm and with PRepBN."""

from typing import Any

from ..decoder.presets import SIZES, register_preset

# 367 563 776 parameters with RMSNorm: untied embeddings, gated feed-forward, no biases
LLAMA_350M: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "gated_feed_forward": True,
    "norm_eps": 1e-6,
    "initializer_range": 0.02,
}

register_preset("llama-350m", **LLAMA_350M)
register_preset("slab-350m", **LLAMA_350M, norm="prepbn")
register_preset("slab-tiny", **SIZES["tiny"], norm="prepbn")
