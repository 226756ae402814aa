"""Levels against brute force and other formulations of one-dimensional k-means."""

import itertools

import numpy as np
import pytest
from sklearn.cluster import KMeans
from tenfold.callbacks.excp.histogram import SMALLEST, Histogram
from tenfold.callbacks.excp.quantiser import Quantiser, choose_quantiser

BIN = 2.0**-7


def quantise(values: np.ndarray, **options: object) -> tuple[Quantiser, np.ndarray, np.ndarray]:
    quantiser = choose_quantiser(Histogram.of(values), **options)  # type: ignore[arg-type]
    indices = quantiser.indices(values)
    return quantiser, indices, quantiser.codebook(values, indices)


def entropy(indices: np.ndarray) -> float:
    share = np.bincount(indices) / len(indices)
    return float(-(share[share > 0] * np.log2(share[share > 0])).sum())


def best_error(values: np.ndarray, clusters: int) -> float:
    """Every division of the sorted values into runs."""
    ordered = np.sort(values.astype(np.float64))
    errors = []
    for cuts in itertools.combinations(range(1, len(ordered)), clusters - 1):
        runs = np.split(ordered, cuts)
        errors.append(sum(((run - run.mean()) ** 2).sum() for run in runs))
    return min(errors)


@pytest.mark.parametrize("seed", range(8))
def test_close_to_the_best_division_of_few_values(seed: int) -> None:
    values = np.random.default_rng(seed).laplace(size=14).astype(np.float32)
    _, indices, codebook = quantise(values, num_levels=4)
    error = ((codebook[indices].astype(np.float64) - values) ** 2).sum()
    # a local optimum, as every Lloyd iteration's; bins are 0.8 % wide
    assert best_error(values, 4) * 0.999 <= error <= 1.6 * best_error(values, 4)


@pytest.mark.parametrize("shape", ["normal", "laplace", "uniform"])
def test_as_good_as_scikit_learn(shape: str) -> None:
    values = (getattr(np.random.default_rng(0), shape)(size=20_000) * 1e-4).astype(np.float32)
    _, indices, codebook = quantise(values, num_levels=15)
    error = ((codebook[indices].astype(np.float64) - values) ** 2).sum()
    theirs = KMeans(15, n_init=3, random_state=0).fit(values.astype(np.float64)[:, None]).inertia_
    assert error < 1.02 * theirs


def test_levels_are_means_of_their_cells_and_cells_are_nearest() -> None:
    values = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)
    _, indices, codebook = quantise(values, num_levels=7)
    assert sorted(set(indices.tolist())) == list(range(1, 8))
    for index in range(1, 8):
        assert codebook[index] == pytest.approx(values[indices == index].astype(np.float64).mean(), rel=5e-4)
    nearest = np.abs(values[:, None] - codebook[None, 1:]).min(1)
    assert (np.abs(values - codebook[indices]) <= nearest + BIN * np.abs(values)).all()


def test_threshold_makes_zeros_and_error_stays_within_half_a_gap() -> None:
    values = np.random.default_rng(2).laplace(size=50_000).astype(np.float32)
    threshold = Histogram.of(values).threshold(0.8)
    _, indices, codebook = quantise(values, num_levels=15, threshold=threshold)
    np.testing.assert_array_equal(indices == 0, np.abs(values) <= threshold)
    assert 0.8 <= (indices == 0).mean() < 0.81
    kept = indices > 0
    levels = codebook[1:]
    inside = np.abs(values) <= np.abs(levels).max()
    for side in (levels[levels < 0], levels[levels > 0]):
        gap = np.diff(side).max() / 2
        mine = kept & inside & np.isin(codebook[indices], side)
        edge = np.abs(side).min() - threshold
        assert (np.abs(codebook[indices] - values)[mine] <= max(gap, edge) + BIN * np.abs(values[mine])).all()


@pytest.mark.parametrize("threshold", [0.3337, 1.0, 1e-3])
def test_threshold_inside_a_bin_is_exact(threshold: float) -> None:
    values = np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    _, indices, _ = quantise(values, num_levels=15, threshold=float(np.float32(threshold)))
    np.testing.assert_array_equal(indices == 0, np.abs(values) <= np.float32(threshold))


