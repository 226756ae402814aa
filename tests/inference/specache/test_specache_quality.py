"""What the method is for: at equal device bytes, exact rows bring decoding closer to the full cache."""

from itertools import pairwise

import pytest
import torch
from tenfold.inference.specache import CacheShape, SpeCache, decode_logits

SEEDS = (0, 1, 2)
ROWS = (0, 16, 32, 64, 128, 256)
SMALL = {"residual_length": 16, "group_size": 16}


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    p, q = full.double().log_softmax(-1), other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.fixture(scope="module")
def measured(tiny_llama, prompt) -> dict[tuple, list[float]]:
    """Divergence from the full cache by method, bits and rows, one number per seed."""
    table: dict[tuple, list[float]] = {}
    for seed in SEEDS:
        model, ids = tiny_llama(seed=seed), prompt(batch=4, length=256, seed=seed)
        given = model.generate(ids, max_new_tokens=20, do_sample=False)[:, 256:]
        full = decode_logits(model, ids, given, cache=SpeCache(model.config, residual_length=512))

        def measure(key: tuple, **options) -> None:
            cache = SpeCache(model.config, **{**SMALL, **options})  # noqa: B023
            found = decode_logits(model, ids, given, cache=cache)  # noqa: B023
            table.setdefault(key, []).append(divergence(full, found))  # noqa: B023

        for bits in (2, 1):
            for rows in ROWS:
                measure(("specache", bits, rows), bits=bits, top_k=rows)
            measure(("exact", bits), bits=bits, top_k=64, mode="exact_fetch")
            # the bytes of 64 exact rows spent on a longer residual
            measure(("kivi", bits), bits=bits, mode="low_bit_only", residual_length=16 + 64)
        measure(("kivi levels", 1), bits=1, mode="low_bit_only", residual_length=16 + 64, rule="kivi")
    return table


@pytest.mark.parametrize("bits", [2, 1])
def test_exact_fetch_beats_specache_beats_kivi_at_equal_bytes_for_every_seed(measured, bits: int) -> None:
    for exact, ours, kivi in zip(
        measured["exact", bits], measured["specache", bits, 64], measured["kivi", bits], strict=True
    ):
        assert 0 < exact < ours < kivi


def test_the_bytes_of_that_comparison_are_equal(tiny_llama) -> None:
    config = tiny_llama().config
    shape = CacheShape.of(config, torch.float16)
    for bits in (1, 2):
        ours = SpeCache(config, bits=bits, top_k=64, **SMALL).options
        kivi = SpeCache(config, bits=bits, mode="low_bit_only", residual_length=80, group_size=16).options
        # the rows' indices, and tokens that are low-bit here and exact there
        assert shape.device_bytes(ours, 1, 4096) == pytest.approx(shape.device_bytes(kivi, 1, 4096), rel=0.03)


@pytest.mark.parametrize("bits", [2, 1])
def test_more_rows_are_never_worse(measured, bits: int) -> None:
    means = [sum(measured["specache", bits, rows]) / len(SEEDS) for rows in ROWS]
    assert all(more < fewer for fewer, more in pairwise(means))
    # 256 rows are all the low-bit tokens but those that join during decoding
    assert means[-1] < means[0] / 100


def test_the_gain_grows_from_two_bits_to_one(measured) -> None:
    for two, one in zip(
        zip(measured["kivi", 2], measured["specache", 2, 64], strict=True),
        zip(measured["kivi", 1], measured["specache", 1, 64], strict=True),
        strict=True,
    ):
        assert one[0] - one[1] > 2 * (two[0] - two[1])


def test_the_papers_one_bit_levels_beat_kivis(measured) -> None:
    for centred, extremes in zip(measured["kivi", 1], measured["kivi levels", 1], strict=True):
        assert centred < 0.7 * extremes
