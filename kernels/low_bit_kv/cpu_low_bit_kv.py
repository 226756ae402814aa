"""CPU path: tiles that stay in a core's cache are unpacked, used and forgotten."""

import torch

from .low_bit import LowBit
from .reference import accumulation_dtype, replaced_tokens, unpack_codes, valid_indices

# unpacked values held at a time: 2 MiB of float32
_TILE_VALUES = 2**19


def _tiles(packed: LowBit, num_tokens: int) -> list[tuple[int, int]]:
    """Token ranges, each a whole number of groups."""
    batch, heads = packed.codes.shape[:2]
    size = max(_TILE_VALUES // max(batch * heads * packed.num_channels, 1), 64)
    size = max(size // packed.group_tokens, 1) * packed.group_tokens
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _unpack_tile(packed: LowBit, start: int, end: int) -> torch.Tensor:
    """(B, N, end - start, D) in the accumulation dtype, rounded through the storage dtype."""
    storage = packed.scale.dtype
    dtype = accumulation_dtype(storage)
    first, last = start // packed.group_tokens, -(-end // packed.group_tokens)
    part = LowBit(
        packed.codes[:, :, start:end],
        packed.scale[:, :, first:last],
        packed.zero[:, :, first:last],
        packed.bits,
        packed.num_channels,
        packed.group_tokens,
        packed.group_channels,
    )
    dense = unpack_codes(part).to(dtype)
    scale, zero = part.scale.to(dtype), part.zero.to(dtype)
    # group by group through views: no scale is repeated per element
    whole_tokens = dense.shape[2] // part.group_tokens * part.group_tokens
    whole_channels = dense.shape[3] // part.group_channels * part.group_channels
    for tokens, groups in (
        (slice(0, whole_tokens), slice(0, whole_tokens // part.group_tokens)),
        (slice(whole_tokens, None), slice(whole_tokens // part.group_tokens, None)),
    ):
        for channels, sets in (
            (slice(0, whole_channels), slice(0, whole_channels // part.group_channels)),
            (slice(whole_channels, None), slice(whole_channels // part.group_channels, None)),
        ):
            block = dense[:, :, tokens, channels]
            if block.numel() == 0:
                continue
            num_groups = scale[:, :, groups, sets].shape
            view = block.unflatten(2, (num_groups[2], -1)).unflatten(4, (num_groups[3], -1))
            view.mul_(scale[:, :, groups, None, sets, None]).add_(zero[:, :, groups, None, sets, None])
    return dense.to(storage).to(dtype) if storage != dtype else dense


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
        scores = query @ _unpack_tile(keys, start, end).transpose(2, 3)
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
        total += part @ _unpack_tile(values, start, end).to(dtype)
    if indices is not None and rows is not None:
        places = indices.clamp(0, max(weights.shape[3] - 1, 0)).long().unsqueeze(2).expand(-1, -1, weights.shape[2], -1)
        chosen = weights.gather(3, places).masked_fill(~valid_indices(indices, lengths).unsqueeze(2), 0.0)
        total += chosen @ rows.to(dtype)
    return total
