"""Non-uniform scalar quantisation: one-dimensional k-means on a histogram, with or without a price on bits."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .histogram import NUM_BINS, Float32, Float64, Histogram, bins_of
from .lookup import look_up

_ITERATIONS = 40
_FEW_BINS = 16
# of levels at the price that a threshold implies; 1.8 to 2 for normal, uniform and Laplace distributions
_WIDTH_OVER_THRESHOLD = 1.9


@dataclass(frozen=True)
class Quantiser:
    """Cells of neighbouring bins. Index 0 is zero; index i > 0 is the i-th smallest level.

    Attributes:
        labels: index of the values of each of the 65,536 bins, uint8.
        levels: mean of each cell but zero's, as the histogram tells it, shape (levels,).
        num_bins: occupied bins of each of these cells, shape (levels,).
        threshold: magnitudes up to it become zero.
        squared_error: over all values, as the histogram tells it.
        bits: order-0 entropy of all indices, as the histogram tells it.
    """

    labels: NDArray[np.uint8]
    levels: Float64
    num_bins: NDArray[np.int64]
    threshold: float
    squared_error: float
    bits: float

    def indices(self, values: Float32) -> NDArray[np.uint8]:
        """Index of each value, same shape (n,)."""
        indices = look_up(self.labels, bins_of(values))
        if _divides(self.threshold):
            indices[np.abs(values) <= np.float32(self.threshold)] = 0
        return indices

    def codebook(self, values: Float32, indices: NDArray[np.uint8]) -> Float32:
        """Value of each index: zero, then the mean of each cell's values, shape (levels + 1,).

        A cell of few bins may hold few different values, and gets their exact mean. The mean of many bins' middles is
        as good as the exact one.
        """
        means = np.concatenate([[0.0], self.levels])
        for index in 1 + np.flatnonzero(self.num_bins < _FEW_BINS):
            found = values[indices == index]
            if len(found):
                means[index] = found.mean(dtype=np.float64)
        return means.astype(np.float32)


def _divides(threshold: float) -> bool:
    """Whether a threshold lies inside a bin rather than at its end."""
    return int(np.float32(threshold).view(np.uint32)) & 0xFFFF != 0xFFFF


def _bin_start(threshold: float) -> float:
    return float(np.uint32(int(np.float32(threshold).view(np.uint32)) & 0xFFFF0000).view(np.float32))


class _Cells:
    """Contiguous ranges of bins between `edges`; one of them may be zero's."""

    def __init__(self, histogram: Histogram, threshold: float | None, *, logarithmic: bool) -> None:
        middle = histogram.log_middle if logarithmic else histogram.middle
        self.middle = middle
        sums = histogram.log_sums if logarithmic else histogram.sums
        self.mass, self.first, self.second, self.spread = sums
        self.num_values = histogram.num_values
        self.num_zeros = float(histogram.num_values - self.mass[-1])
        self.pinned: tuple[int, int] | None = None
        if threshold is not None:
            # a bin that the threshold divides is kept; `Quantiser.indices` looks at its values one by one
            limit = _bin_start(threshold) if _divides(threshold) else threshold
            self.pinned = (
                int(np.searchsorted(middle, -limit, side="left")),
                int(np.searchsorted(middle, limit, side="right")),
            )
        self.edges = np.empty(0, np.int64)
        self.zero = -1

    def start_evenly(self, num_levels: int, threshold: float) -> bool:
        """Cells of equal width outside zero's, as wide as they are at the optimum with a price on bits.

        Returns whether the cells reach far enough: with a low threshold most values would lie in the outermost ones.
        """
        assert self.pinned is not None
        left, right = self.pinned
        below = num_levels // 2 if right < len(self.middle) else num_levels
        above = num_levels - below if left else num_levels
        steps = threshold * (1 + _WIDTH_OVER_THRESHOLD * np.arange(1, max(below, above, 1)))
        lower = np.searchsorted(self.middle, -steps[: max(below - 1, 0)][::-1], side="left")
        upper = np.searchsorted(self.middle, steps[: max(above - 1, 0)], side="right")
        lower = np.unique(np.concatenate([[0], lower[lower < left], [left]]))
        upper = np.unique(np.concatenate([[right], upper[upper > right], [len(self.middle)]]))
        self.zero = len(lower) - 1
        self.edges = np.concatenate([lower, upper]).astype(np.int64)
        inside = self.mass[upper[-2]] - self.mass[right] if len(upper) > 2 else 0.0
        inside += self.mass[left] - self.mass[lower[1]] if len(lower) > 2 else 0.0
        kept = self.mass[left] + self.mass[-1] - self.mass[right]
        return bool(inside > kept / 2) or len(upper) + len(lower) <= 4

    def start(self, num_levels: int) -> None:
        """Divides the bins outside zero's cell evenly in `spread`, at least one cell a side."""
        total = len(self.middle)
        if self.pinned is None:
            self.edges = self._divide(0, total, num_levels)
            return
        left, right = self.pinned
        share = self.spread[left] + self.spread[-1] - self.spread[right]
        below = round(num_levels * self.spread[left] / share) if share else 0
        if left and right < total:
            below = min(max(below, 1, num_levels - (total - right)), num_levels - 1, left)
        lower, upper = self._divide(0, left, below), self._divide(right, total, num_levels - below)
        self.zero = len(lower) - 1
        self.edges = np.concatenate([lower, upper])

    def _divide(self, start: int, stop: int, num_cells: int) -> NDArray[np.int64]:
        if stop - start <= max(num_cells, 1):
            return np.arange(start, stop + 1)
        targets = np.linspace(self.spread[start], self.spread[stop], max(num_cells, 1) + 1)[1:-1]
        inner = np.searchsorted(self.spread[start : stop + 1], targets) + start
        return np.unique(np.concatenate([[start], inner, [stop]])).astype(np.int64)

    def statistics(self) -> tuple[Float64, Float64, Float64]:
        """Mass, mean and bits of each cell. Empty cells are forgotten, zero's excepted."""
        edge_mass = self.mass[self.edges]
        mass = edge_mass[1:] - edge_mass[:-1]
        alive = mass > 0
        if self.zero >= 0:
            alive[self.zero] = True
        if not alive.all():
            self.edges = np.append(self.edges[:-1][alive], self.edges[-1])
            self.zero = int(alive[: self.zero].sum()) if self.zero >= 0 else -1
            mass = mass[alive]
        edge_first = self.first[self.edges]
        mean = (edge_first[1:] - edge_first[:-1]) / np.maximum(mass, 1)
        if self.zero >= 0:
            mean[self.zero] = 0.0
            mass[self.zero] += self.num_zeros
        bits = np.log2(max(self.num_values, 1)) - np.log2(np.maximum(mass, 1))
        return mass, mean, bits

    def price(self, mean: Float64, bits: Float64, threshold: float) -> float:
        """Squared error per bit at which a value at the threshold may as well be zero as the nearest level."""
        prices = []
        for cell in (self.zero - 1, self.zero + 1):
            if 0 <= cell < len(mean):
                gain = abs(mean[cell]) * (2 * threshold - abs(mean[cell]))
                extra = bits[cell] - bits[self.zero]
                prices.append(gain / extra if gain > 0 and extra > 0 else 0.0)
        return float(np.mean(prices)) if prices else 0.0

    def move(self, mean: Float64, bits: Float64, price: float) -> bool:
        """One round of Lloyd's algorithm; returns whether an edge moved."""
        if len(mean) < 2:
            return False
        border = (mean[1:] + mean[:-1]) / 2
        if price:
            border += price * (bits[1:] - bits[:-1]) / (2 * (mean[1:] - mean[:-1]))
        # a border beyond a cell's mean is right: that cell costs more bits than it saves error, and dies
        edges = self.edges.copy()
        edges[1:-1] = np.searchsorted(self.middle, border, side="right")
        if self.zero >= 0:
            left, right = self.zero, self.zero + 1
            edges[left], edges[right] = self.edges[left], self.edges[right]
            np.minimum(edges[:left], edges[left], out=edges[:left])
        edges = np.minimum(np.maximum.accumulate(edges), self.edges[-1])
        moved = bool((edges != self.edges).any())
        self.edges = edges
        return moved


