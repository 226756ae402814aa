"""The sets of LongBench v1: what each is, how it is prompted and how it is scored.

Source: Bai et al. 2024, LongBench (arXiv 2308.14508), table 1; THUDM/LongBench, `LongBench/pred.py` and `eval.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .metrics import MetricName

Category = Literal["single", "multi", "summarization", "fewshot", "synthetic", "code"]
CATEGORIES: dict[Category, str] = {
    "single": "single-document QA",
    "multi": "multi-document QA",
    "summarization": "summarization",
    "fewshot": "few-shot learning",
    "synthetic": "synthetic",
    "code": "code completion",
}
# bounds of LongBench-E's buckets, in the data's own unit: words, or characters in Chinese
BUCKETS = ("0-4k", "4-8k", "8k+")


@dataclass(frozen=True, kw_only=True)
class LongBenchSet:
    """One set.

    Args:
        name: Its name in the published files.
        category: What kind of task it is.
        metric: What it is scored by.
        language: `zh` for the five Chinese sets.
        first_line: Whether only the answer's first line is scored.
        chat: Whether prompts go through the chat template when one is used at all.
        newline_ends: Whether a line end ends the answer, though not as its first token.
        in_e: Whether LongBench-E has it.
    """

    name: str
    category: Category
    metric: MetricName
    language: Literal["en", "zh"] = "en"
    first_line: bool = False
    chat: bool = True
    newline_ends: bool = False
    in_e: bool = False


SETS: dict[str, LongBenchSet] = {
    item.name: item
    for item in (
        LongBenchSet(name="narrativeqa", category="single", metric="qa_f1"),
        LongBenchSet(name="qasper", category="single", metric="qa_f1", in_e=True),
        LongBenchSet(name="multifieldqa_en", category="single", metric="qa_f1", in_e=True),
        LongBenchSet(name="multifieldqa_zh", category="single", metric="qa_f1_zh", language="zh"),
        LongBenchSet(name="hotpotqa", category="multi", metric="qa_f1", in_e=True),
        LongBenchSet(name="2wikimqa", category="multi", metric="qa_f1", in_e=True),
        LongBenchSet(name="musique", category="multi", metric="qa_f1"),
        LongBenchSet(name="dureader", category="multi", metric="rouge_l_zh", language="zh"),
        LongBenchSet(name="gov_report", category="summarization", metric="rouge_l", in_e=True),
        LongBenchSet(name="qmsum", category="summarization", metric="rouge_l"),
        LongBenchSet(name="multi_news", category="summarization", metric="rouge_l", in_e=True),
        LongBenchSet(name="vcsum", category="summarization", metric="rouge_l_zh", language="zh"),
        LongBenchSet(name="trec", category="fewshot", metric="classification", first_line=True, chat=False, in_e=True),
        LongBenchSet(name="triviaqa", category="fewshot", metric="qa_f1", first_line=True, chat=False, in_e=True),
        LongBenchSet(
            name="samsum",
            category="fewshot",
            metric="rouge_l",
            first_line=True,
            chat=False,
            newline_ends=True,
            in_e=True,
        ),
        LongBenchSet(
            name="lsht", category="fewshot", metric="classification", language="zh", first_line=True, chat=False
        ),
        LongBenchSet(name="passage_count", category="synthetic", metric="count", in_e=True),
        LongBenchSet(name="passage_retrieval_en", category="synthetic", metric="retrieval", in_e=True),
        LongBenchSet(name="passage_retrieval_zh", category="synthetic", metric="retrieval_zh", language="zh"),
        LongBenchSet(name="lcc", category="code", metric="code_similarity", chat=False, in_e=True),
        LongBenchSet(name="repobench-p", category="code", metric="code_similarity", chat=False, in_e=True),
    )
}

# the stand-in built from packaged data; see local_sets.py
LOCAL_SETS: dict[str, LongBenchSet] = {
    item.name: item
    for item in (
        LongBenchSet(name="wikipedia_qa", category="multi", metric="qa_f1", first_line=True),
        LongBenchSet(name="wikipedia_retrieval", category="synthetic", metric="retrieval", first_line=True),
        LongBenchSet(name="wikipedia_count", category="synthetic", metric="count", first_line=True),
        LongBenchSet(name="stdlib_completion", category="code", metric="code_similarity", chat=False),
    )
}


def bucket_of(length: float) -> str:
    """LongBench-E's bucket of a length in the data's own unit.

    Examples:
        >>> bucket_of(3999), bucket_of(4000), bucket_of(8000)
        ('0-4k', '4-8k', '8k+')
    """
    return BUCKETS[0] if length < 4000 else BUCKETS[1] if length < 8000 else BUCKETS[2]


def sets_of_e(sets: Sequence[LongBenchSet] = tuple(SETS.values())) -> list[LongBenchSet]:
    """The sets that LongBench-E has."""
    return [item for item in sets if item.in_e]
