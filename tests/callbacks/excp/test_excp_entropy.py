"""Symbol streams: exact round trips, size against the order-0 entropy computed another way."""

import sys
from collections import Counter
from math import log2

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenfold.callbacks.excp import entropy
from tenfold.callbacks.excp.entropy import decode_symbols, encode_symbols, entropy_bits

BACKENDS = ["rans", "zstd", "lzma"]


def shannon_bits(symbols: np.ndarray) -> float:
    counts = Counter(symbols.tolist())
    return sum(count * log2(len(symbols) / count) for count in counts.values())


def skewed(length: int, alphabet: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.minimum(generator.geometric(0.6, length) - 1, alphabet - 1).astype(np.uint8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alphabet", [2, 4, 16, 17, 256])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 4097])
def test_round_trip(backend: str, alphabet: int, length: int) -> None:
    symbols = np.random.default_rng(length).integers(0, alphabet, length).astype(np.uint8)
    data = encode_symbols(symbols, alphabet=alphabet, backend=backend)
    np.testing.assert_array_equal(decode_symbols(data), symbols)


@given(
    st.lists(st.integers(0, 15), max_size=300),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.sampled_from(BACKENDS),
)
@settings(max_examples=60, deadline=None)
def test_any_symbols_and_contexts_round_trip(values: list[int], contexts: int, seed: int, backend: str) -> None:
    symbols = np.array(values, dtype=np.uint8)
    context = np.random.default_rng(seed).integers(0, contexts, len(values)).astype(np.uint8)
    data = encode_symbols(symbols, alphabet=16, backend=backend, context=context, num_contexts=contexts)
    np.testing.assert_array_equal(decode_symbols(data, context=context), symbols)


def test_several_segments_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entropy, "SEGMENT_SYMBOLS", 1000)
    symbols, context = skewed(4321, 8), skewed(4321, 3, seed=1)
    data = encode_symbols(symbols, alphabet=8, context=context, num_contexts=3)
    np.testing.assert_array_equal(decode_symbols(data, context=context), symbols)


def test_entropy_is_shannons() -> None:
    symbols = skewed(10_000, 16)
    assert entropy_bits(np.bincount(symbols, minlength=16)) == pytest.approx(shannon_bits(symbols), rel=1e-12)
    assert entropy_bits(np.zeros(4, np.int64)) == 0.0


def test_rans_is_within_a_tenth_of_a_percent_of_order_0_entropy() -> None:
    symbols = skewed(1_000_000, 16)
    size = 8 * len(encode_symbols(symbols, alphabet=16))
    bound = shannon_bits(symbols)
    assert bound <= size < 1.001 * bound


def test_context_reaches_conditional_entropy() -> None:
    generator = np.random.default_rng(0)
    context = generator.integers(0, 2, 500_000).astype(np.uint8)
    symbols = np.where(context == 1, skewed(len(context), 16), 0).astype(np.uint8)
    size = 8 * len(encode_symbols(symbols, alphabet=16, context=context, num_contexts=2))
    conditional = shannon_bits(symbols[context == 1])
    assert conditional <= size < 1.002 * conditional
    assert conditional < 0.8 * shannon_bits(symbols)


@pytest.mark.parametrize("backend", ["zstd", "lzma"])
def test_dictionary_coders_stay_behind_rans(backend: str) -> None:
    symbols = skewed(200_000, 16)
    assert len(encode_symbols(symbols, alphabet=16)) < len(encode_symbols(symbols, alphabet=16, backend=backend))


def test_incompressible_symbols_cost_their_own_size() -> None:
    symbols = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    for backend in BACKENDS:
        assert len(encode_symbols(symbols, alphabet=256, backend=backend)) < 100_000 + 64


def test_constant_symbols_cost_nothing() -> None:
    for backend in BACKENDS:
        assert len(encode_symbols(np.full(10**6, 3, np.uint8), alphabet=16, backend=backend)) < 32


@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_is_an_error_or_changes_symbols_but_never_crashes(backend: str) -> None:
    symbols = skewed(3000, 16)
    data = encode_symbols(symbols, alphabet=16, backend=backend)
    for position in range(0, len(data), 7):
        broken = bytearray(data)
        broken[position] ^= 0x55
        try:
            decode_symbols(bytes(broken))
        except ValueError:
            continue
    with pytest.raises(ValueError, match="damaged"):
        decode_symbols(data[:3])


@pytest.mark.parametrize(("backend", "module"), [("rans", "constriction"), ("zstd", "zstandard")])
def test_missing_package_is_named_when_it_is_needed(backend: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{module}.*pip install 'tenfold\[excp\]'"):
        encode_symbols(skewed(1000, 16), alphabet=16, backend=backend)


def test_tables_are_integers_that_no_library_of_mathematics_can_change() -> None:
    # correctly rounded by exact integer arithmetic: nearest n with n**8 closest to 2**(192 - i)
    for eighth, value in enumerate(entropy._EIGHTHS.tolist()):
        assert (2 * value - 1) ** 8 <= 2 ** (192 - eighth + 8) <= (2 * value + 1) ** 8
