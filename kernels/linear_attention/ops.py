"""The public op without a causal mask: it checks its arguments and picks the order of products and the path."""

import math
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from .reference import accumulation_dtype, linear_attention_reference

Backend = Literal["triton", "torch", "reference"]
Order = Literal["key_value", "query_key"]
# of one tile that the Triton kernels hold
_MAX_TRITON_WIDTH = 128


def cheaper_order(num_queries: int, num_keys: int, width: int, value_width: int) -> Order:
    """The order with fewer multiply-adds: keys by values first, O((N + M) d e), or queries by keys, O(N M (d + e)).

    With N = M and d = e (arXiv 2405.11582's code) the first is cheaper when N > d.

    >>> cheaper_order(196, 196, 32, 32), cheaper_order(16, 16, 32, 32)
    ('key_value', 'query_key')
    """
    key_value = width * value_width * (num_queries + num_keys)
    query_key = num_queries * num_keys * (width + value_width)
    return "key_value" if query_key > key_value else "query_key"


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    eps: float = 1e-6,
    order: Order | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Attention with weights `relu(q_i) . relu(k_j)` over all keys, without a softmax (SLA, arXiv 2405.11582).

    `out_i = relu(q_i) S / (relu(q_i) . s + eps)` with `S = sum_j relu(k_j) v_j^T` and `s = sum_j relu(k_j)`. There is
    no scale by the width: it cancels. Products and sums run in float32 (float64 for float64 inputs) whatever autocast
    says: the sum of keys overflows float16. A query without a positive value gives 0. Gradients reach all inputs.

    Args:
        query: (B, H, N, d), or any leading dimensions.
        key: (B, H, M, d).
        value: (B, H, M, e).
        eps: added to the normaliser; the released code's 1e-6.
        order: of the products; the cheaper one by default.
        backend: `triton` (CUDA, or any device under Triton's interpreter; key_value order, widths up to 128), `torch`,
            or `reference` (the whole N x M matrix). Default: `triton` where it can run on CUDA, else `torch`.

    Returns:
        (B, H, N, e) in the values' dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot do it.
    """
    _check(query, key, value)
    if order is None:
        order = cheaper_order(query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1])
    elif order not in ("key_value", "query_key"):
        raise ValueError(f"order {order!r} is not one of key_value, query_key")
    chosen = _pick(backend, query, value, order)
    device = query.device.type
    with torch.autocast(device, enabled=False):
        if chosen == "reference":
            return linear_attention_reference(query, key, value, eps=eps)
        if chosen == "triton":
            return _TritonLinearAttention.apply(query, key, value, eps)
        return _products(query, key, value, eps, order)


def _products(query: Tensor, key: Tensor, value: Tensor, eps: float, order: Order) -> Tensor:
    dtype = accumulation_dtype(value)
    q, k, v = query.to(dtype).relu(), key.to(dtype).relu(), value.to(dtype)
    if order == "query_key":
        normaliser = q @ k.sum(-2).unsqueeze(-1) + eps  # (..., N, 1)
        return (((q @ k.transpose(-1, -2)) @ v) / normaliser).to(value.dtype)
    # the normaliser as one more column of the state: queries are read once
    state = torch.cat([k.transpose(-1, -2) @ v, k.sum(-2).unsqueeze(-1)], dim=-1)  # (..., d, e + 1)
    out = q @ state
    return (out[..., :-1] / (out[..., -1:] + eps)).to(value.dtype)


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.dim() < 2 or key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"query, key and value must be (..., N, d), (..., M, d) and (..., M, e), got {tuple(query.shape)}, "
            f"{tuple(key.shape)}, {tuple(value.shape)}"
        )
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not same or key.shape[-1] != query.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit as "
            f"(..., N, d), (..., M, d) and (..., M, e)"
        )
    if not query.dtype.is_floating_point or not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value must have one floating point dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value must be on one device, got {query.device}, {key.device}, {value.device}"
        )


def _pick(backend: Backend | None, query: Tensor, value: Tensor, order: Order) -> Backend:
    widest = max(query.shape[-1], value.shape[-1])
    if backend is None:
        able = query.device.type == "cuda" and widest <= _MAX_TRITON_WIDTH and order == "key_value"
        return "triton" if able and not torch.compiler.is_compiling() and find_spec("triton") is not None else "torch"
    if backend not in ("triton", "torch", "reference"):
        raise ValueError(f"backend {backend!r} is not one of triton, torch, reference")
    if backend == "triton":
        if find_spec("triton") is None:
            raise ValueError("backend 'triton' needs the triton package, which is not installed; leave backend at None")
        if widest > _MAX_TRITON_WIDTH:
            raise ValueError(f"backend 'triton' takes widths up to {_MAX_TRITON_WIDTH}, got {widest}; use 'torch'")
        if order != "key_value":
            raise ValueError("backend 'triton' has the order key_value alone; leave one of them at None")
        from .triton_linear_attention import INTERPRETED

        if query.device.type != "cuda" and not INTERPRETED:
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, these are on {query.device}; leave backend at None, or set "
                f"TRITON_INTERPRET=1 before the program starts"
            )
    return backend


class _TritonLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
        from . import triton_linear_attention as kernels

        rows = math.prod(query.shape[:-2])
        q, k, v = (x.reshape(rows, *x.shape[-2:]).contiguous() for x in (query, key, value))
        state, key_sum = kernels.key_value_state(k, v)
        out = kernels.apply_state(q, state, key_sum, eps)
        ctx.save_for_backward(q, k, v, state, key_sum)
        ctx.eps, ctx.shapes = eps, (query.shape, key.shape, value.shape)
        return out.view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_linear_attention as kernels

        q, k, v, state, key_sum = ctx.saved_tensors
        grad = grad.reshape(*q.shape[:-1], v.shape[-1]).contiguous()
        grad_q, grad_state, grad_sum = kernels.backward_queries(q, state, key_sum, grad, ctx.eps)
        grad_k, grad_v = kernels.backward_keys(k, v, grad_state, grad_sum)
        grads = zip((grad_q, grad_k, grad_v), ctx.shapes, strict=True)
        return *(value.view(shape) for value, shape in grads), None
