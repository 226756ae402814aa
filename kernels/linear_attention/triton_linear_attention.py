"""Triton kernels of linear attention without a mask, in the key_value order.

BH rows of batch and head, N queries, M keys, width D of queries and keys, E of values. Sums over tokens are cut into
pieces that are added up afterwards in a fixed order, so that results do not depend on timing.
"""

# mypy: allow-untyped-defs
import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import accumulation_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
BLOCK_TOKENS = 16 if INTERPRETED else 64
# tokens that one program adds up
PIECE_TOKENS = 32 if INTERPRETED else 512


@triton.jit
def _load(base, rows, cols, num_rows, width, ACC: tl.constexpr):
    mask = (rows[:, None] < num_rows) & (cols[None, :] < width)
    return tl.load(base + rows[:, None].to(tl.int64) * width + cols[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _store(base, rows, cols, num_rows, width, values):
    mask = (rows[:, None] < num_rows) & (cols[None, :] < width)
    at = base + rows[:, None].to(tl.int64) * width + cols[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _key_value_state_kernel(
    key_ptr, value_ptr, state_ptr, sum_ptr, num_keys, num_pieces,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sum of relu(k) v^T and of relu(k) over one piece of the keys."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    state = tl.zeros((BLOCK_D, BLOCK_E), dtype=ACC)
    total = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, PIECE, BLOCK_N):
        tokens = piece * PIECE + start + tl.arange(0, BLOCK_N)
        k = _load(key_ptr + row * num_keys * D, tokens, d, num_keys, D, ACC)
        v = _load(value_ptr + row * num_keys * E, tokens, e, num_keys, E, ACC)
        k = tl.maximum(k, 0.0)
        state += tl.dot(tl.trans(k), v, input_precision="ieee", out_dtype=ACC)
        total += tl.sum(k, axis=0)
    slot = row * num_pieces + piece
    _store(state_ptr + slot * D * E, d, e, D, E, state)
    tl.store(sum_ptr + slot * D + d, total, mask=d < D)


@triton.jit
def _apply_state_kernel(
    query_ptr, state_ptr, sum_ptr, out_ptr, num_queries, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """`relu(q) S / (relu(q) . s + eps)` for one block of queries."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q = tl.maximum(_load(query_ptr + row * num_queries * D, tokens, d, num_queries, D, ACC), 0.0)
    state = _load(state_ptr + row * D * E, d, e, D, E, ACC)
    total = tl.load(sum_ptr + row * D + d, mask=d < D, other=0.0)
    normaliser = tl.sum(q * total[None, :], axis=1) + eps
    out = tl.dot(q, state, input_precision="ieee", out_dtype=ACC) / normaliser[:, None]
    _store(out_ptr + row * num_queries * E, tokens, e, num_queries, E, out)


@triton.jit
def _backward_queries_kernel(
    query_ptr, state_ptr, sum_ptr, grad_ptr, grad_query_ptr, grad_state_ptr, grad_sum_ptr, num_queries, num_pieces, eps,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries, and one piece's part of those of S and s."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    state = _load(state_ptr + row * D * E, d, e, D, E, ACC)
    total = tl.load(sum_ptr + row * D + d, mask=d < D, other=0.0)
    grad_state = tl.zeros((BLOCK_D, BLOCK_E), dtype=ACC)
    grad_sum = tl.zeros((BLOCK_D,), dtype=ACC)
    for start in range(0, PIECE, BLOCK_N):
        tokens = piece * PIECE + start + tl.arange(0, BLOCK_N)
        raw = _load(query_ptr + row * num_queries * D, tokens, d, num_queries, D, ACC)
        g = _load(grad_ptr + row * num_queries * E, tokens, e, num_queries, E, ACC)
        q = tl.maximum(raw, 0.0)
        normaliser = tl.sum(q * total[None, :], axis=1) + eps
        out = tl.dot(q, state, input_precision="ieee", out_dtype=ACC) / normaliser[:, None]
        # gradients of the numerator and of the normaliser
        above = g / normaliser[:, None]
        below = -tl.sum(g * out, axis=1) / normaliser
        grad_q = tl.dot(above, tl.trans(state), input_precision="ieee", out_dtype=ACC)
        grad_q = tl.where(raw > 0.0, grad_q + below[:, None] * total[None, :], 0.0)
        _store(grad_query_ptr + row * num_queries * D, tokens, d, num_queries, D, grad_q)
        grad_state += tl.dot(tl.trans(q), above, input_precision="ieee", out_dtype=ACC)
        grad_sum += tl.sum(q * below[:, None], axis=0)
    slot = row * num_pieces + piece
    _store(grad_state_ptr + slot * D * E, d, e, D, E, grad_state)
    tl.store(grad_sum_ptr + slot * D + d, grad_sum, mask=d < D)


@triton.jit
def _backward_keys_kernel(
    key_ptr, value_ptr, grad_state_ptr, grad_sum_ptr, grad_key_ptr, grad_value_ptr, num_keys,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values for one block of tokens."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    raw = _load(key_ptr + row * num_keys * D, tokens, d, num_keys, D, ACC)
    v = _load(value_ptr + row * num_keys * E, tokens, e, num_keys, E, ACC)
    state = _load(grad_state_ptr + row * D * E, d, e, D, E, ACC)
    total = tl.load(grad_sum_ptr + row * D + d, mask=d < D, other=0.0)
    grad_k = tl.dot(v, tl.trans(state), input_precision="ieee", out_dtype=ACC) + total[None, :]
    _store(grad_key_ptr + row * num_keys * D, tokens, d, num_keys, D, tl.where(raw > 0.0, grad_k, 0.0))
    grad_v = tl.dot(tl.maximum(raw, 0.0), state, input_precision="ieee", out_dtype=ACC)
    _store(grad_value_ptr + row * num_keys * E, tokens, e, num_keys, E, grad_v)


def _constants(d: int, e: int, dtype: torch.dtype) -> dict[str, object]:
    # tl.dot wants at least 16 in every direction
    return {
        "D": d,
        "E": e,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_E": max(16, triton.next_power_of_2(e)),
        "BLOCK_N": BLOCK_TOKENS,
        "ACC": _TL_DTYPES[dtype],
    }


def key_value_state(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """S (BH, D, E) and s (BH, D) from keys (BH, M, D) and values (BH, M, E)."""
    rows, num_keys, d = key.shape
    e, dtype = value.shape[-1], accumulation_dtype(value)
    pieces = max(1, triton.cdiv(num_keys, PIECE_TOKENS))
    state = torch.empty(rows, pieces, d, e, dtype=dtype, device=key.device)
    total = torch.empty(rows, pieces, d, dtype=dtype, device=key.device)
    _key_value_state_kernel[(rows, pieces)](
        key, value, state, total, num_keys, pieces, PIECE=PIECE_TOKENS, **_constants(d, e, dtype)
    )
    return state.sum(1), total.sum(1)


def apply_state(query: Tensor, state: Tensor, key_sum: Tensor, eps: float) -> Tensor:
    """Outputs (BH, N, E) in the queries' dtype."""
    rows, num_queries, d = query.shape
    e = state.shape[-1]
    out = torch.empty(rows, num_queries, e, dtype=query.dtype, device=query.device)
    if out.numel():
        _apply_state_kernel[(rows, triton.cdiv(num_queries, BLOCK_TOKENS))](
            query, state, key_sum, out, num_queries, eps, **_constants(d, e, state.dtype)
        )
    return out


def backward_queries(
    query: Tensor, state: Tensor, key_sum: Tensor, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (BH, N, D), of S and of s."""
    rows, num_queries, d = query.shape
    e = state.shape[-1]
    pieces = max(1, triton.cdiv(num_queries, PIECE_TOKENS))
    grad_query = torch.empty_like(query)
    grad_state = torch.empty(rows, pieces, d, e, dtype=state.dtype, device=query.device)
    grad_sum = torch.empty(rows, pieces, d, dtype=state.dtype, device=query.device)
    _backward_queries_kernel[(rows, pieces)](
        query, state, key_sum, grad, grad_query, grad_state, grad_sum, num_queries, pieces, eps, PIECE=PIECE_TOKENS,
        **_constants(d, e, state.dtype),
    )  # fmt: skip
    return grad_query, grad_state.sum(1), grad_sum.sum(1)


def backward_keys(key: Tensor, value: Tensor, grad_state: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and values."""
    rows, num_keys, d = key.shape
    e = value.shape[-1]
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    if num_keys:
        _backward_keys_kernel[(rows, triton.cdiv(num_keys, BLOCK_TOKENS))](
            key, value, grad_state, grad_sum, grad_key, grad_value, num_keys, **_constants(d, e, grad_state.dtype)
        )
    return grad_key, grad_value