def choose_quantiser(
    histogram: Histogram,
    *,
    num_levels: int,
    threshold: float | None = None,
    entropy_constrained: bool = False,
    logarithmic: bool = False,
    iterations: int = _ITERATIONS,
) -> Quantiser:
    """Clusters values into at most `num_levels` levels besides zero.

    Plain clustering minimises the squared error by Lloyd's algorithm from a start at the optimal density. With
    `entropy_constrained` each level also costs its bits (Chou, Lookabaugh and Gray, 1989), at the price at which the
    given threshold is the best one. Borders of cells lie on borders of bins, within 0.4 % of where they should.

    Args:
        histogram: of the values.
        num_levels: most levels, zero apart; 1 to 255.
        threshold: magnitudes up to it become zero; None keeps every value but zeros.
        entropy_constrained: whether bits have a price; needs a threshold.
        logarithmic: minimise the error of the logarithm; all values must be positive or zero.
        iterations: most rounds of Lloyd's algorithm.
    """
    cells = _Cells(histogram, threshold, logarithmic=logarithmic)
    middle = cells.middle
    priced = entropy_constrained and threshold is not None
    outside = 0 if cells.pinned is None else len(middle) - cells.pinned[1] + cells.pinned[0]
    evenly = priced and threshold is not None and outside > num_levels
    if not (evenly and threshold is not None and cells.start_evenly(num_levels, threshold)):
        cells.start(num_levels)
    mass, mean, bits = cells.statistics()
    for _ in range(iterations):
        price = cells.price(mean, bits, threshold) if priced and threshold is not None else 0.0
        if not cells.move(mean, bits, price):
            break
        mass, mean, bits = cells.statistics()
    zero = cells.zero
    levels = np.delete(mean, zero) if zero >= 0 else mean
    squares = np.diff(cells.second[cells.edges])
    error = np.maximum(squares - mass * mean**2, 0) if zero < 0 else squares - np.where(
        np.arange(len(mean)) == zero, 0, mass * mean**2
    )  # fmt: skip
    labels = np.zeros(NUM_BINS, dtype=np.uint8)
    cell_labels = np.arange(1, len(mean) + 1)
    if zero >= 0:
        cell_labels = np.where(np.arange(len(mean)) < zero, cell_labels, cell_labels - 1)
        cell_labels[zero] = 0
    labels[histogram.bins] = np.repeat(cell_labels, np.diff(cells.edges))
    return Quantiser(
        labels,
        np.exp2(levels) if logarithmic else levels,
        np.delete(np.diff(cells.edges), zero) if zero >= 0 else np.diff(cells.edges),
        0.0 if threshold is None else threshold,
        float(np.maximum(error, 0).sum()),
        float((mass * bits).sum()) + (0.0 if zero >= 0 else cells.num_zeros * _zero_bits(cells)),
    )


def _zero_bits(cells: _Cells) -> float:
    return float(np.log2(cells.num_values / cells.num_zeros)) if cells.num_zeros else 0.0
