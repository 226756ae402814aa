"""Float32 values counted in logarithmic bins: what thresholds and levels are chosen on, whatever a tensor's size.

A bin is all values that share the upper half of their 32 bits: sign, exponent and 7 bits of the mantissa, so it is less
than 0.8 % wide. Everything computed from the counts is the same for any number of threads.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

NUM_BINS = 1 << 16
_INFINITE = 0x7F80
_BLOCK = 1 << 19
# values up to here share a bin with zero and count as zero; the next float32 number is 2**-133
SMALLEST = float(np.uint32((1 << 16) - 1).view(np.float32))


def bins_of(values: Float32) -> NDArray[np.uint16]:
    """Number of the bin of each value: the upper 16 of its 32 bits. A view, not a copy."""
    return values.view(np.uint16)[1 if np.little_endian else 0 :: 2]


def _edges(bins: NDArray[np.int64]) -> Float64:
    return (bins << 16).astype(np.uint32).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Histogram:
    """Occupied bins in the order of their values; the bins of zero are left out.

    Attributes:
        bins: number of each bin, shape (bins,).
        middle: the value that stands for each bin, shape (bins,).
        width: extent of each bin, shape (bins,).
        count: values in each bin, shape (bins,).
        num_values: all values, those that count as zero included.
        finite: whether there was neither NaN nor infinity.
    """

    bins: NDArray[np.int64]
    middle: Float64
    width: Float64
    count: NDArray[np.int64]
    num_values: int
    finite: bool

    @cached_property
    def log_middle(self) -> Float64:
        """Logarithm of `middle` to the base 2; all values must be positive."""
        return np.log2(self.middle)

    @cached_property
    def sums(self) -> tuple[Float64, Float64, Float64, Float64]:
        """Of the bins below each bin's edge: count, values, squares, and density to the power 1/3 over the width."""
        return self._sums(self.middle)

    @cached_property
    def log_sums(self) -> tuple[Float64, Float64, Float64, Float64]:
        """`sums` of `log_middle`."""
        return self._sums(self.log_middle)

    def _sums(self, middle: Float64) -> tuple[Float64, Float64, Float64, Float64]:
        weight = self.count.astype(np.float64)
        # density to the power 1/3: how close levels lie that minimise the error (Panter and Dite, 1951)
        distance = np.gradient(middle) if len(middle) > 1 else np.ones(len(middle))
        first, second, spread = (
            np.concatenate([[0.0], np.cumsum(terms)])
            for terms in (weight * middle, weight * middle**2, np.cbrt(weight * distance**2))
        )
        return np.concatenate([[0.0], np.cumsum(weight)]), first, second, spread

    @classmethod
    def of(cls, values: Float32) -> "Histogram":
        """Counts float32 values, shape (n,)."""
        counts = np.zeros(NUM_BINS, dtype=np.int64)
        numbers = bins_of(values)
        # bincount widens its argument eightfold: blocks keep that in a core's cache
        for start in range(0, len(numbers), _BLOCK):
            counts += np.bincount(numbers[start : start + _BLOCK], minlength=NUM_BINS)
        # exponents of all ones are infinities and NaN
        finite = not (counts[_INFINITE:0x8000].any() or counts[0x8000 + _INFINITE :].any())
        positive = 1 + np.flatnonzero(counts[1:_INFINITE])
        negative = 0x8001 + np.flatnonzero(counts[0x8001 : 0x8000 + _INFINITE])
        bins = np.concatenate([negative[::-1], positive])
        low = _edges(bins)
        # the bin after the last finite one begins at infinity
        last = (bins & 0x7FFF) == _INFINITE - 1
        high = np.where(last, np.sign(low) * 2.0**128, _edges(np.where(last, bins, bins + 1)))
        return cls(bins, (low + high) / 2, np.abs(high - low), counts[bins], len(values), finite)

    def threshold(self, zero_fraction: float) -> float:
        """Magnitude up to which at least `zero_fraction` (0-1) of the values lie.

        It is the last float32 number of a bin and exceeds the exact quantile by less than that bin's width.
        """
        counts = np.zeros(0x8000, dtype=np.int64)
        np.add.at(counts, self.bins & 0x7FFF, self.count)
        counts[0] = self.num_values - int(self.count.sum())
        bin_number = int(np.searchsorted(np.cumsum(counts), zero_fraction * self.num_values))
        return float(np.uint32((min(bin_number, _INFINITE - 1) << 16) | 0xFFFF).view(np.float32))
