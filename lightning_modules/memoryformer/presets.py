"""MemoryFormer's sizes (arXiv 2411.12992, table 1), and one n-gram table.

Pythia's shapes: 50 304 vocabulary rows, untied, a quarter of each head rotated. deviation: LayerNorm, whose zero mean
the paper asks for so that buckets are used evenly; the released configurations have RMSNorm (`norm: rmsnorm`).
"""

from typing import Any

from ..decoder.presets import SIZES, register_preset
from .sizes import BlockSizes

MEMORY_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 6, "hidden_size": 512, "num_attention_heads": 8},
    "small": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
    "base": {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
}
# Pythia's, of which the paper takes three times as much
LEARNING_RATES = {"tiny": 1.0e-3, "small": 6.0e-4, "base": 3.0e-4}
BLOCKS = {name: BlockSizes(fields["hidden_size"]) for name, fields in MEMORY_SIZES.items()}

for _name, _fields in MEMORY_SIZES.items():
    register_preset(
        f"memoryformer-{_name}",
        **_fields,
        norm="layernorm",
        projection="memory",
        projection_options={"num_bits": 8, "weighting": "paper"},
        feed_forward="memory",
        feed_forward_options={"num_bits": 8, "extra_bits": 2, "weighting": "paper"},
        rope_parameters={"partial_rotary_factor": 0.25},
    )

register_preset(
    "ngram-tiny",
    **SIZES["tiny"],
    feed_forward="memory",
    feed_forward_options={
        "key": "ngram_hash",
        "orders": [2, 3],
        "num_heads": 2,
        "num_rows": 16384,
        "gate": "sigmoid",
    },
)
