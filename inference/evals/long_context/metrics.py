"""Metrics of LongBench, LongBench v2, needle and RULER, one prediction against one reference, from 0 to 1.

The LongBench ones keep the quirks of the official scorer (THUDM/LongBench, `LongBench/metrics.py`), because published
numbers contain them; each docstring names its own. `tests/…/golden_scores.json` holds what the official file gives.
"""

import functools
import importlib.metadata
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Literal

import numpy as np

MetricName = Literal[
    "qa_f1",
    "qa_f1_zh",
    "rouge_l",
    "rouge_l_zh",
    "classification",
    "retrieval",
    "retrieval_zh",
    "count",
    "code_similarity",
]

# what the official scorer takes away from Chinese answers: full-width forms, CJK brackets, dashes and quotes
_CHINESE_PUNCTUATION = (
    "\uff01\uff1f\uff61\u3002\uff02\uff03\uff04\uff05\uff06\uff07\uff08\uff09\uff0a\uff0b\uff0c\uff0d\uff0f\uff1a\uff1b"
    "\uff1c\uff1d\uff1e\uff20\uff3b\uff3c\uff3d\uff3e\uff3f\uff40\uff5b\uff5c\uff5d\uff5e\uff5f\uff60\uff62\uff63\uff64"
    "\u3001\u3003\u300b\u300c\u300d\u300e\u300f\u3010\u3011\u3014\u3015\u3016\u3017\u3018\u3019\u301a\u301b\u301c\u301d"
    "\u301e\u301f\u3030\u303e\u303f\u2013\u2014\u2018\u2019\u201b\u201c\u201d\u201e\u201f\u2026\u2027\ufe4f."
)
_ENGLISH_DROPPED = str.maketrans("", "", string.punctuation)
_CHINESE_DROPPED = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_CHOICE = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))
_CONTROL = re.compile(r"[\x00-\x1f]")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces.

    Punctuation goes first, so `1,200` becomes `1200` and `a.` an article.

    Examples:
        >>> normalize_answer("The cat's  1,200 LIVES!")
        'cats 1200 lives'
    """
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_ENGLISH_DROPPED)).split())


def normalize_answer_zh(text: str) -> str:
    """Lower case, without ASCII and Chinese punctuation and without any white space."""
    return "".join(text.lower().translate(_CHINESE_DROPPED).split())


def qa_f1(prediction: str, reference: str) -> float:
    """F1 over words as multisets, after `normalize_answer`.

    Quirk: a reference of nothing but articles or punctuation scores 0 even against itself, as does an empty answer.

    Examples:
        >>> qa_f1("It was the Eiffel Tower", "Eiffel Tower")
        0.6666666666666666
    """
    return _multiset_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def qa_f1_zh(prediction: str, reference: str) -> float:
    """F1 over jieba's words as multisets, each normalised; needs the package jieba."""
    return _multiset_f1(_chinese_words(prediction), _chinese_words(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F of ROUGE-L as the package `rouge` counts it: words as written, summary level, sentences cut at dots.

    Quirk: whatever the package cannot score (an empty answer, nothing but dots) gives 0. So does, with the official
    scorer and here, a pair of sentences whose words together pass the interpreter's recursion limit.
    """
    rouge = _rouge()
    try:
        return float(rouge.get_scores([prediction], [reference], avg=True)["rouge-l"]["f"])
    # the package raises ValueError, ZeroDivisionError or RecursionError
    except Exception:
        return 0.0


def rouge_l_zh(prediction: str, reference: str) -> float:
    """`rouge_l` over jieba's words; needs the packages jieba and rouge."""
    return rouge_l(" ".join(_cut_chinese(prediction)), " ".join(_cut_chinese(reference)))


def rouge_1_recall(prediction: str, reference: str) -> float:
    """Share of the reference's distinct words that the answer holds (`rouge-1` recall of the package `rouge`)."""
    rouge = _rouge()
    try:
        return float(rouge.get_scores([prediction], [reference], avg=True)["rouge-1"]["r"])
    except Exception:
        return 0.0


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of class names found in the answer if the true one is among them, else 0.

    Quirk: names that are part of the true one are taken out while the list of them is walked through, so that the one
    right after a removed name is passed over and may stay: an answer with the true class and two of its parts can
    score 1/2.

    Examples:
        >>> classification("Individual", "Individual", ["Individual", "Other"])
        1.0
        >>> classification("Other or Individual", "Individual", ["Individual", "Other"])
        0.5
    """
    found = [name for name in classes if name in prediction]
    position = 0
    while position < len(found):
        if found[position] in reference and found[position] != reference:
            # the first of equal names goes, as with list.remove
            found.remove(found[position])
        position += 1
    return 1.0 / len(found) if reference in found else 0.0


def retrieval(prediction: str, reference: str, *, pattern: str = r"Paragraph (\d+)") -> float:
    """Share of the numbers in the answer that equal the reference's paragraph number.

    Quirk: every digit group counts, whatever stands before it: `Paragraph 3 (of 30)` scores 1/2.

    Args:
        prediction: The answer.
        reference: Names one paragraph.
        pattern: How it does so.

    Raises:
        ValueError: The reference names none.
    """
    match = re.search(pattern, reference)
    if match is None:
        raise ValueError(f"the reference {reference!r} names no paragraph: it must match {pattern!r}")
    return count(prediction, match.group(1))


def retrieval_zh(prediction: str, reference: str) -> float:
    """`retrieval` with references in Chinese."""
    return retrieval(prediction, reference, pattern=r"\u6bb5\u843d(\d+)")


def count(prediction: str, reference: str) -> float:
    """Share of the numbers in the answer that equal the reference; 0 without numbers.

    Quirk: `12 of 12, i.e. 7` against `12` scores 2/3. Numbers are compared as written: `07` is not `7`.
    """
    numbers = _NUMBER.findall(prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(prediction: str, reference: str) -> float:
    r"""`fuzzywuzzy`'s ratio between the reference and the answer's first line without a backtick, `#` or `//`.

    Quirks: leading line ends are dropped, but a line of spaces counts as the first; without a usable line the empty
    string is compared. The ratio depends on what fuzzywuzzy runs on: see `code_similarity_backend`.

    Examples:
        >>> code_similarity("# sum\nreturn a + b\n", "return a + b")
        1.0
    """
    lines = prediction.lstrip("\n").split("\n")
    first = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return float(_fuzz().ratio(first, reference)) / 100


def code_similarity_backend() -> str:
    """Version of fuzzywuzzy and what it compares with: `difflib`, or `Levenshtein` where that is installed.

    The two differ by up to 29 points on one pair of lines, so a score means something only beside this name.
    """
    module = _fuzz().SequenceMatcher.__module__
    engine = "difflib" if module == "difflib" else "Levenshtein"
    return f"fuzzywuzzy {importlib.metadata.version('fuzzywuzzy')} ({engine})"


def first_line(prediction: str) -> str:
    r"""The answer's first line after leading line ends: what few-shot sets are scored on.

    Examples:
        >>> first_line("\n\nLocation\nQuestion: next")
        'Location'
    """
    return prediction.lstrip("\n").split("\n")[0]


def extract_choice(response: str) -> str | None:
    """The letter after `The correct answer is`, with or without brackets, asterisks removed (LongBench v2).

    Examples:
        >>> extract_choice("**The correct answer is (B)**, because")
        'B'
    """
    text = response.replace("*", "")
    return next((match.group(1) for pattern in _CHOICE if (match := pattern.search(text))), None)


def contains(prediction: str, reference: str) -> float:
    """1 if the reference stands in the answer, letter case aside."""
    return float(reference.lower() in _printable(prediction).lower())


def contains_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, letter case aside (RULER's `string_match_all`)."""
    return sum(contains(prediction, reference) for reference in references) / len(references)


def score(name: MetricName, prediction: str, references: Sequence[str], *, classes: Sequence[str] = ()) -> float:
    """The best score of an answer over its references, from 0 to 1.

    Args:
        name: Which metric.
        prediction: The answer, already cut as its set demands.
        references: Accepted answers.
        classes: Names of all classes, for `classification`.
    """
    if name == "classification":
        return max((classification(prediction, reference, classes) for reference in references), default=0.0)
    metric = _METRICS[name]
    return max((metric(prediction, reference) for reference in references), default=0.0)


def mean_percent(scores: Sequence[float], *, digits: int = 2, pairwise: bool = False) -> float | None:
    """Mean of scores from 0 to 1 as a percentage, rounded like the official result files; None of nothing.

    Args:
        scores: Scores in the order of the file.
        digits: Digits after the point: 2 in LongBench, 1 in LongBench v2.
        pairwise: Sum as numpy does, which LongBench-E's scorer uses, and not one after the other, as the plain scorer
            does: the last bit may decide the rounding.
    """
    if not scores:
        return None
    if pairwise:
        return round(100 * float(np.mean(scores)), digits)
    total = 0.0
    for value in scores:
        total += value
    return round(100 * total / len(scores), digits)


def check_packages(names: Sequence[MetricName]) -> None:
    """Refuse metrics whose packages are not installed, before a model has worked for an hour.

    Raises:
        ValueError: A package is missing.
    """
    for name in names:
        if name in ("rouge_l", "rouge_l_zh"):
            _rouge()
        if name in ("qa_f1_zh", "rouge_l_zh"):
            _jieba()
        if name == "code_similarity":
            _fuzz()


_METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_similarity": code_similarity,
}


def _multiset_f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _chinese_words(text: str) -> list[str]:
    return [word for word in map(normalize_answer_zh, _cut_chinese(text)) if word]


def _cut_chinese(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


def _printable(text: str) -> str:
    return _CONTROL.sub("\n", text.strip())


@functools.cache
def _jieba() -> ModuleType:
    try:
        import jieba
    except ImportError as error:
        raise _missing("jieba", "Chinese sets are cut into words by it") from error
    # it reports on its dictionary on standard error
    jieba.setLogLevel("WARNING")
    return jieba


@functools.cache
def _rouge() -> Any:
    try:
        from rouge import Rouge
    except ImportError as error:
        raise _missing("rouge", "summaries are scored by it") from error
    return Rouge()


@functools.cache
def _fuzz() -> ModuleType:
    try:
        with warnings.catch_warnings():
            # it advises a back end that gives other scores
            warnings.simplefilter("ignore")
            from fuzzywuzzy import fuzz
    except ImportError as error:
        raise _missing("fuzzywuzzy", "code is scored by it") from error
    return fuzz


def _missing(package: str, reason: str) -> ValueError:
    return ValueError(f"the package {package} is not installed and {reason}: pip install 'tenfold[eval]'")
