"""CPU path: the codes of a tile that stays in a core's cache become numbers, are used and forgotten.

Scales and zeros are applied to the few query rows or weights, not to the many keys or values. With 16-bit scales the
result is closer to exact than the reference, which rounds every key and value to 16 bits.
"""

from dataclasses import replace

import torch

from .low_bit import LowBit
from .reference import accumulation_dtype, replaced_tokens, unpack_reference, valid_indices

# unpacked values held at a time: 2 MiB of float32
_TILE_VALUES = 2**19


def _tiles(packed: LowBit, num_tokens: int) -> list[tuple[int, int]]:
    """Token ranges, each a whole number of groups."""
    batch, heads = packed.codes.shape[:2]
    size = max(_TILE_VALUES // max(batch * heads * packed.num_channels, 1), 64)
    size = max(size // packed.group_tokens, 1) * packed.group_tokens
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _code_tile(packed: LowBit, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """The codes (B, N, end - start, D) of some tokens as floating point numbers."""
    codes = packed.codes[:, :, start:end]
    planes = [codes >> shift for shift in range(0, 8, packed.bits)]
    for plane in planes:
        plane.bitwise_and_(2**packed.bits - 1)
    # bytes are put together before they become numbers: runs of a plane are short
    return torch.cat(planes, dim=3)[..., : packed.num_channels].to(dtype)


def _dense_tile(packed: LowBit, start: int, end: int, dtype: torch.dtype) -> torch.Tensor:
    """The values of some tokens: for the axis that the method does not use."""
    first, last = start // packed.group_tokens, -(-end // packed.group_tokens)
    tile = replace(
        packed,
        codes=packed.codes[:, :, start:end],
        scale=packed.scale[:, :, first:last],
        zero=packed.zero[:, :, first:last],
    )
    return unpack_reference(tile).to(dtype)


def _score_tile(query: torch.Tensor, keys: LowBit, start: int, end: int) -> torch.Tensor:
    """Scores (B, N, M, end - start): `q · (c s + z) = (q s) · c + q · z`, with s and z of one group at a time."""
    group, dtype = keys.group_tokens, query.dtype
    if keys.group_channels > 1:
        return query @ _dense_tile(keys, start, end, dtype).transpose(2, 3)
    codes = _code_tile(keys, start, end, dtype)
    parts = []
    whole = (end - start) // group * group
    for first, last, size in ((0, whole, group), (whole, end - start, end - start - whole)):
        if first == last:
            continue
        groups = slice((start + first) // group, (start + last + size - 1) // group if size == group else None)
        scale, zero = (part[:, :, groups][:, :, : (last - first) // size].to(dtype) for part in (keys.scale, keys.zero))
        # (B, N, groups, M, D) @ (B, N, groups, D, size)
        scaled = query.unsqueeze(2) * scale.unsqueeze(3)
        products = scaled @ codes[:, :, first:last].unflatten(2, (-1, size)).transpose(3, 4)
        products += (query @ zero.transpose(2, 3)).transpose(2, 3).unsqueeze(4)
        parts.append(products.transpose(2, 3).flatten(3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


def _sum_tile(weights: torch.Tensor, values: LowBit, start: int, end: int) -> torch.Tensor:
    """`sum_t w (c s + z)` (B, N, M, D) over a tile: `sum_t (w s) c + sum_t w z`, one set of channels at a time."""
    group, dtype = values.group_channels, weights.dtype
    if values.group_tokens > 1:
        return weights @ _dense_tile(values, start, end, dtype)
    codes = _code_tile(values, start, end, dtype)
    scale, zero = (part[:, :, start:end].to(dtype) for part in (values.scale, values.zero))
    parts = []
    for index in range(scale.shape[3]):
        scaled = weights * scale[:, :, None, :, index]
        part = scaled @ codes[..., index * group : (index + 1) * group]
        part += weights @ zero[..., index : index + 1]
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)


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
    dtype = accumulation_dtype(query.dtype)
    query = query.to(dtype) * factor
    num_tokens = keys.num_tokens
    shortest = int(lengths.min()) if lengths.numel() else 0
    for start, end in _tiles(keys, num_tokens):
        scores = _score_tile(query, keys, start, end)
        if end > shortest:
            outside = torch.arange(start, end) >= lengths.view(-1, 1, 1, 1)
            scores.masked_fill_(outside, -torch.inf)
        out[..., start:end] = scores
    if indices is not None and rows is not None:
        exact = query @ rows.to(dtype).transpose(2, 3)  # (B, N, M, K)
        batch, head, entry = valid_indices(indices, lengths).nonzero(as_tuple=True)
        out[batch, head, :, indices[batch, head, entry].long()] = exact[batch, head, :, entry].to(out.dtype)


def packed_weighted_sum(
    weights: torch.Tensor,
    values: LowBit,
    lengths: torch.Tensor,
    indices: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """See `ops.packed_weighted_sum`."""
    num_tokens = values.num_tokens
    dtype = weights.dtype
    total = weights.new_zeros(*weights.shape[:3], values.num_channels)
    shortest = int(lengths.min()) if lengths.numel() else 0
    marks = None if indices is None else replaced_tokens(indices, lengths, num_tokens)
    for start, end in _tiles(values, num_tokens):
        part = weights[..., start:end]
        if marks is not None:
            part = part.masked_fill(marks[:, :, None, start:end], 0.0)
        if end > shortest:
            part = part.masked_fill(torch.arange(start, end) >= lengths.view(-1, 1, 1, 1), 0.0)
        total += _sum_tile(part, values, start, end)
    if indices is not None and rows is not None:
        places = indices.clamp(0, max(weights.shape[3] - 1, 0)).long().unsqueeze(2).expand(-1, -1, weights.shape[2], -1)
        chosen = weights.gather(3, places).masked_fill(~valid_indices(indices, lengths).unsqueeze(2), 0.0)
        total += chosen @ rows.to(dtype)
    return total
