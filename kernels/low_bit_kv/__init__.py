from .low_bit import LowBit, Per, Rule, packed_bytes
from .ops import Backend, pack, packed_scores, packed_weighted_sum, unpack

__all__ = [
    "Backend",
    "LowBit",
    "Per",
    "Rule",
    "pack",
    "packed_bytes",
    "packed_scores",
    "packed_weighted_sum",
    "unpack",
]
