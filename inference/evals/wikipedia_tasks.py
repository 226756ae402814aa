"""Writes the data of the shipped Wikipedia tasks from held-out articles.

`wikipedia_bits_per_byte` scores how well the articles themselves are predicted. `wikipedia_title_cloze` shows an
extract in which the title is blanked out and asks which of four titles it belongs to. `wikipedia_yes_no` asks of such
an extract whether it belongs to one title; five of eight answers are yes, as BoolQ's are, so that a model that always
says yes is ahead of one that guesses. No text ships with the package: the documents are handed in.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .digest import files_digest

BLANK = "____"
NUM_CHOICES = 4
# answers of the yes/no task: so many of so many are yes
YES_OF = (5, 8)
# wrong titles are drawn from this many titles most like the right one
NUM_NEAREST = 24
# an extract with fewer words than this (blanks not counted) says too little
MIN_WORDS = 12

_WORD = re.compile(r"\w+")
# blanks with nothing but spaces, commas, hyphens or dashes between them
_BLANKS = re.compile(rf"{BLANK}(?:[\s,\u2013-]+{BLANK})+")
_MINOR_WORDS = frozenset(("and", "are", "der", "des", "die", "for", "from", "les", "los", "not", "the", "von", "with"))
_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"


@dataclass(frozen=True)
class _Question:
    title: str
    extract: str


def build_wikipedia_tasks(
    documents: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    num_cloze: int | None = None,
    max_characters: int = 600,
    seed: int = 0,
) -> str:
    """Write the data files of the Wikipedia tasks.

    The files depend on the set of documents, the seed and the sizes only, not on the documents' order. Rows come in an
    order drawn from the seed, so the first `n` rows are a fair sample, and the position of the right title is balanced
    over every four rows, as is yes over every eight. Wrong titles are other documents' titles of about the same length,
    word count and kind; none of them occurs in the extract.

    Args:
        documents: Held-out articles with `title` and `text`.
        folder: Gets `TASK/test.jsonl` for `wikipedia_bits_per_byte`, `wikipedia_title_cloze` and `wikipedia_yes_no`:
            pass it as `data_dir`.
        num_cloze: Number of questions of the last two; as many as the documents allow when None.
        max_characters: Longest extract of a question, in characters, cut at a word. The other task keeps whole texts.
        seed: Draws order, wrong titles and positions.

    Returns:
        Digest of the files.

    Raises:
        ValueError: A document lacks a title or text, or there are too few documents.
    """
    if max_characters < 1 or (num_cloze is not None and num_cloze < 1):
        raise ValueError(f"num_cloze ({num_cloze}) and max_characters ({max_characters}) must be at least 1")
    articles = _shuffled(documents, seed)
    questions = _questions(articles, max_characters)
    if len(questions) < NUM_CHOICES:
        raise ValueError(
            f"{len(articles)} documents give {len(questions)} cloze questions, and {NUM_CHOICES} are the least: "
            "give more documents whose text names their title"
        )
    if num_cloze is not None and num_cloze > len(questions):
        raise ValueError(f"num_cloze is {num_cloze}, but {len(articles)} documents give {len(questions)} questions")
    files = (
        _write_rows(Path(folder) / "wikipedia_bits_per_byte", [{"title": t, "text": text} for t, text in articles]),
        _write_rows(Path(folder) / "wikipedia_title_cloze", cloze := _cloze_rows(questions, num_cloze, seed)),
        _write_rows(Path(folder) / "wikipedia_yes_no", _yes_no_rows(cloze, seed)),
    )
    parts = "".join(files_digest([file]) for file in files)
    return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"


def mask_title(text: str, title: str) -> str:
    """Blank out a title in a text: the whole title, and each of its words that says something.

    Examples:
        >>> mask_title("Ada Lovelace was a mathematician. Lovelace's notes are famous.", "Ada Lovelace")
        '____ was a mathematician. ____ notes are famous.'
        >>> mask_title("Mercury is a planet.", "Mercury (planet)")
        '____ is a planet.'
    """
    base = base_title(title)
    words = [word for word in _WORD.findall(base) if len(word) > 2 and word.casefold() not in _MINOR_WORDS]
    parts = sorted({title, base, *words}, key=lambda part: (-len(part), part))
    alternatives = "|".join(re.escape(part) for part in parts)
    masked = re.sub(rf"(?<!\w)(?:{alternatives})(?:[{_APOSTROPHES}]s|s|es)?(?!\w)", BLANK, text, flags=re.IGNORECASE)
    return _BLANKS.sub(BLANK, masked)


def base_title(title: str) -> str:
    """A title without the parenthesis that tells it from others of the same name."""
    return re.sub(r"\s*\([^()]*\)$", "", title) or title


def _shuffled(documents: Iterable[Mapping[str, Any]], seed: int) -> list[tuple[str, str]]:
    articles = set()
    for number, document in enumerate(documents):
        title, text = document.get("title"), document.get("text")
        if not isinstance(title, str) or not isinstance(text, str) or not title.strip() or not text.strip():
            raise ValueError(f"document {number} has no title or no text: give both as non-empty strings")
        articles.add((title.strip(), text.strip()))
    return sorted(articles, key=lambda article: _draw(seed, "order", *article))


def _draw(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()


def _questions(articles: Iterable[tuple[str, str]], max_characters: int) -> list[_Question]:
    questions: dict[str, _Question] = {}
    for title, text in articles:
        extract = _cut(mask_title(" ".join(text.split()), title), max_characters)
        enough = len(_WORD.findall(extract.replace(BLANK, " "))) >= MIN_WORDS
        if BLANK in extract and enough:
            questions.setdefault(base_title(title).casefold(), _Question(title, extract))
    return list(questions.values())


def _cut(text: str, max_characters: int) -> str:
    if len(text) <= max_characters:
        return text
    return text[: max_characters + 1].rsplit(" ", 1)[0][:max_characters]


def _cloze_rows(questions: Sequence[_Question], num_cloze: int | None, seed: int) -> list[dict[str, Any]]:
    features = np.array([_features(question.title) for question in questions])
    rows = []
    for number, question in enumerate(questions[:num_cloze]):
        answer = _place(number, NUM_CHOICES, "position", seed)
        choices = _wrong_titles(number, questions, features, seed)
        choices.insert(answer, question.title)
        rows.append({"title": question.title, "extract": question.extract, "choices": choices, "answer": answer})
    return rows


def _yes_no_rows(cloze: Iterable[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A question of each row of the cloze, with its right title or its first wrong one."""
    yes, of = YES_OF
    rows = []
    for number, row in enumerate(cloze):
        answer = int(_place(number, of, "yes", seed) < yes)
        wrong = next(choice for choice in row["choices"] if choice != row["title"])
        rows.append({"title": row["title"] if answer else wrong, "extract": row["extract"], "answer": answer})
    return rows


