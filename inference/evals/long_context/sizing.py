"""Makes generated prompts as long as asked for: the most pieces of a haystack that fit."""

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
    # doubling first: the number of pieces per token is not known
    while largest is None or high <= largest:
        made = make(high)
        if tokens(made) > length:
            break
        low, best, high = high, made, high * 2
    else:
        high = largest + 1
    while high - low > 1:
        middle = (low + high) // 2
        made = make(middle)
        if tokens(made) <= length:
            low, best = middle, made
        else:
            high = middle
    return best
