"""What the method is for, on a decoder that looks things up: exact rows bring back what low bits lose."""

from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from tenfold.experiments.model_source import load_source
from tenfold.experiments.specache.recall import DECODER, TRAINED, Recalled, recall_of_seed
from tenfold.experiments.specache.recall_map import recall_map


@pytest.fixture(scope="module")
def decoder():
    return load_source(str(DECODER), dtype="float32").model


@pytest.fixture(scope="module")
def recalled(decoder) -> list[dict[str, Recalled]]:
    """By seed, what each cache recalls."""
    return [dict(recall_of_seed(TRAINED, decoder, seed)) for seed in TRAINED.seeds]


def test_the_weights_are_few_and_the_decoder_looks_symbols_up(decoder, recalled) -> None:
    assert sum(file.stat().st_size for file in DECODER.iterdir()) < 5e6
    assert decoder.config.num_key_value_heads < decoder.config.num_attention_heads
    assert all(seed["full"].tokens > 0.9 for seed in recalled)


@pytest.mark.parametrize("bits", [2, 1])
def test_exact_fetch_then_specache_then_all_others_at_equal_bytes_for_every_seed(recalled, bits: int) -> None:
    for seed in recalled:
        ours = seed[f"specache-{bits}"]
        assert seed["full"].tokens >= seed[f"exact-fetch-{bits}"].tokens - 0.03
        assert 0 < seed[f"exact-fetch-{bits}"].divergence < ours.divergence
        for rival in ("kivi", "window", "h2o"):
            other = seed[f"{rival}-{bits}"]
            assert other.device_bytes <= ours.device_bytes
            assert ours.divergence < other.divergence, rival
            assert ours.tokens > other.tokens, rival


def mean(recalled: list[dict[str, Recalled]], label: str) -> float:
    """Divergence from the full cache, over seeds."""
    return fmean(seed[label].divergence for seed in recalled)


def test_the_gain_over_kivi_grows_from_two_bits_to_one(recalled) -> None:
    two, one = (mean(recalled, f"kivi-{bits}") - mean(recalled, f"specache-{bits}") for bits in (2, 1))
    assert one > two > 0


@pytest.mark.parametrize("bits", [2, 1])
def test_more_rows_lose_less(recalled, bits: int) -> None:
    means = [mean(recalled, f"specache-{bits} k={rows}") for rows in TRAINED.rows]
    assert all(more < fewer for fewer, more in pairwise(means))


def test_the_papers_levels_of_one_bit_lose_less_than_kivis(recalled) -> None:
    assert mean(recalled, "specache-1") < mean(recalled, "specache-1-kivi-levels")
    assert mean(recalled, "kivi-1-centred") < mean(recalled, "kivi-1")


def test_the_map_shows_where_a_window_is_blind(decoder) -> None:
    study, labels = replace(TRAINED, seeds=(0,), num_prompts=8), ("full", "specache-2", "window-2")
    cells = recall_map(decoder, study, num_keys=(22,), num_depths=3, labels=labels)
    found = {(cell.cache, cell.depth): cell.tokens for cell in cells}
    middle = 100 * 10 / 21
    assert sorted({cell.depth for cell in cells}) == pytest.approx([0, middle, 100])
    assert {cell.num_tokens for cell in cells} == {1 + 22 * 8 + 2}
    assert found["window-2", middle] < found["specache-2", middle] - 0.3
    assert found["full", middle] > 0.9
    # the last chain is inside the window, the first is not
    assert found["window-2", 100] > found["window-2", 0] + 0.5
