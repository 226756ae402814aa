"""Triton kernels for CUDA: hash and gather in one pass for few tokens, a tiled form for many, the input's gradient.

T tokens, K sub-vectors of NUM_BITS values, H columns. The table's gradient is `weighted_gather`'s: sorted segments.
"""

# mypy: allow-untyped-defs
import os

import torch
import triton
import triton.language as tl

from ..weighted_gather import sort_segments, triton_weighted_gather
from .int8_rows import SCALE_BYTES, scales_and_offsets
from .reference import Weighting, bucket_weights, split

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
# from here on every row of a table is used by several tokens of a block: page a slice of it in instead of single rows
TILED_TOKENS = 256
# larger tables do not fit into a multiprocessor's memory beside the accumulators
TILED_BITS = 8


def _acc(table: torch.Tensor):
    return tl.float64 if table.dtype == torch.float64 else tl.float32


@triton.jit
def _hash_chunk(
    x_ptr,
    base,
    chunk,
    width,
    two_over_t,
    L1: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BITS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Code and weight of one sub-vector of the token whose values begin at `base`."""
    bit = tl.arange(0, BITS)
    at = chunk * NUM_BITS + bit
    # outside of a sub-vector values do not weigh; behind the last value the bit is 1
    used = (bit < NUM_BITS) & (at < width)
    z = tl.load(x_ptr + base + at, mask=used, other=0.0).to(ACC)
    size = tl.abs(z)
    positive = ((z >= 0) & (bit < NUM_BITS)).to(tl.int32)
    code = tl.sum(positive << tl.where(bit < NUM_BITS, NUM_BITS - 1 - bit, 0), axis=0)
    # a product as a sum of logarithms: -log(1 + exp(-s))
    log_p = tl.sum(tl.where(used, -tl.log(1.0 + tl.exp(-size * two_over_t)), 0.0), axis=0)
    weight = tl.exp(log_p)
    if L1:
        weight = weight * tl.sum(size, axis=0)
    return code, weight


@triton.jit
def _hash_gather_fwd_kernel(
    x_ptr,
    table_ptr,
    scales_ptr,
    rows_ptr,
    out_ptr,
    stride_row,
    width,
    two_over_t,
    NUM_TABLES: tl.constexpr,
    NUM_COLS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BITS: tl.constexpr,
    L1: tl.constexpr,
    INT8: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per token and column tile."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < NUM_COLS
    acc = tl.zeros((BLOCK_H,), dtype=ACC)
    for chunk in range(0, NUM_TABLES):
        code, weight = _hash_chunk(x_ptr, token * width, chunk, width, two_over_t, L1, NUM_BITS, BITS, ACC)
        row = (chunk << NUM_BITS) + code.to(tl.int64)
        if KEEP_ROWS:
            # every column tile writes the same number
            tl.store(rows_ptr + token * NUM_TABLES + chunk, row)
        values = tl.load(table_ptr + row * stride_row + cols, mask=inside, other=0.0).to(ACC)
        if INT8:
            values = values * tl.load(scales_ptr + row * 2).to(ACC) + tl.load(scales_ptr + row * 2 + 1).to(ACC)
        acc += weight * values
    tl.store(out_ptr + token * NUM_COLS + cols, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hash_gather_tiled_fwd_kernel(
    x_ptr,
    table_ptr,
    rows_ptr,
    out_ptr,
    num_tokens,
    stride_row,
    width,
    two_over_t,
    NUM_TABLES: tl.constexpr,
    NUM_COLS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BITS: tl.constexpr,
    L1: tl.constexpr,
    KEEP_ROWS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per block of tokens and column tile: each table's tile is loaded once for all tokens of the block."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    present = tokens < num_tokens
    inside = cols < NUM_COLS
    bit = tl.arange(0, BITS)
    entries = tl.arange(0, 1 << NUM_BITS)
    acc = tl.zeros((BLOCK_T, BLOCK_H), dtype=ACC)
    for chunk in range(0, NUM_TABLES):
        at = chunk * NUM_BITS + bit
        used = (bit < NUM_BITS) & (at < width)
        z = tl.load(x_ptr + tokens[:, None] * width + at[None, :], mask=present[:, None] & used[None, :], other=0.0).to(
            ACC
        )
        size = tl.abs(z)
        positive = ((z >= 0) & (bit < NUM_BITS)[None, :]).to(tl.int32)
        codes = tl.sum(positive << tl.where(bit < NUM_BITS, NUM_BITS - 1 - bit, 0)[None, :], axis=1)
        log_p = tl.sum(tl.where(used[None, :], -tl.log(1.0 + tl.exp(-size * two_over_t)), 0.0), axis=1)
        weight = tl.exp(log_p)
        if L1:
            weight = weight * tl.sum(size, axis=1)
        first = chunk << NUM_BITS
        if KEEP_ROWS:
            tl.store(rows_ptr + tokens * NUM_TABLES + chunk, first + codes.to(tl.int64), mask=present)
        at_row = (first + entries).to(tl.int64) * stride_row
        tile = tl.load(table_ptr + at_row[:, None] + cols[None, :], mask=inside[None, :], other=0.0)
        picked = tl.gather(tile, tl.broadcast_to(codes[:, None], (BLOCK_T, BLOCK_H)), axis=0)
        acc += weight[:, None] * picked.to(ACC)
    tl.store(
        out_ptr + tokens[:, None] * NUM_COLS + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )


@triton.jit
def _hash_gather_bwd_input_kernel(
    x_ptr,
    table_ptr,
    rows_ptr,
    grad_ptr,
    grad_x_ptr,
    stride_row,
    width,
    two_over_t,
    NUM_TABLES: tl.constexpr,
    NUM_COLS: tl.constexpr,
    NUM_BITS: tl.constexpr,
    BITS: tl.constexpr,
    L1: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per token and sub-vector: the weight's gradient is an inner product, the values' follow from it."""
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(rows_ptr + token * NUM_TABLES + chunk)
    acc = tl.zeros((BLOCK_H,), dtype=ACC)
    for start in range(0, NUM_COLS, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        inside = cols < NUM_COLS
        grad = tl.load(grad_ptr + token * NUM_COLS + cols, mask=inside, other=0.0).to(ACC)
        acc += grad * tl.load(table_ptr + row * stride_row + cols, mask=inside, other=0.0).to(ACC)
    grad_weight = tl.sum(acc, axis=0)
    bit = tl.arange(0, BITS)
    at = chunk * NUM_BITS + bit
    used = (bit < NUM_BITS) & (at < width)
    z = tl.load(x_ptr + token * width + at, mask=used, other=0.0).to(ACC)
    size = tl.abs(z)
    small = tl.exp(-size * two_over_t)
    p = tl.exp(tl.sum(tl.where(used, -tl.log(1.0 + small), 0.0), axis=0))
    slope = two_over_t * small / (1.0 + small)
    if L1:
        slope = 1.0 + tl.sum(size, axis=0) * slope
    sign = tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, 0.0))
    out = grad_weight * p * sign * slope
    tl.store(grad_x_ptr + token * width + at, out.to(grad_x_ptr.dtype.element_ty), mask=used)


