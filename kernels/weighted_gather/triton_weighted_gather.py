"""Triton kernels for CUDA: forward, gradient for the weights, and gradient for the table without atomics.

T tokens, M terms per token, H columns. One addressing scheme serves both public ops: with GROUPED the terms of a token
are the M adjacent rows of group `indices[t]`, otherwise row `indices[t, m]`.
"""

# mypy: allow-untyped-defs
import os

import torch
import triton
import triton.language as tl

from .reference import accumulation_dtype
from .segments import Segments

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_TL_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def _configs(*, terms: bool = False) -> list[triton.Config]:
    """Column tiles and warps to choose from; the interpreter cannot time, so there it is one."""
    if INTERPRETED:
        return [triton.Config({"BLOCK_H": 64}, num_warps=1)]
    # a warp covers 256 columns of 16 bits in one 16-byte load per thread
    tiles = ((128, 1), (256, 1), (256, 2), (512, 1), (512, 2), (512, 4)) + (() if terms else ((1024, 4), (2048, 8)))
    return [triton.Config({"BLOCK_H": tile}, num_warps=warps) for tile, warps in tiles]


@triton.autotune(configs=_configs(), key=["NUM_COLS", "NUM_TERMS", "GROUPED"])
@triton.jit
def _weighted_gather_fwd_kernel(
    table_ptr,
    indices_ptr,
    weights_ptr,
    out_ptr,
    stride_group,
    stride_row,
    NUM_TERMS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    GROUPED: tl.constexpr,
    UNROLL: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < NUM_COLS
    acc = tl.zeros((BLOCK_H,), dtype=ACC)
    base = token * 0
    if GROUPED:
        base = tl.load(indices_ptr + token).to(tl.int64) * stride_group
    for start in range(0, NUM_TERMS, UNROLL):
        # independent loads, so that UNROLL rows are in flight at once
        for i in tl.static_range(UNROLL):
            term = start + i + token * 0
            weight_at = weights_ptr + token * NUM_TERMS + term
            row = base + term * stride_row
            if NUM_TERMS % UNROLL == 0:
                if not GROUPED:
                    row = tl.load(indices_ptr + token * NUM_TERMS + term).to(tl.int64) * stride_row
                weight = tl.load(weight_at).to(ACC)
                values = tl.load(table_ptr + row + cols, mask=inside, other=0.0).to(ACC)
            else:
                valid = term < NUM_TERMS
                if not GROUPED:
                    row = tl.load(indices_ptr + token * NUM_TERMS + term, mask=valid, other=0).to(tl.int64) * stride_row
                weight = tl.load(weight_at, mask=valid, other=0.0).to(ACC)
                # not `inside & valid`: the interpreter turns a scalar mask that meets a block into integers
                limit = NUM_COLS * valid.to(tl.int32)
                values = tl.load(table_ptr + row + cols, mask=cols < limit, other=0.0).to(ACC)
            acc += weight * values
    tl.store(out_ptr + token * NUM_COLS + cols, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.autotune(configs=_configs(terms=True), key=["NUM_COLS", "NUM_TERMS", "GROUPED"])
@triton.jit
def _weighted_gather_bwd_weights_kernel(
    table_ptr,
    indices_ptr,
    grad_ptr,
    grad_weights_ptr,
    stride_group,
    stride_row,
    NUM_TERMS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    terms = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = terms < NUM_TERMS
    if GROUPED:
        rows = tl.load(indices_ptr + token).to(tl.int64) * stride_group + terms.to(tl.int64) * stride_row
    else:
        rows = tl.load(indices_ptr + token * NUM_TERMS + terms, mask=valid, other=0).to(tl.int64) * stride_row
    acc = tl.zeros((BLOCK_M,), dtype=ACC)
    for start in range(0, NUM_COLS, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        inside = cols < NUM_COLS
        grad = tl.load(grad_ptr + token * NUM_COLS + cols, mask=inside, other=0.0).to(ACC)
        mask = valid[:, None] & inside[None, :]
        values = tl.load(table_ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0).to(ACC)
        acc += tl.sum(values * grad[None, :], axis=1)
    tl.store(grad_weights_ptr + token * NUM_TERMS + terms, acc.to(grad_weights_ptr.dtype.element_ty), mask=valid)


@triton.autotune(configs=_configs(terms=True), key=["NUM_COLS", "NUM_ROWS", "PARTIAL"])
@triton.jit
def _weighted_gather_bwd_table_kernel(
    grad_ptr,
    weights_ptr,
    order_ptr,
    begins_ptr,
    ends_ptr,
    slot_offsets_ptr,
    partial_ptr,
    out_ptr,
    split_terms,
    TERMS_PER_TOKEN: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    PARTIAL: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Sum one piece of a segment (PARTIAL), or a segment's first piece plus the partial sums of its others."""
    segment = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rows = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = cols < NUM_COLS
    valid = rows < NUM_ROWS
    tile = rows[:, None] * NUM_COLS + cols[None, :]
    mask = valid[:, None] & inside[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_H), dtype=ACC)
    begin = tl.load(begins_ptr + segment)
    end = tl.minimum(tl.load(ends_ptr + segment), begin + split_terms)
    for start in range(begin, end, UNROLL):
        for i in tl.static_range(UNROLL):
            present = start + i < end
            term = tl.load(order_ptr + start + i, mask=present, other=0)
            # not `valid & present`: the interpreter turns a scalar mask that meets a block into integers
            once = present.to(tl.int32)
            weight = tl.load(weights_ptr + term * NUM_ROWS + rows, mask=rows < NUM_ROWS * once, other=0.0).to(ACC)
            token = term // TERMS_PER_TOKEN
            grad = tl.load(grad_ptr + token * NUM_COLS + cols, mask=cols < NUM_COLS * once, other=0.0).to(ACC)
            acc += weight[:, None] * grad[None, :]
    if not PARTIAL:
        first = tl.load(slot_offsets_ptr + segment)
        last = tl.load(slot_offsets_ptr + segment + 1)
        for slot in range(first, last):
            acc += tl.load(partial_ptr + slot * NUM_ROWS * NUM_COLS + tile, mask=mask, other=0.0)
    tl.store(out_ptr + segment * NUM_ROWS * NUM_COLS + tile, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _addressing(table: torch.Tensor, *, grouped: bool) -> tuple[torch.Tensor, int, int]:
    """The table with contiguous columns, and its strides from group to group and from row to row."""
    if table.stride(-1) != 1:
        table = table.contiguous()
    return (table, table.stride(0), table.stride(1)) if grouped else (table, 0, table.stride(0))


def forward(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool) -> torch.Tensor:
    """(T, H) sums; indices are not checked: on a GPU that would wait for the device."""
    num_tokens, num_terms = weights.shape
    num_cols = table.shape[-1]
    if num_tokens == 0 or num_terms == 0:
        return table.new_zeros(num_tokens, num_cols)
    table, stride_group, stride_row = _addressing(table, grouped=grouped)
    out = torch.empty(num_tokens, num_cols, dtype=table.dtype, device=table.device)
    _weighted_gather_fwd_kernel[lambda meta: (num_tokens, triton.cdiv(num_cols, meta["BLOCK_H"]))](
        table,
        indices.contiguous(),
        weights.contiguous(),
        out,
        stride_group,
        stride_row,
        NUM_TERMS=num_terms,
        NUM_COLS=num_cols,
        GROUPED=grouped,
        UNROLL=min(triton.next_power_of_2(num_terms), 8),
        ACC=_TL_DTYPES[accumulation_dtype(table)],
    )
    return out


def grad_weights(
    grad: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool
) -> torch.Tensor:
    """Gradient for the weights: the inner product of every used row with its token's output gradient."""
    num_tokens, num_terms = weights.shape
    if num_tokens == 0 or num_terms == 0:
        return torch.zeros_like(weights)
    table, stride_group, stride_row = _addressing(table, grouped=grouped)
    out = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    block_m = min(triton.next_power_of_2(num_terms), 16)
    _weighted_gather_bwd_weights_kernel[(num_tokens, triton.cdiv(num_terms, block_m))](
        table,
        indices.contiguous(),
        grad.contiguous(),
        out,
        stride_group,
        stride_row,
        NUM_TERMS=num_terms,
        NUM_COLS=table.shape[-1],
        GROUPED=grouped,
        BLOCK_M=block_m,
        ACC=_TL_DTYPES[accumulation_dtype(table)],
    )
    return out


def grad_table(
    grad: torch.Tensor, table: torch.Tensor, weights: torch.Tensor, segments: Segments, *, grouped: bool
) -> torch.Tensor:
    """Gradient for the table by sorted segments: every row is written once, sums always run in the same order."""
    num_tokens, num_terms = weights.shape
    result = torch.empty(table.shape, dtype=table.dtype, device=table.device)
    if num_tokens == 0 or num_terms == 0 or result.numel() == 0:
        return result.zero_()
    num_rows, num_cols = (num_terms if grouped else 1), table.shape[-1]
    dtype = accumulation_dtype(table)
    grad, weights, plan = grad.contiguous(), weights.contiguous(), segments.split_plan
    num_slots = plan.slot_begins.numel()
    partial = torch.empty(num_slots, num_rows, num_cols, dtype=dtype, device=table.device)
    block_n = min(triton.next_power_of_2(num_rows), 8)

    def launch(begins: torch.Tensor, ends: torch.Tensor, out: torch.Tensor, *, is_partial: bool) -> None:
        _weighted_gather_bwd_table_kernel[
            lambda meta: (begins.numel(), triton.cdiv(num_cols, meta["BLOCK_H"]), triton.cdiv(num_rows, block_n))
        ](
            grad,
            weights,
            segments.order,
            begins,
            ends,
            plan.slot_offsets,
            partial,
            out,
            plan.split_terms,
            TERMS_PER_TOKEN=1 if grouped else num_terms,
            NUM_ROWS=num_rows,
            NUM_COLS=num_cols,
            PARTIAL=is_partial,
            UNROLL=4,
            BLOCK_N=block_n,
            ACC=_TL_DTYPES[dtype],
        )

    if num_slots:
        launch(plan.slot_begins, plan.slot_ends, partial, is_partial=True)
    launch(segments.offsets[:-1], segments.offsets[1:], result, is_partial=False)
    return result
