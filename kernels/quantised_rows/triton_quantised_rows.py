"""Triton kernel: decode N rows of a record in registers and add them up. Forward only: tables are not trained."""

# mypy: allow-untyped-defs
from functools import cache

import torch
import triton
import triton.language as tl

from ..weighted_gather.triton_weighted_gather import INTERPRETED
from .code_books import normal_float_levels
from .row_layout import BITS, RowLayout


def _configs() -> list[triton.Config]:
    """Column tiles and warps to choose from; the interpreter cannot time, so there it is one."""
    if INTERPRETED:
        return [triton.Config({"BLOCK_H": 64}, num_warps=1)]
    return [triton.Config({"BLOCK_H": tile}, num_warps=warps) for tile, warps in ((256, 1), (512, 2), (1024, 4))]


@triton.autotune(configs=_configs(), key=["NUM_COLS", "NUM_TERMS", "BITS"])
@triton.jit
def _weighted_gather_records_fwd_kernel(
    codes_ptr,
    scales_ptr,
    levels_ptr,
    ids_ptr,
    weights_ptr,
    out_ptr,
    stride_codes,
    stride_scales,
    NUM_TERMS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < NUM_COLS
    record = tl.load(ids_ptr + token).to(tl.int64)
    codes = codes_ptr + record * stride_codes
    scales = scales_ptr + record * stride_scales
    acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for term in range(NUM_TERMS):
        weight = tl.load(weights_ptr + token * NUM_TERMS + term).to(tl.float32)
        place = term * NUM_COLS + cols
        if BITS == 0:
            values = tl.load(codes + place, mask=inside, other=0.0).to(tl.float32)
        else:
            if BITS == 8:
                # stored as two's complement in unsigned bytes
                code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
                level = tl.where(code > 127, code - 256, code).to(tl.float32) / 127.0
            else:
                bit = place * BITS
                first = tl.load(codes + bit // 8, mask=inside, other=0).to(tl.int32)
                if BITS == 3:
                    # a code may begin in one byte and end in the next; the scales follow, so that one exists
                    following = tl.load(codes + bit // 8 + 1, mask=inside, other=0).to(tl.int32)
                    first = first | (following << 8)
                code = (first >> (bit % 8)) & ((1 << BITS) - 1)
                level = tl.load(levels_ptr + code, mask=inside, other=0.0)
            values = level * tl.load(scales + place // BLOCK, mask=inside, other=0.0).to(tl.float32)
        acc += weight * values
    tl.store(out_ptr + token * NUM_COLS + cols, acc, mask=inside)


@cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    return normal_float_levels(bits).to(device)


def forward(records: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """(T, d) float32 sums for (U, layer_bytes) records, (T,) ids and (T, N) weights."""
    num_tokens, num_terms = weights.shape
    # where records stay in page-locked host memory, the other tensors say which device computes
    out = torch.empty(num_tokens, layout.hidden_size, dtype=torch.float32, device=weights.device)
    if num_tokens == 0:
        return out
    if layout.quantisation == "none":
        codes = records.view(getattr(torch, layout.dtype))
        scales = levels = codes
        bits, block = 0, 1
    else:
        codes, bits, block = records, BITS[layout.quantisation], layout.block_size
        scales = records[:, layout.code_bytes :].view(getattr(torch, layout.scale_dtype))
        levels = _levels(bits, out.device) if bits < 8 else out
    grid = lambda meta: (num_tokens, triton.cdiv(layout.hidden_size, meta["BLOCK_H"]))  # noqa: E731
    _weighted_gather_records_fwd_kernel[grid](
        codes,
        scales,
        levels,
        ids.contiguous(),
        weights.contiguous(),
        out,
        codes.stride(0),
        scales.stride(0),
        NUM_TERMS=num_terms,
        NUM_COLS=layout.hidden_size,
        BITS=bits,
        BLOCK=block,
    )
    return out