def test_few_distinct_values_are_exact() -> None:
    distinct = np.array([-3.25, -1e-6, 0.0, 7e-9, 0.1, 12345.678], dtype=np.float32)
    values = np.random.default_rng(4).choice(distinct, 5000)
    _, indices, codebook = quantise(values, num_levels=15, threshold=SMALLEST)
    np.testing.assert_array_equal(codebook[indices], values)


@pytest.mark.parametrize("value", [0.0, -0.0, 2.5, -1e-30, 1e-42, np.finfo(np.float32).max])
def test_constants(value: float) -> None:
    values = np.full(1000, value, dtype=np.float32)
    _, indices, codebook = quantise(values, num_levels=15, threshold=SMALLEST)
    if abs(value) <= SMALLEST:
        assert not indices.any()
    else:
        np.testing.assert_array_equal(codebook[indices], values)


@pytest.mark.parametrize("zero_ratio", [0.7, 0.85, 0.95])
@pytest.mark.parametrize("shape", ["normal", "laplace"])
def test_price_on_bits_saves_a_fifth_at_equal_error(shape: str, zero_ratio: float) -> None:
    values = getattr(np.random.default_rng(5), shape)(size=400_000).astype(np.float32)
    histogram = Histogram.of(values)

    def rate(fraction: float, constrained: bool) -> tuple[float, float]:
        _, indices, codebook = quantise(
            values, num_levels=15, threshold=histogram.threshold(fraction), entropy_constrained=constrained
        )
        return entropy(indices), float(((codebook[indices] - values) ** 2).mean(dtype=np.float64))

    bits, error = rate(zero_ratio, True)
    # plain clustering at a threshold with at least the same error
    plain = [rate(fraction, False) for fraction in np.linspace(zero_ratio, 0.99, 30)]
    plain_bits = min(b for b, e in plain if e <= error * 1.02)
    assert bits < 0.85 * plain_bits


def test_gaussian_is_within_a_quarter_bit_of_the_rate_distortion_bound() -> None:
    values = np.random.default_rng(6).standard_normal(400_000).astype(np.float32)
    histogram = Histogram.of(values)
    for fraction in (0.3, 0.5, 0.7, 0.9):
        _, indices, codebook = quantise(
            values, num_levels=15, threshold=histogram.threshold(fraction), entropy_constrained=True
        )
        error = ((codebook[indices] - values) ** 2).mean(dtype=np.float64)
        bound = -0.5 * np.log2(error)
        assert bound < entropy(indices) < bound + 0.27


def test_predictions_agree_with_what_comes_out() -> None:
    values = np.random.default_rng(7).laplace(size=200_000).astype(np.float32)
    threshold = Histogram.of(values).threshold(0.8)
    quantiser, indices, codebook = quantise(values, num_levels=15, threshold=threshold, entropy_constrained=True)
    error = ((codebook[indices] - values).astype(np.float64) ** 2).sum()
    assert quantiser.squared_error == pytest.approx(error, rel=2e-3)
    assert quantiser.bits == pytest.approx(entropy(indices) * len(values), rel=1e-6)


def test_logarithmic_levels_bound_relative_errors() -> None:
    values = np.exp2(np.random.default_rng(8).uniform(-30, -14, 100_000)).astype(np.float32)
    quantiser, indices, _ = quantise(values, num_levels=16, logarithmic=True)
    ratio = quantiser.levels[indices - 1] / values
    assert len(quantiser.levels) == 16
    # 16 octaves in 16 levels: half an octave either way
    assert np.abs(np.log2(ratio)).max() < 0.6


def test_histogram_counts_and_finds_infinities() -> None:
    values = np.array([0.0, -0.0, 1.0, 1.001, -2.0, 3e-45], dtype=np.float32)
    histogram = Histogram.of(values)
    assert histogram.finite
    assert histogram.count.tolist() == [1, 2]
    assert histogram.num_values == 6
    assert histogram.middle[0] < 0 < histogram.middle[1]
    for bad in (np.inf, -np.inf, np.nan):
        assert not Histogram.of(np.append(values, np.float32(bad))).finite


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_threshold_exceeds_the_quantile_by_less_than_a_bin(fraction: float) -> None:
    values = np.random.default_rng(9).standard_normal(10_001).astype(np.float32)
    threshold = Histogram.of(values).threshold(fraction)
    exact = np.quantile(np.abs(values), fraction, method="inverted_cdf")
    assert exact <= threshold <= exact * (1 + BIN) or (fraction == 0 and threshold == SMALLEST)
