"""RULER's needle families: keys and values hidden in noise, in sentences of documents, or among other needles."""

import uuid
from dataclasses import dataclass
from random import Random
from typing import Literal

from .haystack import NOISE, Material


@dataclass(frozen=True, kw_only=True)
class NeedleFamily:
    """A configuration of RULER's needle task.

    Args:
        hay: What the needles lie in.
        keys: What keys are.
        values: What values are.
        num_keys: Keys hidden, those asked for included.
        num_values: Values per key.
        num_queries: Keys asked for.
    """

    hay: Literal["noise", "documents", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


# RULER's scripts/synthetic.yaml; "essay" there is "documents" here
NEEDLE_FAMILIES = {
    "niah_single_1": NeedleFamily(hay="noise"),
    "niah_single_2": NeedleFamily(hay="documents"),
    "niah_single_3": NeedleFamily(hay="documents", values="uuids"),
    "niah_multikey_1": NeedleFamily(hay="documents", num_keys=4),
    "niah_multikey_2": NeedleFamily(hay="needles"),
    "niah_multikey_3": NeedleFamily(hay="needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleFamily(hay="documents", num_values=4),
    "niah_multiquery": NeedleFamily(hay="documents", num_keys=4, num_queries=4),
}
_NEEDLE = "The secret {kind} of {key} is {value}."
_INTRO = "The text below hides secret {kind}s. Remember them, because one question about them follows.\n\n{context}\n\n"
_QUESTION = "Question: Which secret {kind}s does the text give for {query}?"
_PREFIX = " Answer: The text gives these secret {kind}s for {query}:"


class NeedleMaker:
    """Draws samples of one family.

    Args:
        family: Which one.
        material: The hay, and the words of keys.

    Raises:
        ValueError: The family needs documents and there are none.
    """

    def __init__(self, family: NeedleFamily, material: Material) -> None:
        self.family, self._words = family, material.words
        self._hay = material.hay if family.hay == "documents" else None

    @property
    def smallest(self) -> int:
        """Fewest pieces of hay: each needle stands between two."""
        return self.family.num_keys * self.family.num_values

    def make(self, pieces: int, seed: str) -> tuple[str, str, list[str]]:
        """A sample with so many pieces of hay: prompt, start of the answer, and what the answer must hold."""
        draw = Random(seed)
        family = self.family
        kind = "number" if family.values == "numbers" else "uuid"
        keys: list[str] = []
        while len(keys) < family.num_keys:
            if (key := self._key(draw)) not in keys:
                keys.append(key)
        values = {key: [self._value(draw) for _ in range(family.num_values)] for key in keys}
        asked = draw.sample(keys, family.num_queries)
        needles = [_NEEDLE.format(kind=kind, key=key, value=value) for key in keys for value in values[key]]
        draw.shuffle(needles)
        # drawn before the hay, so that a needle stays at its depth when hay is added
        depths = sorted(draw.random() for _ in needles)
        hay = self._pieces(pieces, kind, set(keys), seed)
        for depth, needle in sorted(zip(depths, needles, strict=True), reverse=True):
            hay.insert(round(depth * pieces), needle)
        context = ("\n" if family.hay != "documents" else " ").join(hay)
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        prompt = _INTRO.format(kind=kind, context=context) + _QUESTION.format(kind=kind, query=query)
        return prompt, _PREFIX.format(kind=kind, query=query), [value for key in asked for value in values[key]]

    def _pieces(self, number: int, kind: str, keys: set[str], seed: str) -> list[str]:
        if self.family.hay == "noise":
            return [NOISE] * number
        if self._hay is not None:
            return list(self._hay.sentences(number))
        # needles as hay: another stream of draws, so that more hay begins with the same
        draw = Random(f"{seed}/hay")
        pieces: list[str] = []
        while len(pieces) < number:
            key, value = self._key(draw), self._value(draw)
            if key not in keys:
                pieces.append(_NEEDLE.format(kind=kind, key=key, value=value))
        return pieces

    def _key(self, draw: Random) -> str:
        if self.family.keys == "uuids":
            return _uuid(draw)
        return f"{draw.choice(self._words)}-{draw.choice(self._words)}"

    def _value(self, draw: Random) -> str:
        return _uuid(draw) if self.family.values == "uuids" else str(draw.randint(1_000_000, 9_999_999))


def _uuid(draw: Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))
