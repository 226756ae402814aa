"""Needle in a haystack: one fact at a given depth of a text of a given length, and a question for it.

After gkamradt/LLMTest_NeedleInAHaystack: the needle goes in by tokens and moves back to the end of a sentence; depth 0
is the start, depth 100 the end. deviation: needle, question and haystack are our own; each cell has another fact, so
that none can be known by heart; scored by substring and by ROUGE-1 recall of the needle, not by a judging model.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from . import metrics
from .haystack import check_documents, shuffled
from .options import LongContextOptions
from .prompts import FittedPrompt, PromptFitter

if TYPE_CHECKING:
    from .task import LongContextTask

MAX_NEW_TOKENS = 32
DEFAULT_SAMPLES = 1
_PLACES = (
    "Arlen",
    "Brisk",
    "Corvo",
    "Dunmore",
    "Elsay",
    "Farrow",
    "Garn",
    "Hollin",
    "Islay",
    "Jarrow",
    "Kelder",
    "Lorn",
)
_NEEDLE = "The door code of the lighthouse on {place} is {code}."
_QUESTION = "What is the door code of the lighthouse on {place}?"
_PROMPT = "Read the text below. It holds the answer to one question.\n\n{context}\n\nQuestion: {question}\nAnswer:"


def needle_task(fitter: PromptFitter, options: LongContextOptions) -> "LongContextTask":
    """The grid of lengths and depths as one task.

    Args:
        fitter: Counts tokens; its window bounds the lengths.
        options: Lengths, depths, samples per cell, seed and documents.

    Raises:
        ValueError: A length passes the window or is too short, or there are no documents.
    """
    from .task import LongContextTask

    check_documents(options.documents, what="needle")
    metrics.check_packages(["rouge_l"])
    lengths = options.lengths_for(fitter.window)
    num_samples = DEFAULT_SAMPLES if options.num_samples is None else options.num_samples
    rows = []
    for sample in range(num_samples):
        # one haystack per sample: cells differ in length and depth only
        ids = _haystack_ids(fitter, options, sample, lengths[-1])
        for length in lengths:
            for depth in options.depths:
                draw = Random(f"{options.seed}/needle/{sample}/{length}/{depth:g}")
                rows.append(_row(fitter, ids, draw, length=length, depth=depth))

    def prompt_of(doc: Mapping[str, Any]) -> FittedPrompt:
        return fitter.check_whole(_whole(fitter, doc["context"], doc["question"]), max_new_tokens=MAX_NEW_TOKENS)

    def score_of(doc: Mapping[str, Any], answer: str) -> dict[str, float]:
        return {
            "score": metrics.contains(answer, doc["answer"]),
            "rouge_1_recall": metrics.rouge_1_recall(answer, doc["needle"]),
        }

    return LongContextTask(
        name="needle",
        rows=rows,
        prompt_of=prompt_of,
        answers_of=lambda doc: [doc["answer"]],
        score_of=score_of,
        metrics=["score", "rouge_1_recall"],
        max_new_tokens=MAX_NEW_TOKENS,
        metadata={"version": 1.0, "suite": "needle", "set": "needle", "seed": options.seed},
    )


def insert_at_depth(fitter: PromptFitter, ids: Sequence[int], needle: str, depth: float) -> str:
    """The text of some tokens with the needle in it.

    Args:
        fitter: Holds the tokenizer.
        ids: Tokens of the haystack.
        needle: The sentence to hide.
        depth: Where, in percent of the tokens; moved back to the end of a sentence, or else to the start.
    """
    point = int(len(ids) * depth / 100)
    if depth < 100:
        while point > 0 and not str(fitter.tokenizer.decode([ids[point - 1]])).rstrip().endswith("."):
            point -= 1
    before, after = (
        str(fitter.tokenizer.decode(list(part), skip_special_tokens=True)) for part in (ids[:point], ids[point:])
    )
    return " ".join(part for part in (before.strip(), needle, after.strip()) if part)


def _whole(fitter: PromptFitter, context: str, question: str) -> str:
    return fitter.wrapped(_PROMPT.format(context=context, question=question))


def _haystack_ids(fitter: PromptFitter, options: LongContextOptions, sample: int, longest: int) -> list[int]:
    ids: list[int] = []
    documents = shuffled(options.documents, seed=f"{options.seed}/needle/{sample}")
    number = 0
    while len(ids) < longest:
        text = " ".join(documents[number % len(documents)]["text"].split())
        ids += fitter.tokenizer(("" if number == 0 else " ") + text, add_special_tokens=False)["input_ids"]
        number += 1
    return ids


def _row(fitter: PromptFitter, ids: Sequence[int], draw: Random, *, length: int, depth: float) -> dict[str, Any]:
    place, code = draw.choice(_PLACES), str(draw.randint(1_000_000, 9_999_999))
    needle, question = _NEEDLE.format(place=place, code=code), _QUESTION.format(place=place)
    fixed = fitter.count(_whole(fitter, needle, question)) + MAX_NEW_TOKENS
    if fixed >= length:
        raise ValueError(
            f"needle: length {length} is smaller than the template, which needs {fixed} tokens with its answer: "
            "give longer --lengths"
        )
    room = length - fixed
    while True:
        context = insert_at_depth(fitter, ids[:room], needle, depth)
        # tokens may join differently around the needle
        excess = fitter.count(_whole(fitter, context, question)) + MAX_NEW_TOKENS - length
        if excess <= 0:
            break
        room = max(room - excess, 0)
    return {
        "length": length,
        "depth": float(depth),
        "needle": needle,
        "question": question,
        "answer": code,
        "context": context,
    }
