"""What needles are hidden in, and the words that keys are made of; drawn from the documents at hand."""

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

# RULER's haystack of repeated noise says as little; the wording is ours
NOISE = "The lamp is on. The cup is full. The road is dry. We walk there. We walk back."
FEWEST_WORDS = 400

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_PLAIN_WORD = re.compile(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])")
_SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou")


def check_documents(documents: Sequence[Mapping[str, Any]], *, what: str) -> None:
    """Refuse a haystack without hay.

    Raises:
        ValueError: There are no documents, or one has no title or text.
    """
    if not documents:
        raise ValueError(
            f"{what} hides its needles in documents, and there are none: `tenfold assets get wikipedia-summaries`"
        )
    for number, document in enumerate(documents):
        if not all(isinstance(document.get(key), str) and document[key].strip() for key in ("title", "text")):
            raise ValueError(f"document {number} has no title or no text: give both as non-empty strings")


def shuffled(documents: Sequence[Mapping[str, Any]], *, seed: str) -> list[Mapping[str, Any]]:
    """The documents in an order that depends on the set of them and the seed only."""
    ordered = sorted(documents, key=lambda document: (document["title"], document["text"]))
    Random(seed).shuffle(ordered)
    return ordered


def sentences_of(text: str) -> list[str]:
    """Sentences of a text, on one line each; good enough to hide a needle between them."""
    return [part for part in _SENTENCE_END.split(" ".join(text.split())) if part]


class Haystack:
    """Endless sentences of shuffled documents.

    Args:
        documents: Articles with `text`.
        seed: Another seed, another order.
    """

    def __init__(self, documents: Sequence[Mapping[str, Any]], *, seed: str) -> None:
        self._documents = shuffled(documents, seed=seed)
        self._sentences: list[str] = []
        self._next = 0

    def sentences(self, number: int) -> list[str]:
        """The first sentences; the documents start again where they end."""
        while len(self._sentences) < number:
            self._sentences += sentences_of(self._documents[self._next % len(self._documents)]["text"])
            self._next += 1
        return self._sentences[:number]


def word_pool(documents: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Words to make keys and word lists of, and where they come from.

    Plain lower-case words of the documents; made of syllables where the documents have too few.

    Args:
        documents: Articles with `text`.
    """
    counts = Counter(word for document in documents for word in set(_PLAIN_WORD.findall(document["text"])))
    common = sorted((word for word, number in counts.items() if number > 1), key=lambda word: (-counts[word], word))
    # the commonest carry no meaning
    words = sorted(common[100:8100])
    if len(words) >= FEWEST_WORDS:
        return words, "documents"
    return list(_syllable_words()), "syllables"


@functools.cache
def _syllable_words() -> tuple[str, ...]:
    draw = Random("tenfold syllables")
    words: dict[str, None] = {}
    while len(words) < 4000:
        words["".join(draw.choice(_SYLLABLES) for _ in range(draw.choice((2, 3))))] = None
    return tuple(sorted(words))


class Material:
    """Documents with what is drawn from them, made when first used.

    Args:
        documents: Articles with `title` and `text`; may be none.
        seed: Another seed, other hay.
    """

    def __init__(self, documents: Sequence[Mapping[str, Any]], *, seed: int) -> None:
        self.documents, self._seed = documents, seed

    @functools.cached_property
    def words(self) -> list[str]:
        """Words of keys and lists."""
        return word_pool(self.documents)[0]

    @functools.cached_property
    def hay(self) -> Haystack:
        """Sentences to hide needles between.

        Raises:
            ValueError: There are no documents.
        """
        check_documents(self.documents, what="ruler_local")
        return Haystack(self.documents, seed=f"{self._seed}/hay")