def _sizes(x: torch.Tensor, num_bits: int, weighting: Weighting) -> dict[str, int | bool]:
    return {
        "NUM_TABLES": -(-x.shape[1] // num_bits),
        "NUM_BITS": num_bits,
        "BITS": triton.next_power_of_2(num_bits),
        "L1": weighting == "l1",
    }


def _tile(num_cols: int) -> int:
    # one program takes a millisecond in the interpreter; on a GPU 512 columns are 4 warps of 16-byte loads
    return min(triton.next_power_of_2(num_cols), 64 if INTERPRETED else 512)


def forward(
    x: torch.Tensor,
    table: torch.Tensor,
    num_bits: int,
    weighting: Weighting,
    temperature: float,
    *,
    tiled: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H) sums and the (T, K) rows they came from; `tiled` forces one of the two forms."""
    num_tokens, width = x.shape
    num_cols = table.shape[1]
    x, table = x.contiguous(), table if table.stride(1) == 1 else table.contiguous()
    out = torch.empty(num_tokens, num_cols, dtype=table.dtype, device=x.device)
    sizes = _sizes(x, num_bits, weighting)
    rows = torch.empty(num_tokens, sizes["NUM_TABLES"], dtype=torch.int64, device=x.device)
    if num_tokens == 0 or num_cols == 0:
        return out, rows
    if tiled is None:
        tiled = num_tokens >= TILED_TOKENS and num_bits <= TILED_BITS and table.dtype.itemsize <= 2
    common = {**sizes, "NUM_COLS": num_cols, "KEEP_ROWS": True, "ACC": _acc(table)}
    if tiled:
        block_t, block_h = (16, 16) if INTERPRETED else (256, 64)
        grid = (triton.cdiv(num_tokens, block_t), triton.cdiv(num_cols, block_h))
        _hash_gather_tiled_fwd_kernel[grid](
            x, table, rows, out, num_tokens, table.stride(0), width, 2 / temperature,
            **common, BLOCK_T=block_t, BLOCK_H=block_h,
        )  # fmt: skip
    else:
        block = _tile(num_cols)
        _hash_gather_fwd_kernel[(num_tokens, triton.cdiv(num_cols, block))](
            x, table, table, rows, out, table.stride(0), width, 2 / temperature, **common, INT8=False, BLOCK_H=block
        )
    return out, rows


def forward_int8(
    x: torch.Tensor, records: torch.Tensor, num_bits: int, weighting: Weighting, temperature: float
) -> torch.Tensor:
    """(T, H) float32 sums of decoded records."""
    num_tokens, width = x.shape
    num_cols = records.shape[1] - SCALE_BYTES
    x, records = x.contiguous(), records.contiguous()
    out = torch.empty(num_tokens, num_cols, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return out
    block = _tile(num_cols)
    _hash_gather_fwd_kernel[(num_tokens, triton.cdiv(num_cols, block))](
        x, records, scales_and_offsets(records), records, out, records.stride(0), width, 2 / temperature,
        **_sizes(x, num_bits, weighting), NUM_COLS=num_cols, INT8=True, KEEP_ROWS=False, ACC=tl.float32, BLOCK_H=block,
    )  # fmt: skip
    return out


def grad_input(
    grad: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    num_bits: int,
    weighting: Weighting,
    temperature: float,
) -> torch.Tensor:
    """Gradient for x, (T, d)."""
    x, grad, table = x.contiguous(), grad.contiguous(), table if table.stride(1) == 1 else table.contiguous()
    out = torch.zeros_like(x)
    if x.shape[0] == 0 or table.shape[1] == 0:
        return out
    sizes = _sizes(x, num_bits, weighting)
    _hash_gather_bwd_input_kernel[(x.shape[0], sizes["NUM_TABLES"])](
        x, table, rows, grad, out, table.stride(0), x.shape[1], 2 / temperature,
        **sizes, NUM_COLS=table.shape[1], ACC=_acc(table), BLOCK_H=_tile(table.shape[1]),
    )  # fmt: skip
    return out


def grad_table(
    grad: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    num_bits: int,
    weighting: Weighting,
    temperature: float,
) -> torch.Tensor:
    """Gradient for the table: every row is summed in a fixed order and written once."""
    weights = bucket_weights(*split(x, num_bits), weighting, temperature)
    segments = sort_segments(rows, table.shape[0])
    return triton_weighted_gather.grad_table(grad, table, weights, segments, grouped=False)
