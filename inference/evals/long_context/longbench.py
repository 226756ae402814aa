"""LongBench v1 as tasks: the official protocol over the published files, and over the stand-in of the same schema.

Protocol (THUDM/LongBench, `LongBench/pred.py`): format the prompt, cut its middle by tokens, put it into the chat
template unless the set is an exception, answer greedily, score as `metrics.py` says. Where ours departs, README.md and
the docstring tell.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import metrics
from .longbench_files import SetRows, Templates
from .longbench_sets import LongBenchSet
from .prompts import FittedPrompt, PromptFitter

if TYPE_CHECKING:
    from .task import LongContextTask


def longbench_task(
    item: LongBenchSet,
    source: SetRows,
    *,
    name: str,
    suite: str,
    templates: Templates,
    fitter: PromptFitter,
    newline_generation: Mapping[str, Any],
) -> "LongContextTask":
    """One set as a task.

    deviation: the chat template is the tokenizer's own, where the official code has one by hand per model; a BOS that
    it writes is not doubled.

    Args:
        item: The set.
        source: Its rows.
        name: Name of the task.
        suite: Which family of tasks it belongs to.
        templates: Prompt templates and generation lengths.
        fitter: Makes prompts fit.
        newline_generation: Generation settings under which a line end ends an answer; see `newline_settings`.

    Raises:
        ValueError: The set has no template, its template does not fit, or a package for its metric is missing.
    """
    from .task import LongContextTask

    templates.check(item.name)
    metrics.check_packages([item.metric])
    template, max_new_tokens = templates.prompts[item.name], templates.max_new_tokens[item.name]
    empty = format_prompt(template, {"input": "", "context": "", "answers": []}, name=item.name)
    fitter.check_template(fitter.wrapped(empty, chat=item.chat), max_new_tokens=max_new_tokens, name=name)
    _check_references(item, source)
    # the official scorer gives each row the classes of the last one
    classes = source.rows[-1]["all_classes"]

    def prompt_of(doc: Mapping[str, Any]) -> FittedPrompt:
        prompt = format_prompt(template, doc, name=item.name)
        if doc.get("max_tokens"):
            # made to measure, so nothing may be lost
            return fitter.check_whole(fitter.wrapped(prompt, chat=item.chat), max_new_tokens=max_new_tokens)
        return fitter.fit(prompt, max_new_tokens=max_new_tokens, chat=item.chat)

    def score_of(doc: Mapping[str, Any], answer: str) -> dict[str, float]:
        scored = metrics.first_line(answer) if item.first_line else answer
        return {"score": metrics.score(item.metric, scored, doc["answers"], classes=classes)}

    return LongContextTask(
        name=name,
        rows=source.rows,
        prompt_of=prompt_of,
        answers_of=lambda doc: doc["answers"],
        score_of=score_of,
        metrics=["score"],
        max_new_tokens=max_new_tokens,
        generation=newline_generation if item.newline_ends else None,
        metadata={
            "version": 1.0,
            "suite": suite,
            "set": item.name,
            "category": item.category,
            "language": item.language,
            "metric": item.metric,
            "chat": item.chat,
            "templates": templates.origin,
            "malformed": [str(line) for line in source.malformed],
            **({"backend": metrics.code_similarity_backend()} if item.metric == "code_similarity" else {}),
        },
        path=source.path,
    )


def format_prompt(template: str, row: Mapping[str, Any], *, name: str) -> str:
    """The template with the row's fields.

    Raises:
        ValueError: It names a field that rows do not have.
    """
    try:
        return template.format(**row)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(f"the prompt template of set {name!r} cannot be filled: {error!r}") from error


def newline_settings(tokenizer: Any, *, transformers_lm: bool) -> dict[str, Any]:
    """Generation settings under which a line end ends an answer, as samsum has it.

    For a model of transformers the line end is a second EOS, neither of which may be the first token. deviation: other
    models of lm-eval get a stop string, so an answer that starts with a line end is empty.
    """
    if not transformers_lm:
        return {"until": ["\n"]}
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    ends = [newline] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id, newline]
    return {"eos_token_id": ends, "min_new_tokens": 1}


def _check_references(item: LongBenchSet, source: SetRows) -> None:
    """Refuse rows that could not be scored, before a model has worked on them."""
    where = source.path or "the hub"
    if item.metric == "classification" and not source.rows[-1]["all_classes"]:
        raise ValueError(f"{where}: set {item.name!r} is scored by its classes, and the last row has none")
    if item.metric in ("retrieval", "retrieval_zh"):
        for row in source.rows:
            try:
                metrics.score(item.metric, "", row["answers"])
            except ValueError as error:
                raise ValueError(f"{where}: row {row['_id']} of set {item.name!r}: {error}") from error
