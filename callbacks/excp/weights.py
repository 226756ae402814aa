"""One weight: its residual against the stored form of the previous save, pruned, quantised, coded (section 3.1)."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .histogram import SMALLEST, Float32, Histogram
from .indices import INDEX_STREAMS, Indices, decode_indices, encode_indices, level_classes, row_length
from .lookup import look_up, squared_norm
from .options import ExCPOptions
from .pruning import weight_threshold
from .quantiser import Quantiser, choose_quantiser

# the histogram tells errors to a fraction of a percent, rounding to half precision adds to them
_MARGINS = (0.995, 0.9, 0.6)
_CLOSE_ENOUGH = 0.985
_SEARCH_STEPS = 8


def as_float32(tensor: Tensor) -> Float32:
    """The values, flat; shares memory with a contiguous float32 tensor on the CPU."""
    return tensor.detach().cpu().to(torch.float32).contiguous().reshape(-1).numpy()


@dataclass
class CodedTensor:
    """A tensor as it is stored.

    Attributes:
        kind: names the decoder.
        streams: parts of the payload by name.
        meta: whatever else the decoder needs, plain data.
        decoded: what the decoder gives, bit for bit.
        indices: level of each element (first moment: of each element that the weight keeps).
        classes: `level_classes` of the indices.
        kept: positions of the indices that are not zero, where they are known.
        bound_bits: order-0 bound of the indices, all else counted as stored.
        squared_error: of decoded against given values.
        squared_step: of given values against those of the last save.
    """

    kind: str
    streams: dict[str, bytes]
    decoded: Tensor
    meta: dict[str, Any] = field(default_factory=dict)
    indices: Indices | None = None
    classes: Indices | None = None
    kept: NDArray[np.int64] | None = None
    bound_bits: float = 0.0
    squared_error: float = 0.0
    squared_step: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size of all streams."""
        return sum(map(len, self.streams.values()))


def side_bits(streams: dict[str, bytes]) -> float:
    """Bits of everything that is not an index."""
    return 8.0 * sum(len(part) for name, part in streams.items() if name not in INDEX_STREAMS)


def _choose(histogram: Histogram, threshold: float, options: ExCPOptions, target: float | None) -> Quantiser | None:
    """Quantiser at the threshold, or at a lower one whose squared error comes close to the target from below."""
    constrained = options.entropy_constrained and options.mode == "sparsity"

    def at(limit: float, bits: int, constrained: bool = constrained) -> Quantiser:
        return choose_quantiser(histogram, num_levels=2**bits - 1, threshold=limit, entropy_constrained=constrained)

    upper = at(threshold, options.weight_bits)
    if target is None or upper.squared_error <= target:
        return upper
    bits = options.weight_bits
    lower = at(SMALLEST, bits, constrained=False)
    while lower.squared_error > target:
        bits += 1
        if bits > 8:
            return None
        lower = at(SMALLEST, bits, constrained=False)
    # false position in the logarithms of threshold and error: errors grow with a power of the threshold
    smallest = float(np.abs(histogram.middle).min()) / 2
    low, high = np.log(max(SMALLEST, smallest, threshold * 2.0**-40)), np.log(threshold)
    below, above = _log_ratio(lower, target), _log_ratio(upper, target)
    best, goal = lower, np.log(_CLOSE_ENOUGH)
    for _ in range(_SEARCH_STEPS):
        if high - low < 2.0**-7:
            break
        share = np.clip((goal / 2 - below) / max(above - below, 1e-9), 0.1, 0.9)
        middle = low + share * (high - low)
        tried = at(_bin_end(float(np.exp(middle))), bits)
        ratio = _log_ratio(tried, target)
        if ratio > 0:
            high, above = middle, ratio
        else:
            best, low, below = tried, middle, ratio
            if ratio >= goal:
                break
    return best


def _log_ratio(quantiser: Quantiser, target: float) -> float:
    # an error of almost nothing must not make the search start there
    return float(np.log(max(quantiser.squared_error / target, 0.05)))


def _bin_end(threshold: float) -> float:
    return float((np.float32(threshold).view(np.uint32) | np.uint32(0xFFFF)).view(np.float32))


def encode_weight(
    weight: Tensor,
    reference: Tensor,
    *,
    second_moment: Float32 | None,
    squared_step: float,
    previous_classes: Indices | None,
    options: ExCPOptions,
) -> CodedTensor | str:
    """Codes a weight against the stored form of the last save.

    Args:
        weight: float32, bfloat16 or float16, any shape.
        reference: same dtype and shape.
        second_moment: Adam's exp_avg_sq, shape (n,), for the threshold of `paper` mode.
        squared_step: squared norm of the weight's change since the last save, for error control.
        previous_classes: `level_classes` of the last save's indices, shape (n,).
        options: settings.

    Returns:
        the coded weight, or why it must be stored exactly.
    """
    values, base = as_float32(weight), as_float32(reference)
    residual = values - base
    histogram = Histogram.of(residual)
    if not histogram.finite:
        return "not finite"
    target = None if options.error_target is None else options.error_target**2 * squared_step
    threshold = weight_threshold(residual, histogram, second_moment, options)
    for margin in _MARGINS:
        quantiser = _choose(histogram, threshold, options, None if target is None else margin * target)
        if quantiser is None:
            return "error target out of reach"
        indices = quantiser.indices(residual)
        codebook = quantiser.codebook(residual, indices)
        decoded = _add(base, codebook, indices, weight)
        error = squared_norm(as_float32(decoded) - values)
        if target is None or error <= target:
            break
    else:
        return "error target out of reach"
    kept = np.flatnonzero(indices != 0)
    streams, context, bound = encode_indices(
        indices,
        alphabet=len(codebook),
        backend=options.backend,
        classes=previous_classes if options.contexts else None,
        row=row_length(tuple(weight.shape)) if options.contexts else 0,
        kept=kept,
    )
    streams["codebook"] = codebook.astype("<f4").tobytes()
    return CodedTensor(
        kind="residual",
        streams=streams,
        decoded=decoded,
        meta={"context": context},
        indices=indices,
        classes=level_classes(indices, codebook),
        kept=kept,
        bound_bits=bound + side_bits(streams),
        squared_error=error,
        squared_step=squared_step,
    )


def _add(base: Float32, codebook: Float32, indices: Indices, like: Tensor) -> Tensor:
    # one IEEE addition and one rounding: the same bits on every machine
    total = look_up(codebook, indices)
    total += base
    return torch.from_numpy(total).reshape(like.shape).to(like.dtype)


def decode_weight(
    streams: dict[str, memoryview], meta: dict[str, Any], reference: Tensor, previous_classes: Indices | None
) -> CodedTensor:
    """The stored form of a weight; arguments as in `encode_weight`.

    Raises:
        ValueError: the streams do not fit together.
    """
    codebook = np.frombuffer(streams["codebook"], "<f4").astype(np.float32)
    indices = decode_indices(
        streams,
        meta["context"],
        length=reference.numel(),
        classes=previous_classes,
        row=row_length(tuple(reference.shape)),
    )
    decoded = _add(as_float32(reference), codebook, indices, reference)
    return CodedTensor("residual", {}, decoded, indices=indices, classes=level_classes(indices, codebook))
