"""RULER's variable tracking and its common and frequent words: the answer is gathered from all over the text."""

import itertools
import string
from collections.abc import Sequence
from random import Random

from .haystack import NOISE

_TRACKING = "Follow the assignments of variables in the text below.\n\n{context}\n\n"
_TRACKING_QUESTION = "Question: Which variables hold the value {value} in the end?"
_TRACKING_PREFIX = " Answer: The {number} variables that hold the value {value} are:"
_COMMON = "The numbered list below repeats some words more often than the others. Remember those.\n\n{context}\n\n"
_COMMON_QUESTION = "Question: Which 10 words stand in the list most often?"
_COMMON_PREFIX = " Answer: The 10 words that stand in the list most often are:"
_FREQUENT = "Count the coded words in the text below; dots are no words.\n\n{context}\n\n"
_FREQUENT_QUESTION = "Question: Which three coded words stand in the text most often? Name nothing else."
_FREQUENT_PREFIX = " Answer: The three coded words that stand in the text most often are:"


class VariableTracking:
    """One chain of assignments in noise; all its variables are asked for. A short example stands in front.

    Args:
        num_hops: Assignments of one variable to the next.
    """

    def __init__(self, *, num_hops: int = 4) -> None:
        self.num_hops = num_hops
        self.smallest = num_hops + 1

    def make(self, pieces: int, seed: str) -> tuple[str, str, list[str]]:
        """A sample with so many pieces of noise: prompt, start of the answer, and what the answer must hold."""
        shown, shown_prefix, shown_answers = self._one(self.smallest, f"{seed}/example", letters=3)
        prompt, prefix, answers = self._one(pieces, seed, letters=5)
        return f"{shown}{shown_prefix} {' '.join(shown_answers)}\n\n{prompt}", prefix, answers

    def _one(self, pieces: int, seed: str, *, letters: int) -> tuple[str, str, list[str]]:
        draw = Random(seed)
        names: dict[str, None] = {}
        while len(names) <= self.num_hops:
            names["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
        chain = list(names)
        value = str(draw.randint(10_000, 99_999))
        steps = [
            f"VAR {chain[0]} = {value}",
            *(f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(chain)),
        ]
        # in order, so that no variable is read before it is set
        depths = sorted(draw.random() for _ in steps)
        text = [NOISE] * pieces
        for depth, step in sorted(zip(depths, steps, strict=True), reverse=True):
            text.insert(round(depth * pieces), step)
        prompt = _TRACKING.format(context="\n".join(text)) + _TRACKING_QUESTION.format(value=value)
        return prompt, _TRACKING_PREFIX.format(number=len(chain), value=value), chain


class CommonWords:
    """A numbered list in which ten words stand more often than the others. A short example stands in front.

    Args:
        words: What is drawn from.
        short: Whether the list is shorter than 4,096 tokens and words therefore repeat less, as in RULER.
    """

    NUM_COMMON = 10

    def __init__(self, words: Sequence[str], *, short: bool) -> None:
        self._words = words
        self._repeats = (6, 1) if short else (30, 3)
        self._example = (20, 3, 1) if short else (40, 10, 3)
        self.smallest = self.NUM_COMMON + 1
        # the example has words of its own
        self.largest = len(self._words) - self._example[0]

    def make(self, pieces: int, seed: str) -> tuple[str, str, list[str]]:
        """A sample with so many different words: prompt, start of the answer, and what the answer must hold."""
        draw = Random(seed)
        words = draw.sample(self._words, len(self._words))
        num_shown, often, seldom = self._example
        shown, shown_answers = self._list(words[:num_shown], often, seldom, draw)
        text, answers = self._list(words[num_shown : num_shown + pieces], *self._repeats, draw)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(shown_answers, 1))
        example = f"{_COMMON.format(context=shown)}{_COMMON_QUESTION}{_COMMON_PREFIX} {listed}"
        return f"{example}\n\n{_COMMON.format(context=text)}{_COMMON_QUESTION}", _COMMON_PREFIX, answers

    def _list(self, words: Sequence[str], often: int, seldom: int, draw: Random) -> tuple[str, list[str]]:
        common = list(words[: self.NUM_COMMON])
        entries = common * often + list(words[self.NUM_COMMON :]) * seldom
        draw.shuffle(entries)
        return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1)), common


class FrequentWords:
    """Coded words whose counts fall off with their rank to the power of -2; the first rank is dots.

    Args:
        vocabulary_size: Number of ranks.
        exponent: How fast counts fall off (RULER's alpha).
    """

    # enough that ranks 2 to 5 have counts of their own
    smallest = 60

    def __init__(self, *, vocabulary_size: int, exponent: float = 2.0) -> None:
        self.vocabulary_size, self.exponent = vocabulary_size, exponent
        # zeta(2) up to the vocabulary's end, in RULER to infinity: the difference is below one word
        self._total = sum(rank**-exponent for rank in range(1, 100_000))

    def make(self, pieces: int, seed: str) -> tuple[str, str, list[str]]:
        """A sample of about so many words: prompt, start of the answer, and what the answer must hold."""
        draw = Random(seed)
        coded: dict[str, None] = {}
        while len(coded) < self.vocabulary_size:
            coded["".join(draw.choices(string.ascii_lowercase, k=6))] = None
        ranked = ["...", *list(coded)[1:]]
        entries = [
            word for rank, word in enumerate(ranked, 1) for _ in range(int(pieces * rank**-self.exponent / self._total))
        ]
        draw.shuffle(entries)
        prompt = _FREQUENT.format(context=" ".join(entries)) + _FREQUENT_QUESTION
        return prompt, _FREQUENT_PREFIX, ranked[1:4]
