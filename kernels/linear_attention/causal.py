"""Linear attention with a causal mask, in chunks: an extension beyond SLAB, whose attention is for images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import _check
from .reference import accumulation_dtype


def causal_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6, chunk_size: int = 64
) -> Tensor:
    """Attention with weights `relu(q_i) . relu(k_j)` over keys up to the query's place.

    Keys before a chunk enter through their sums S and s (see `linear_attention`), keys of the chunk through a triangle
    of weights: O(N (chunk + d) e) in place of O(N^2 e). Sums run in float32 (float64 for float64 inputs). Gradients are
    autograd's.

    Args:
        query: (B, H, N, d), the last N of M places.
        key: (B, H, M, d).
        value: (B, H, M, e).
        eps: added to the normaliser.
        chunk_size: places per chunk.

    Returns:
        (B, H, N, e) in the values' dtype.

    Raises:
        ValueError: shapes that do not fit, fewer keys than queries, or a chunk size below 1.
    """
    _check(query, key, value)
    num_queries, before = query.shape[-2], key.shape[-2] - query.shape[-2]
    if before < 0:
        raise ValueError(f"{num_queries} queries have only {key.shape[-2]} keys; each query needs the key of its place")
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} is below 1")
    if not num_queries:
        return value.new_zeros(*query.shape[:-1], value.shape[-1])
    dtype = accumulation_dtype(value)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = query.to(dtype).relu(), key.to(dtype).relu(), value.to(dtype)
        # the sum of keys rides along as one more value that is always 1
        v = F.pad(v, (0, 1), value=1.0)  # (..., M, e + 1)
        first = k[..., :before, :].transpose(-1, -2) @ v[..., :before, :]  # (..., d, e + 1)
        chunks = -(-num_queries // chunk_size)
        missing = chunks * chunk_size - num_queries
        q, k, v = (
            F.pad(x, (0, 0, 0, missing)).unflatten(-2, (chunks, -1))
            for x in (q, k[..., before:, :], v[..., before:, :])
        )  # (..., chunks, chunk, width)
        states = k.transpose(-1, -2) @ v  # (..., chunks, d, e + 1)
        earlier = first.unsqueeze(-3) + states.cumsum(-3) - states
        sums = q @ earlier + (q @ k.transpose(-1, -2)).tril() @ v
        sums = sums.flatten(-3, -2)[..., :num_queries, :]
        return (sums[..., :-1] / (sums[..., -1:] + eps)).to(value.dtype)
