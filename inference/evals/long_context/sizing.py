"""Makes generated prompts as long as asked for: the most pieces of a haystack that fit."""

import sys
from collections.abc import Callable
from typing import TypeVar

from .prompts import PromptFitter

Made = TypeVar("Made")


def largest_that_fits(
    make: Callable[[int], Made],
    text_of: Callable[[Made], str],
    *,
    fitter: PromptFitter,
    length: int,
    max_new_tokens: int,
    smallest: int,
    what: str,
    largest: int | None = None,
) -> Made:
    """The sample with the most pieces whose prompt and answer have at most `length` tokens.

    Args:
        make: Makes a sample of so many pieces; the same number gives the same sample.
        text_of: Its whole prompt, chat template included.
        fitter: Counts tokens.
        length: Tokens of prompt and answer.
        max_new_tokens: Room for the answer.
        smallest: Fewest pieces that make sense.
        what: What is made, for the message.
        largest: Most pieces that there are.

    Raises:
        ValueError: Not even the smallest sample fits.
    """

    def tokens(made: Made) -> int:
        return fitter.count(text_of(made)) + max_new_tokens

    best = make(smallest)
    if (needed := tokens(best)) > length:
        raise ValueError(
            f"{what}: length {length} is smaller than the template, which needs {needed} tokens with its answer: "
            "give longer --lengths"
        )
    low, high = smallest, smallest + 1
    # tokens grow with the pieces almost in a line, so the guess along it is close; every other step halves, so that a
    # bad line costs little
    low, low_tokens, high, high_tokens = smallest, needed, (largest or sys.maxsize) + 1, 0
    guess = 2 * smallest + 8
    by_line = True
    while high - low > 1:
        # never far beyond what was seen: counting a text that is much too long costs most
        guess = min(max(guess, low + 1), high - 1, 4 * low + 16)
        made = make(guess)
        if (now := tokens(made)) <= length:
            rate = (now - low_tokens) / (guess - low)
            low, low_tokens, best = guess, now, made
        else:
            rate = (now - low_tokens) / (guess - low)
            high, high_tokens = guess, now
        if high_tokens and not by_line:
            guess = (low + high) // 2
        else:
            guess = low + int((length - low_tokens) / max(rate, 0.01)) + (not high_tokens)
        by_line = not by_line
    return best
