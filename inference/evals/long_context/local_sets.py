"""longbench-local: rows in LongBench's schema from data at hand, where the original's files are out of reach.

Real text, generated questions: it shows how well a context is used, and its numbers are no LongBench numbers.

- `wikipedia_qa`: a sentence of one of many passages with its title, or its only year, blanked out.
- `wikipedia_retrieval`: which of many numbered passages holds a sentence.
- `wikipedia_count`: how many of the numbered passages differ.
- `stdlib_completion`: the next line of a module of Python's standard library, other modules in front of it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from ..wikipedia_tasks import BLANK, base_title, mask_title
from .code_lines import CodeLines
from .haystack import sentences_of

Row = dict[str, Any]
# draws a row of so many pieces, with a keyword `seed`: the same arguments give the same row
MakeRow = Callable[..., Row]

_YEAR = re.compile(r"(?<![\w.,-])(1[0-9]{3}|20[0-2][0-9])(?![\w,-])")
_FEWEST_WORDS = 8


class WikipediaRows:
    """Draws rows from articles.

    Args:
        documents: Articles with `title` and `text`.
    """

    def __init__(self, documents: Sequence[Mapping[str, Any]]) -> None:
        unique = {(doc["title"].strip(), " ".join(doc["text"].split())) for doc in documents}
        self._passages = sorted(
            (title, text) for title, text in unique if title and len(text.split()) >= 2 * _FEWEST_WORDS
        )
        if not self._passages:
            raise ValueError("no document is long enough to be a passage: give articles of several sentences")

    @property
    def largest(self) -> int:
        """Most passages of a row."""
        return len(self._passages) // 2

    def qa(self, pieces: int, seed: str) -> Row:
        """A question that one of so many passages answers."""
        draw = Random(seed)
        place, (question, answer) = self._question(draw, draw.choice(("title", "year")))
        titles = [*self._others(draw, pieces, place, avoid=answer), place]
        Random(f"{seed}/order").shuffle(titles)
        context = "\n\n".join(
            f"Passage {number}: {self._passages[i][0]}\n{self._passages[i][1]}" for number, i in enumerate(titles, 1)
        )
        return _row(input=question, context=context, answers=[answer])

    def retrieval(self, pieces: int, seed: str) -> Row:
        """A sentence, and the number of the passage that holds it."""
        draw = Random(seed)
        place, (extract, _) = self._question(draw, "extract")
        chosen = self._others(draw, pieces, place, avoid=extract)
        position = int(Random(f"{seed}/position").random() * (len(chosen) + 1))
        chosen.insert(position, place)
        return _row(input=extract, context=self._numbered(chosen), answers=[f"Paragraph {position + 1}"])

    def count(self, pieces: int, seed: str) -> Row:
        """So many passages, some of them repeated."""
        draw = Random(seed)
        share = draw.uniform(0.4, 1.0)
        num_different = max(1, min(pieces, round(share * pieces)))
        different = draw.sample(range(len(self._passages)), num_different)
        repeats = Random(f"{seed}/repeats")
        chosen = different + [repeats.choice(different) for _ in range(pieces - num_different)]
        repeats.shuffle(chosen)
        return _row(input="", context=self._numbered(chosen), answers=[str(num_different)])

    def _question(self, draw: Random, kind: str) -> tuple[int, tuple[str, str]]:
        ask = {"title": _title_questions, "year": _year_questions, "extract": _extracts}[kind]
        for place in draw.sample(range(len(self._passages)), len(self._passages)):
            if found := ask(*self._passages[place]):
                return place, draw.choice(found)
        raise ValueError(f"no document gives a question of kind {kind!r}: give more articles")

    def _others(self, draw: Random, pieces: int, place: int, *, avoid: str) -> list[int]:
        """Other passages, none of which has what is asked for; the first ones of a fixed order."""
        order = draw.sample(range(len(self._passages)), min(len(self._passages), 2 * pieces + 64))
        wanted = avoid.casefold()
        others = [i for i in order if i != place and wanted not in " ".join(self._passages[i]).casefold()]
        return others[: pieces - 1]

    def _numbered(self, chosen: Sequence[int]) -> str:
        return "\n\n".join(f"Paragraph {number}: {self._passages[i][1]}" for number, i in enumerate(chosen, 1))


class CodeRows:
    """Draws rows from modules.

    Args:
        modules: Source texts by name.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._code = CodeLines(modules)

    @property
    def largest(self) -> int:
        """Most lines of a row."""
        return self._code.num_lines // 2

    def completion(self, pieces: int, seed: str) -> Row:
        """So many lines of code, and the next one."""
        before, line = self._code.draw(pieces, Random(seed))
        return _row(input="", context=before, answers=[line])


def _row(**fields: Any) -> Row:
    text = f"{fields['context']} {fields['input']}"
    # LongBench counts words
    return {**fields, "length": len(text.split()), "all_classes": []}


def _title_questions(title: str, text: str) -> list[tuple[str, str]]:
    answer = base_title(title)
    found = []
    for sentence in sentences_of(text):
        masked = mask_title(sentence, title)
        if BLANK in masked and len(masked.split()) >= _FEWEST_WORDS and answer.casefold() not in masked.casefold():
            found.append((f'Which name fills the gap in this sentence of a passage: "{masked}"', answer))
    return found


def _year_questions(title: str, text: str) -> list[tuple[str, str]]:
    found = []
    for sentence in sentences_of(text):
        years = _YEAR.findall(sentence)
        if len(years) == 1 and len(sentence.split()) >= _FEWEST_WORDS and text.count(sentence) == 1:
            masked = _YEAR.sub(BLANK, sentence)
            found.append((f'Which year fills the gap in this sentence of a passage: "{masked}"', years[0]))
    return found


def _extracts(title: str, text: str) -> list[tuple[str, str]]:
    return [(sentence, title) for sentence in sentences_of(text) if len(sentence.split()) >= _FEWEST_WORDS]
