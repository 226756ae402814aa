"""Values to codes and back, in plain torch: scales per block, nearest levels, packed bits."""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from .code_books import normal_float_levels

Codes = Literal["int8", "nf4", "nf3"]


def scale_blocks(values: Tensor, block_size: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Divide every block of a row by its largest magnitude, as that is stored.

    Args:
        values: (U, n) float32.
        block_size: values per block; the last of a row may be shorter.
        scale_dtype: of the stored scale, which the division uses, so that coding what was decoded changes nothing.

    Returns:
        Scales (U, ceil(n / block_size)) in `scale_dtype`, and the values over them, in [-1, 1] up to rounding.

    Raises:
        ValueError: a scale is outside the range of `scale_dtype`, or not a number.
    """
    largest = torch.cat([part.abs().amax(-1) for part in _blocks(values, block_size)], dim=1)
    scales = largest.to(scale_dtype)
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"a block's largest value {largest.max().item():g} is outside the range of {scale_dtype} scales; use "
            f"float32 scales"
        )
    # a block of zeros, or of values too small for the scale, is stored as zeros
    divisors = scales.float().masked_fill(scales == 0, float("inf"))
    scaled, begin = values.clone(), 0
    for part in _blocks(scaled, block_size):
        part.div_(divisors[:, begin : begin + part.shape[1], None])
        begin += part.shape[1]
    return scales, scaled


def _blocks(values: Tensor, block_size: int) -> list[Tensor]:
    """Views (U, blocks, values per block): the whole blocks of (U, n), and the shorter one at the end, if any."""
    whole = values.shape[1] // block_size * block_size
    parts = values[:, :whole].unflatten(1, (-1, block_size)), values[:, None, whole:]
    return [part for part in parts if part.shape[1] and part.shape[2]]


def apply_scales(levels: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Multiply (U, n) float32 by the scale of each value's block, in place."""
    factors, begin = scales.float(), 0
    for part in _blocks(levels, block_size):
        part.mul_(factors[:, begin : begin + part.shape[1], None])
        begin += part.shape[1]
    return levels


def pack(scaled: Tensor, kind: Codes) -> Tensor:
    """Nearest codes of values in [-1, 1]: (U, n) to (U, n * bits / 8) bytes."""
    if kind == "int8":
        return scaled.mul(127).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    levels = normal_float_levels(4 if kind == "nf4" else 3).to(scaled.device)
    codes = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    if kind == "nf4":
        low, high = codes[:, ::2], codes[:, 1::2]
        return (low | high << 4).to(torch.uint8)
    eight = codes.unflatten(1, (-1, 8))
    words = (eight << torch.arange(0, 24, 3, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    return torch.stack([words & 255, words >> 8 & 255, words >> 16], dim=-1).to(torch.uint8).flatten(1)


@cache
def _words(kind: Literal["nf4", "nf3"], device: torch.device) -> Tensor:
    """What every byte (NF4: two values) and every twelve bits (NF3: four) mean: (words, values) float32."""
    bits, per_word = (4, 2) if kind == "nf4" else (3, 4)
    # kept for later calls, which may need gradients
    with torch.inference_mode(False):
        words = torch.arange(2 ** (bits * per_word), device=device)
        digits = words[:, None] >> torch.arange(0, bits * per_word, bits, device=device) & 2**bits - 1
        return normal_float_levels(bits).to(device)[digits].contiguous()


def unpack(packed: Tensor, count: int, kind: Codes) -> Tensor:
    """The levels behind codes: (U, bytes) to (U, count) float32 in [-1, 1], new memory."""
    num_rows = len(packed)
    if kind == "int8":
        return packed[:, :count].view(torch.int8).float().mul_(1 / 127)
    words_to_values = _words(kind, packed.device)
    # one look-up moves all values of a word, as one integer or complex number of their size
    if kind == "nf4":
        words = packed[:, : count // 2].to(torch.int32).reshape(-1)
        pairs = torch.index_select(words_to_values.view(torch.int64).view(-1), 0, words)
        return pairs.view(torch.float32).view(num_rows, count)
    three = packed[:, : count * 3 // 8].unflatten(1, (-1, 3)).to(torch.int32)
    first = three[..., 0] | (three[..., 1] & 15) << 8
    second = three[..., 1] >> 4 | three[..., 2] << 4
    words = torch.stack([first, second], dim=-1).reshape(-1)
    fours = torch.index_select(words_to_values.view(torch.complex64).view(torch.complex128).view(-1), 0, words)
    return fours.view(torch.float32).view(num_rows, count)
