from .int8_rows import dequantise_rows, quantise_rows
from .ops import Backend, hash_gather, hash_gather_int8, sign_hash
from .reference import MAX_BITS, Weighting, num_tables
from .sparse_gradient import coalesced, weighted_gather_sparse_grad

__all__ = [
    "MAX_BITS",
    "Backend",
    "Weighting",
    "coalesced",
    "dequantise_rows",
    "hash_gather",
    "hash_gather_int8",
    "num_tables",
    "quantise_rows",
    "sign_hash",
    "weighted_gather_sparse_grad",
]
