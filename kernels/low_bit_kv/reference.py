"""Plain torch, any device and dtype: what the fast paths must equal."""

import torch
from torch.nn import functional as F

from .low_bit import LowBit, Per, Rule, bytes_per_token, default_rule, group_shape


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_parameters(
    x: torch.Tensor, *, bits: int, group_tokens: int, group_channels: int, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of every group, rounded to the dtype they are stored in.

    KIVI (arXiv 2402.02750): the levels run from the smallest to the largest value. Centred (SpeCache, arXiv 2503.16163,
    its 1-bit rule): the range is cut into `2**bits` parts and the levels are their centres; at 1 bit that is
    `zero = (3 min + max) / 4`, `scale = (max - min) / 2`.

    Args:
        x: (B, N, T, D).
        bits: Bits per code.
        group_tokens: Tokens of a group.
        group_channels: Channels of a group.
        rule: Which levels.

    Returns:
        Two tensors (B, N, ceil(T / group_tokens), ceil(D / group_channels)).
    """
    low, high = _group_extremes(x, group_tokens, group_channels)
    low, high = low.to(accumulation_dtype(x.dtype)), high.to(accumulation_dtype(x.dtype))
    if rule == "kivi":
        scale, zero = (high - low) / (2**bits - 1), low
    elif rule == "centred":
        scale = (high - low) / 2**bits
        zero = low + scale / 2
    else:
        raise ValueError(f"rule is {rule!r}; use 'kivi' or 'centred'")
    # a range that overflows the storage dtype, or underflows it: constant groups would divide by zero
    scale = scale.clamp_max(torch.finfo(x.dtype).max).to(x.dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale), zero.to(x.dtype)


def _group_extremes(x: torch.Tensor, group_tokens: int, group_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, channels = x.shape[2:]
    dim, size, length = (2, group_tokens, tokens) if group_tokens > 1 else (3, group_channels, channels)
    if size == 1 or length == 0:
        return x, x
    whole = length // size * size
    parts = []
    if whole:
        parts.append(x.narrow(dim, 0, whole).unflatten(dim, (-1, size)))
    if whole < length:
        # the last group may be shorter
        parts.append(x.narrow(dim, whole, length - whole).unsqueeze(dim))
    low = torch.cat([part.amin(dim + 1) for part in parts], dim)
    high = torch.cat([part.amax(dim + 1) for part in parts], dim)
    return low, high


def expand_groups(parameter: torch.Tensor, num_tokens: int, num_channels: int, packed: LowBit) -> torch.Tensor:
    """A scale or zero per element (B, N, num_tokens, num_channels)."""
    if packed.group_tokens > 1:
        parameter = parameter.repeat_interleave(packed.group_tokens, 2)[:, :, :num_tokens]
    if packed.group_channels > 1:
        parameter = parameter.repeat_interleave(packed.group_channels, 3)[..., :num_channels]
    return parameter


def pack_reference(x: torch.Tensor, *, bits: int, group_size: int, per: Per, rule: Rule | None = None) -> LowBit:
    """See `ops.pack`."""
    group_tokens, group_channels = group_shape(per, group_size)
    num_bytes = bytes_per_token(x.shape[3], bits)
    scale, zero = group_parameters(
        x, bits=bits, group_tokens=group_tokens, group_channels=group_channels, rule=rule or default_rule(bits)
    )
    packed = LowBit(x.new_empty(0, dtype=torch.uint8), scale, zero, bits, x.shape[3], group_tokens, group_channels)
    dtype = accumulation_dtype(x.dtype)
    scale = expand_groups(scale, x.shape[2], x.shape[3], packed).to(dtype)
    zero = expand_groups(zero, x.shape[2], x.shape[3], packed).to(dtype)
    # the centred rule rounds group extremes to -1 and 2**bits, one past what fits
    codes = ((x.to(dtype) - zero) / scale + 0.5).floor().clamp(0, 2**bits - 1).to(torch.uint8)
    planes = F.pad(codes, (0, num_bytes * (8 // bits) - x.shape[3])).unflatten(3, (8 // bits, num_bytes))
    shifts = torch.arange(0, 8, bits, device=x.device, dtype=torch.uint8).view(-1, 1)
    # planes do not overlap: their sum is their union
    packed_codes = (planes << shifts).sum(3, dtype=torch.uint8)
    return LowBit(packed_codes, packed.scale, packed.zero, bits, x.shape[3], group_tokens, group_channels)


def unpack_codes(packed: LowBit) -> torch.Tensor:
    """The codes (B, N, T, D), one per byte."""
    shifts = torch.arange(0, 8, packed.bits, device=packed.codes.device, dtype=torch.uint8).view(-1, 1)
    planes = (packed.codes.unsqueeze(3) >> shifts) & (2**packed.bits - 1)
    return planes.flatten(3)[..., : packed.num_channels]


def unpack_reference(packed: LowBit) -> torch.Tensor:
    """See `ops.unpack`."""
    dtype = accumulation_dtype(packed.scale.dtype)
    codes = unpack_codes(packed).to(dtype)
    scale = expand_groups(packed.scale, codes.shape[2], codes.shape[3], packed).to(dtype)
    zero = expand_groups(packed.zero, codes.shape[2], codes.shape[3], packed).to(dtype)
    return (codes * scale + zero).to(packed.scale.dtype)


def valid_indices(indices: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Which entries of (B, N, K) indices name a token of their sequence."""
    return (indices >= 0) & (indices < lengths.view(-1, 1, 1))


def replaced_tokens(indices: torch.Tensor, lengths: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """(B, N, T) bool, true where a token is named by the indices."""
    marks = torch.zeros(*indices.shape[:2], num_tokens + 1, dtype=torch.bool, device=indices.device)
    # entries that name no token mark one past the end
    places = torch.where(valid_indices(indices, lengths), indices, num_tokens).long()
    return marks.scatter_(2, places, True)[..., :num_tokens]


def packed_scores_reference(
    query: torch.Tensor,
    keys: LowBit,
    lengths: torch.Tensor,
    *,
    factor: float = 1.0,
    indices: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.packed_scores`."""
    dtype = accumulation_dtype(query.dtype)
    dense = _with_rows(unpack_reference(keys), lengths, indices, rows)
    scores = query.to(dtype) @ dense.to(dtype).transpose(2, 3) * factor
    outside = torch.arange(keys.num_tokens, device=query.device) >= lengths.view(-1, 1, 1, 1)
    return scores.masked_fill(outside, -torch.inf)


def packed_weighted_sum_reference(
    weights: torch.Tensor,
    values: LowBit,
    lengths: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `ops.packed_weighted_sum`."""
    dense = _with_rows(unpack_reference(values), lengths, indices, rows)
    inside = torch.arange(values.num_tokens, device=weights.device) < lengths.view(-1, 1, 1, 1)
    weights = weights[..., : values.num_tokens].masked_fill(~inside, 0.0)
    return weights @ dense.to(weights.dtype)


def _with_rows(
    dense: torch.Tensor, lengths: torch.Tensor, indices: torch.Tensor | None, rows: torch.Tensor | None
) -> torch.Tensor:
    """The dense tensor with its indexed rows replaced; entries that name no token are ignored."""
    if indices is None or rows is None:
        return dense
    # an extra row takes what is ignored
    extended = torch.cat([dense, dense.new_zeros(*dense.shape[:2], 1, dense.shape[3])], dim=2)
    places = torch.where(valid_indices(indices, lengths), indices, dense.shape[2]).long()
    places = places.unsqueeze(3).expand(-1, -1, -1, dense.shape[3])
    return extended.scatter(2, places, rows)[:, :, :-1]