def _place(number: int, count: int, what: str, seed: int) -> int:
    """A place for question `number`: of `count` questions in a row, each gets another one of `count` places."""
    block = str(number // count)
    order = sorted(range(count), key=lambda position: _draw(seed, what, block, str(position)))
    return order[number % count]


def _features(title: str) -> list[float]:
    """What makes titles look alike: length, words, a parenthesis, a digit, in units of distance."""
    return [
        len(title) / 4,
        2.0 * len(title.split()),
        4.0 * title.endswith(")"),
        3.0 * any(character.isdigit() for character in title),
    ]


def _wrong_titles(
    number: int, questions: Sequence[_Question], features: "np.ndarray[Any, np.dtype[Any]]", seed: int
) -> list[str]:
    question = questions[number]
    distance = np.abs(features - features[number]).sum(axis=1)
    extract = question.extract.casefold()
    nearest: list[str] = []
    for index in np.argsort(distance, kind="stable"):
        other = questions[index].title
        if index != number and base_title(other).casefold() not in extract:
            nearest.append(other)
        if len(nearest) == NUM_NEAREST:
            break
    if len(nearest) < NUM_CHOICES - 1:
        raise ValueError(f"too few titles that do not occur in the extract of {question.title!r}: give more documents")
    nearest.sort(key=lambda other: _draw(seed, "choice", question.title, other))
    return nearest[: NUM_CHOICES - 1]


def _write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test.jsonl"
    # processes that share a cache may write the same file at once
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
