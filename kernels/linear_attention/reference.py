"""Plain torch with the whole (N, M) matrix, differentiable by autograd: what other paths are compared with."""

import torch
from torch import Tensor


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """Products and sums run in float64 for float64 inputs, in float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-6, causal: bool = False
) -> Tensor:
    """Weights `relu(q_i) . relu(k_j)`, divided by their sum over j plus eps, times the values.

    Args:
        query: (..., N, d).
        key: (..., M, d).
        value: (..., M, e).
        eps: added to the sum of weights.
        causal: query i sees keys up to `i + M - N`.

    Returns:
        (..., N, e) in the values' dtype.
    """
    dtype = accumulation_dtype(value)
    weights = query.to(dtype).relu() @ key.to(dtype).relu().transpose(-1, -2)  # (..., N, M)
    if causal:
        weights = weights.tril(weights.shape[-1] - weights.shape[-2])
    return ((weights @ value.to(dtype)) / (weights.sum(-1, keepdim=True) + eps)).to(value.dtype)
