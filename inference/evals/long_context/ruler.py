"""RULER's families at any length for any tokenizer, generated here: needles, variable tracking, word extraction.

After Hsieh et al. 2024, RULER (arXiv 2404.06654), section 3 and its synthetic configurations. deviation: prompts are
worded here and the hay and the words come from the documents at hand, so scores show the same abilities but are not the
paper's numbers; lm-eval's own `ruler` has the original wording. Scored alike: the share of references in the answer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import metrics
from .haystack import Material
from .options import LongContextOptions
from .prompts import FittedPrompt, PromptFitter
from .ruler_needles import NEEDLE_FAMILIES, NeedleMaker
from .ruler_words import CommonWords, FrequentWords, VariableTracking
from .sizing import largest_that_fits

if TYPE_CHECKING:
    from .task import LongContextTask

DEFAULT_SAMPLES = 10
# the three asked for need others beside them
_FEWEST_CODED_WORDS = 8


@dataclass(frozen=True)
class RulerSample:
    """One generated question.

    Args:
        prompt: What goes into the chat template.
        prefix: How the answer starts; stands after the template.
        answers: What it must hold.
    """

    prompt: str
    prefix: str
    answers: list[str]


# draws a sample of so many pieces, with a keyword `seed`: the same arguments give the same sample
Maker = Callable[..., RulerSample]


@dataclass(frozen=True)
class Family:
    """A family of questions.

    Args:
        max_new_tokens: Longest answer in tokens, as RULER has it.
        smallest: Fewest pieces of a sample.
        largest: Most pieces; None without a bound.
        make: Draws a sample.
    """

    max_new_tokens: int
    smallest: int
    largest: int | None
    make: Maker


def family_names() -> list[str]:
    """Names of all families."""
    return [*NEEDLE_FAMILIES, "vt", "cwe", "fwe"]


def ruler_task(
    name: str,
    family_name: str,
    fitter: PromptFitter,
    options: LongContextOptions,
    *,
    material: Material | None = None,
) -> "LongContextTask":
    """One family at all lengths as a task.

    Args:
        name: Name of the task.
        family_name: Which family.
        fitter: Counts tokens; its window bounds the lengths.
        options: Lengths, samples per length, seed and documents.
        material: What is drawn from the documents, to share it between families.

    Raises:
        ValueError: A length passes the window or is too short, or the family needs documents and there are none.
    """
    from .task import LongContextTask

    lengths = options.lengths_for(fitter.window)
    num_samples = DEFAULT_SAMPLES if options.num_samples is None else options.num_samples
    material = material or Material(options.documents, seed=options.seed)
    rows = []
    for length in lengths:
        family = _family(family_name, material, length)
        for sample in range(num_samples):
            seed = f"{options.seed}/{family_name}/{length}/{sample}"
            made = largest_that_fits(
                functools.partial(family.make, seed=seed),
                lambda made: fitter.wrapped(made.prompt, prefix=made.prefix),
                fitter=fitter,
                length=length,
                max_new_tokens=family.max_new_tokens,
                smallest=family.smallest,
                largest=family.largest,
                what=name,
            )
            rows.append({"length": length, "prompt": made.prompt, "prefix": made.prefix, "answers": made.answers})

    def prompt_of(doc: Mapping[str, Any]) -> FittedPrompt:
        text = fitter.wrapped(doc["prompt"], prefix=doc["prefix"])
        return fitter.check_whole(text, max_new_tokens=family.max_new_tokens)

    return LongContextTask(
        name=name,
        rows=rows,
        prompt_of=prompt_of,
        answers_of=lambda doc: doc["answers"],
        score_of=lambda doc, answer: {"score": metrics.contains_all(answer, doc["answers"])},
        metrics=["score"],
        max_new_tokens=family.max_new_tokens,
        metadata={"version": 1.0, "suite": "ruler_local", "set": family_name, "seed": options.seed},
    )


def _family(name: str, material: Material, length: int) -> Family:
    def sampled(make: Callable[[int, str], tuple[str, str, Sequence[str]]]) -> Maker:
        def maker(pieces: int, seed: str) -> RulerSample:
            prompt, prefix, answers = make(pieces, seed)
            return RulerSample(prompt, prefix, list(answers))

        return maker

    if name in NEEDLE_FAMILIES:
        needles = NeedleMaker(NEEDLE_FAMILIES[name], material)
        return Family(128, needles.smallest, None, sampled(needles.make))
    if name == "vt":
        variables = VariableTracking()
        return Family(30, variables.smallest, None, sampled(variables.make))
    if name == "cwe":
        common = CommonWords(material.words, short=length < 4096)
        return Family(120, common.smallest, common.largest, sampled(common.make))
    frequent = FrequentWords(vocabulary_size=max(length // 50, _FEWEST_CODED_WORDS))
    return Family(50, frequent.smallest, None, sampled(frequent.make))
