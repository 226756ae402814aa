"""Triton kernels: pack, scores over packed keys, weighted sum over packed values.

B sequences, N key/value heads, M query rows per head, T tokens, D channels, P bytes per token. A tile of bytes
(BLOCK_T, BLOCK_P) is expanded plane by plane in registers to (BLOCK_T, PLANES * BLOCK_P); column j * BLOCK_P + i of the
tile is channel j * P + i, so that P need not be a power of two.
"""

# mypy: allow-untyped-defs

import os

import torch
import triton
import triton.language as tl

from .low_bit import LowBit
from .reference import replaced_tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_MIN_DOT = 16


@triton.jit
def _pack_kernel(
    x_ptr,
    scale_ptr,
    zero_ptr,
    codes_ptr,
    num_heads,
    num_tokens,
    num_channels,
    num_bytes,
    stride_x_batch,
    stride_x_head,
    stride_x_token,
    stride_x_channel,
    num_token_groups,
    num_channel_groups,
    group_tokens,
    group_channels,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    batch, head = sequence // num_heads, sequence % num_heads
    tokens = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    places = tl.arange(0, BLOCK_P)
    x_ptr += batch * stride_x_batch + head * stride_x_head
    group_rows = (sequence * num_token_groups + tokens // group_tokens) * num_channel_groups
    packed = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.int32)
    for plane in tl.static_range(8 // BITS):
        channels = plane * num_bytes + places
        mask = (tokens < num_tokens)[:, None] & ((places < num_bytes) & (channels < num_channels))[None, :]
        x_offsets = tokens[:, None] * stride_x_token + channels[None, :] * stride_x_channel
        x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        groups = group_rows[:, None] + (channels // group_channels)[None, :]
        scale = tl.load(scale_ptr + groups, mask=mask, other=1.0).to(tl.float32)
        zero = tl.load(zero_ptr + groups, mask=mask, other=0.0).to(tl.float32)
        # correctly rounded division: a code at the edge between two levels must not depend on the backend
        code = tl.floor(tl.div_rn(x - zero, scale) + 0.5)
        code = tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1.0)
        packed |= tl.where(mask, code, 0.0).to(tl.int32) << (plane * BITS)
    out = (sequence * num_tokens + tokens)[:, None] * num_bytes + places[None, :]
    tl.store(codes_ptr + out, packed.to(tl.uint8), mask=(tokens < num_tokens)[:, None] & (places < num_bytes)[None, :])


@triton.jit
def _load_dense(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    first,
    tokens,
    limit,
    stride_c_token,
    stride_s_token,
    num_channels,
    num_bytes,
    group_channels,
    GROUP_TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A tile (BLOCK_T, PLANES * BLOCK_P) in float32; columns that are no channel hold 0."""
    PLANES: tl.constexpr = 8 // BITS
    places = tl.arange(0, BLOCK_P)
    inside = tokens < limit
    mask = inside[:, None] & (places < num_bytes)[None, :]
    packed = tl.load(codes_ptr + tokens[:, None] * stride_c_token + places[None, :], mask=mask, other=0).to(tl.int32)
    shifts = tl.arange(0, PLANES) * BITS
    planes = (packed[:, None, :] >> shifts[None, :, None]) & (2**BITS - 1)
    codes = tl.reshape(planes, (BLOCK_T, PLANES * BLOCK_P)).to(tl.float32)
    columns = tl.arange(0, PLANES * BLOCK_P)
    channels = (columns // BLOCK_P) * num_bytes + columns % BLOCK_P
    real = (columns % BLOCK_P < num_bytes) & (channels < num_channels)
    sets = channels // group_channels
    if GROUP_TOKENS % BLOCK_T == 0:
        # the whole tile lies in one group of tokens
        row = first // GROUP_TOKENS * stride_s_token
        scale = tl.load(scale_ptr + row + sets, mask=real, other=0.0).to(tl.float32)[None, :]
        zero = tl.load(zero_ptr + row + sets, mask=real, other=0.0).to(tl.float32)[None, :]
    else:
        rows = (tokens // GROUP_TOKENS * stride_s_token)[:, None] + sets[None, :]
        both = inside[:, None] & real[None, :]
        scale = tl.load(scale_ptr + rows, mask=both, other=0.0).to(tl.float32)
        zero = tl.load(zero_ptr + rows, mask=both, other=0.0).to(tl.float32)
    return codes * scale + zero


@triton.jit
def _packed_scores_kernel(
    query_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    lengths_ptr,
    out_ptr,
    factor,
    num_heads,
    num_rows,
    num_tokens,
    num_channels,
    num_bytes,
    group_channels,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_c_batch,
    stride_c_head,
    stride_c_token,
    stride_s_batch,
    stride_s_head,
    stride_s_token,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    GROUP_TOKENS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    batch, head = sequence // num_heads, sequence % num_heads
    first = tl.program_id(1).to(tl.int64) * BLOCK_T
    tokens = first + tl.arange(0, BLOCK_T)
    length = tl.load(lengths_ptr + batch)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.arange(0, 8 // BITS * BLOCK_P)
    channels = (columns // BLOCK_P) * num_bytes + columns % BLOCK_P
    real = (columns % BLOCK_P < num_bytes) & (channels < num_channels)
    q_offsets = batch * stride_q_batch + head * stride_q_head + rows[:, None] * stride_q_row + channels[None, :]
    query = tl.load(query_ptr + q_offsets, mask=(rows < num_rows)[:, None] & real[None, :], other=0.0)
    group_base = batch * stride_s_batch + head * stride_s_head
    keys = _load_dense(
        codes_ptr + batch * stride_c_batch + head * stride_c_head,
        scale_ptr + group_base,
        zero_ptr + group_base,
        first,
        tokens,
        num_tokens,
        stride_c_token,
        stride_s_token,
        num_channels,
        num_bytes,
        group_channels,
        GROUP_TOKENS,
        BITS,
        BLOCK_T,
        BLOCK_P,
    ).to(query.dtype)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * factor
    scores = tl.where((tokens < length)[None, :], scores, -float("inf"))
    out = batch * stride_o_batch + head * stride_o_head + rows[:, None] * stride_o_row + tokens[None, :]
    tl.store(out_ptr + out, scores, mask=(rows < num_rows)[:, None] & (tokens < num_tokens)[None, :])


@triton.jit
def _row_scores_kernel(
    query_ptr,
    indices_ptr,
    rows_ptr,
    lengths_ptr,
    out_ptr,
    factor,
    num_heads,
    num_rows,
    num_entries,
    num_channels,
    stride_q_batch,
    stride_q_head,
    stride_q_row,
    stride_r_batch,
    stride_r_head,
    stride_r_entry,
    stride_o_batch,
    stride_o_head,
    stride_o_row,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    batch, head = sequence // num_heads, sequence % num_heads
    entries = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    length = tl.load(lengths_ptr + batch)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    real = channels < num_channels
    q_offsets = batch * stride_q_batch + head * stride_q_head + rows[:, None] * stride_q_row + channels[None, :]
    query = tl.load(query_ptr + q_offsets, mask=(rows < num_rows)[:, None] & real[None, :], other=0.0)
    r_offsets = batch * stride_r_batch + head * stride_r_head + entries[:, None] * stride_r_entry + channels[None, :]
    keys = tl.load(rows_ptr + r_offsets, mask=(entries < num_entries)[:, None] & real[None, :], other=0.0)
    tokens = tl.load(indices_ptr + sequence * num_entries + entries, mask=entries < num_entries, other=-1).to(tl.int64)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * factor
    out = batch * stride_o_batch + head * stride_o_head + rows[:, None] * stride_o_row + tokens[None, :]
    valid = (tokens >= 0) & (tokens < length)
    tl.store(out_ptr + out, scores, mask=(rows < num_rows)[:, None] & valid[None, :])


@triton.jit
def _packed_weighted_sum_kernel(
    weights_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    lengths_ptr,
    marks_ptr,
    partial_ptr,
    split_tokens,
    num_heads,
    num_rows,
    num_tokens,
    num_channels,
    num_bytes,
    group_channels,
    stride_w_batch,
    stride_w_head,
    stride_w_row,
    stride_c_batch,
    stride_c_head,
    stride_c_token,
    stride_s_batch,
    stride_s_head,
    stride_s_token,
    stride_marks,
    GROUP_TOKENS: tl.constexpr,
    HAS_MARKS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    batch, head = sequence // num_heads, sequence % num_heads
    length = tl.minimum(tl.load(lengths_ptr + batch), num_tokens)
    rows = tl.arange(0, BLOCK_M).to(tl.int64)
    columns = tl.arange(0, 8 // BITS * BLOCK_P)
    channels = (columns // BLOCK_P) * num_bytes + columns % BLOCK_P
    real = (columns % BLOCK_P < num_bytes) & (channels < num_channels)
    weights_ptr += batch * stride_w_batch + head * stride_w_head
    codes_ptr += batch * stride_c_batch + head * stride_c_head
    group_base = batch * stride_s_batch + head * stride_s_head
    total = tl.zeros((BLOCK_M, 8 // BITS * BLOCK_P), dtype=tl.float32)
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, length)
    for first in range(begin, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        inside = tokens < end
        if HAS_MARKS:
            marks = tl.load(marks_ptr + sequence * stride_marks + tokens, mask=inside, other=1)
            inside = inside & (marks == 0)
        weights = tl.load(
            weights_ptr + rows[:, None] * stride_w_row + tokens[None, :],
            mask=(rows < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        values = _load_dense(
            codes_ptr,
            scale_ptr + group_base,
            zero_ptr + group_base,
            first,
            tokens,
            end,
            stride_c_token,
            stride_s_token,
            num_channels,
            num_bytes,
            group_channels,
            GROUP_TOKENS,
            BITS,
            BLOCK_T,
            BLOCK_P,
        ).to(scale_ptr.dtype.element_ty)
        total += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    out = ((split * tl.num_programs(0) + sequence) * num_rows + rows[:, None]) * num_channels + channels[None, :]
    tl.store(partial_ptr + out, total, mask=(rows < num_rows)[:, None] & real[None, :])


def _block_bytes(packed: LowBit) -> int:
    """Bytes of a tile, so that the expanded tile is wide enough for a matrix product."""
    return max(triton.next_power_of_2(packed.codes.shape[3]), _MIN_DOT * packed.bits // 8)


def _block_rows(num_rows: int) -> int:
    return max(triton.next_power_of_2(num_rows), _MIN_DOT)


def pack(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, group_tokens: int, group_channels: int
) -> LowBit:
    """Codes of (B, N, T, D) given the groups' scales and zeros."""
    batch, heads, tokens, channels = x.shape
    num_bytes = -(-channels * bits // 8)
    scale, zero = scale.contiguous(), zero.contiguous()
    codes = torch.empty(batch, heads, tokens, num_bytes, dtype=torch.uint8, device=x.device)
    block_tokens = 32
    _pack_kernel[(batch * heads, triton.cdiv(tokens, block_tokens))](
        x,
        scale,
        zero,
        codes,
        heads,
        tokens,
        channels,
        num_bytes,
        *x.stride(),
        scale.shape[2],
        scale.shape[3],
        group_tokens,
        group_channels,
        BITS=bits,
        BLOCK_T=block_tokens,
        BLOCK_P=triton.next_power_of_2(num_bytes),
    )
    return LowBit(codes, scale, zero, bits, channels, group_tokens, group_channels)


def packed_scores(
    query: torch.Tensor,
    keys: LowBit,
    lengths: torch.Tensor,
    factor: float,
    indices: torch.Tensor | None,
    rows: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Write `ops.packed_scores` into `out`."""
    query, lengths = _last_contiguous(query), lengths.contiguous()
    batch, heads, num_rows, channels = query.shape
    block_tokens = 64 if keys.group_tokens % 64 == 0 else 32
    codes, scale, zero = _last_contiguous(keys.codes), *_aligned(keys.scale, keys.zero)
    _packed_scores_kernel[(batch * heads, triton.cdiv(keys.num_tokens, block_tokens))](
        query,
        codes,
        scale,
        zero,
        lengths,
        out,
        factor,
        heads,
        num_rows,
        keys.num_tokens,
        channels,
        codes.shape[3],
        keys.group_channels,
        *query.stride()[:3],
        *codes.stride()[:3],
        *scale.stride()[:3],
        *out.stride()[:3],
        GROUP_TOKENS=keys.group_tokens,
        BITS=keys.bits,
        BLOCK_M=_block_rows(num_rows),
        BLOCK_T=block_tokens,
        BLOCK_P=_block_bytes(keys),
    )
    if indices is None or rows is None or indices.shape[2] == 0:
        return
    # after the kernel above on the same stream: these columns are written last
    rows, block_entries = _last_contiguous(rows.to(query.dtype)), 32
    _row_scores_kernel[(batch * heads, triton.cdiv(indices.shape[2], block_entries))](
        query,
        indices.contiguous(),
        rows,
        lengths,
        out,
        factor,
        heads,
        num_rows,
        indices.shape[2],
        channels,
        *query.stride()[:3],
        *rows.stride()[:3],
        *out.stride()[:3],
        BLOCK_M=_block_rows(num_rows),
        BLOCK_K=block_entries,
        BLOCK_D=max(triton.next_power_of_2(channels), _MIN_DOT),
    )


def packed_weighted_sum(
    weights: torch.Tensor,
    values: LowBit,
    lengths: torch.Tensor,
    indices: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """See `ops.packed_weighted_sum`: partial sums over ranges of tokens, added in a fixed order."""
    weights, lengths = _last_contiguous(weights), lengths.contiguous()
    batch, heads, num_rows, _ = weights.shape
    num_tokens, channels, block_tokens = values.num_tokens, values.num_channels, 32
    codes, scale, zero = _last_contiguous(values.codes), *_aligned(values.scale, values.zero)
    marks = None if indices is None else replaced_tokens(indices, lengths, num_tokens).to(torch.uint8).contiguous()
    # ranges of at least 512 tokens, at most 64 of them
    split_tokens = max(512, triton.cdiv(triton.cdiv(num_tokens, 64), block_tokens) * block_tokens)
    if INTERPRETED:
        split_tokens = 64
    num_splits = triton.cdiv(num_tokens, split_tokens)
    partial = torch.empty(num_splits, batch, heads, num_rows, channels, dtype=torch.float32, device=weights.device)
    _packed_weighted_sum_kernel[(batch * heads, num_splits)](
        weights,
        codes,
        scale,
        zero,
        lengths,
        codes if marks is None else marks,
        partial,
        split_tokens,
        heads,
        num_rows,
        num_tokens,
        channels,
        codes.shape[3],
        values.group_channels,
        *weights.stride()[:3],
        *codes.stride()[:3],
        *scale.stride()[:3],
        num_tokens,
        GROUP_TOKENS=values.group_tokens,
        HAS_MARKS=marks is not None,
        BITS=values.bits,
        BLOCK_M=_block_rows(num_rows),
        BLOCK_T=block_tokens,
        BLOCK_P=_block_bytes(values),
    )
    total = partial.sum(0)
    if indices is not None and rows is not None:
        valid = (indices >= 0) & (indices < lengths.view(-1, 1, 1))
        places = indices.clamp(0, num_tokens - 1).long().unsqueeze(2).expand(-1, -1, num_rows, -1)
        chosen = weights.gather(3, places).masked_fill(~valid.unsqueeze(2), 0.0)
        total += chosen @ rows.float()
    return total


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros with the same strides and contiguous columns."""
    if scale.stride() == zero.stride() and scale.stride(-1) == 1:
        return scale, zero
    return scale.contiguous(), zero.contiguous()
