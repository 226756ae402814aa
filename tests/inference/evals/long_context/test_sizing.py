"""The most pieces that fit, against counting up one by one."""

from random import Random
from types import SimpleNamespace

import pytest
from tenfold.inference.evals.long_context.sizing import largest_that_fits


@pytest.mark.parametrize("seed", range(40))
def test_most_pieces_that_fit(seed: int) -> None:
    draw = Random(seed)
    smallest, largest = draw.choice([1, 5, 60]), draw.choice([None, 80, 400])
    sizes = [draw.choice([1, 1, 2, 30]) if seed % 2 else draw.randint(5, 9) for _ in range(6000)]
    totals = [100]
    for size in sizes:
        totals.append(totals[-1] + size)
    length = totals[smallest] + 20 + draw.randint(0, 3000)
    calls = []

    def make(pieces: int) -> int:
        calls.append(pieces)
        return pieces

    found = largest_that_fits(
        make,
        str,
        fitter=SimpleNamespace(count=lambda text: totals[int(text)]),
        length=length,
        max_new_tokens=20,
        smallest=smallest,
        largest=largest,
        what="x",
    )
    expected = smallest
    while totals[expected + 1] + 20 <= length and expected != largest:
        expected += 1
    assert found == expected
    assert len(calls) <= 24
    assert largest is None or max(calls) <= largest


def test_a_template_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="thing: length 50 is smaller than the template, which needs 61 tokens"):
        largest_that_fits(
            lambda pieces: pieces,
            str,
            fitter=SimpleNamespace(count=lambda text: 40 + int(text)),
            length=50,
            max_new_tokens=20,
            smallest=1,
            what="thing",
        )
