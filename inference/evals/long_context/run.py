"""Joins the long-context tasks to an evaluation: prompts in the model's chat template, results told by suite."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..task_selection import LocalData, TaskSelection
from .catalogue import BuiltTasks, LongContextPlan
from .prompts import Wrap
from .summary import summarise

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def add_tasks(
    selection: TaskSelection,
    plan: LongContextPlan,
    lm: "LM",
    *,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
) -> TaskSelection:
    """The selection with the plan's tasks, made for a model.

    Args:
        selection: Tasks of other origin.
        plan: Ours.
        lm: The model; its tokenizer and window are asked for.
        apply_chat_template: Whether prompts go through its chat template.
        system_instruction: System message in front of each prompt.

    Raises:
        ValueError: The model has no tokenizer or window, or a task cannot be made for it.
    """
    if not plan.groups:
        return selection
    tokenizer, window = getattr(lm, "tokenizer", None), getattr(lm, "max_length", None)
    if tokenizer is None or not isinstance(window, int):
        raise ValueError(
            f"{', '.join(plan.groups)}: prompts are sized in tokens, and {type(lm).__name__} has no tokenizer or no "
            "max_length: set both"
        )
    from lm_eval.models.huggingface import HFLM

    built: BuiltTasks = plan.build(
        tokenizer,
        window=window,
        wrap=make_wrap(lm, apply_chat_template=apply_chat_template, system_instruction=system_instruction),
        transformers_lm=isinstance(lm, HFLM),
    )
    files = {
        name: LocalData(loader="json", splits={"test": [task.path]}, source=str(task.path))
        for name, task in built.tasks.items()
        if task.path is not None
    }
    return replace(
        selection,
        objects=[*selection.objects, *built.objects],
        tasks={**selection.tasks, **built.tasks},
        local_data={**selection.local_data, **files},
    )


def make_wrap(lm: Any, *, apply_chat_template: bool, system_instruction: str | None) -> Wrap | None:
    """How a prompt is put into the chat template and behind the system message; None where there is neither."""
    if not apply_chat_template and not system_instruction:
        return None

    def wrap(prompt: str, chat: bool) -> str:
        if not (apply_chat_template and chat):
            return f"{system_instruction}\n\n{prompt}" if system_instruction else prompt
        system = [{"role": "system", "content": system_instruction}] if system_instruction else []
        return str(lm.apply_chat_template([*system, {"role": "user", "content": prompt}]))

    return wrap


def tell_by_suite(results: dict[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Summaries by suite; prompt sizes, which lm-eval took for scores, are taken out of its results.

    Args:
        results: lm-eval's results with samples; changed in place.
        tasks: Task objects by name.
    """
    from .task import PROMPT_METRICS, LongContextTask

    metadata = {
        name: task.dump_config()["metadata"] for name, task in tasks.items() if isinstance(task, LongContextTask)
    }
    if not metadata:
        return {}
    for block in ("results", "groups", "higher_is_better"):
        for values in results.get(block, {}).values():
            for key in [key for key in values if _metric(key) in PROMPT_METRICS]:
                del values[key]
    return summarise(results["samples"], metadata)


def _metric(key: str) -> str:
    return key.partition(",")[0].removesuffix("_stderr")
