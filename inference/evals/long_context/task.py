"""lm-eval tasks whose prompts are made here: sized by the model's own tokenizer, wrapped as the protocol says."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.group import AggMetricConfig

from .prompts import FittedPrompt

if TYPE_CHECKING:
    from pathlib import Path

# per-sample numbers that are not scores; they are taken out of lm-eval's results and told in a block of their own
PROMPT_METRICS = ("prompt_tokens", "removed_tokens")


class LongContextTask(ConfigurableTask):
    """A `generate_until` task over rows in memory.

    What lm-eval would do to a prompt (few-shot examples, chat template, system message) is done by `prompt_of`, because
    these protocols cut before they wrap and leave some sets unwrapped.

    Args:
        name: Name of the task.
        rows: Documents; a field `row` is added.
        prompt_of: Makes the whole prompt of a document.
        answers_of: What a document's answer is compared with, for the sample files.
        score_of: Scores an answer: numbers from 0 to 1 by metric, the same metrics for each document.
        metrics: Names of these metrics, the main one first.
        max_new_tokens: Longest answer in tokens.
        generation: Further generation settings.
        metadata: What the results tell about the task; `version` among it.
        path: The file that the rows come from, if one.
    """

    def __init__(
        self,
        *,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        prompt_of: Callable[[Mapping[str, Any]], FittedPrompt],
        answers_of: Callable[[Mapping[str, Any]], list[str]],
        score_of: Callable[[Mapping[str, Any], str], dict[str, float]],
        metrics: Sequence[str],
        max_new_tokens: int,
        generation: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any],
        path: "Path | None" = None,
    ) -> None:
        self._rows = [{"row": number, **row} for number, row in enumerate(rows)]
        self._prompt_of, self._answers_of, self._score_of = prompt_of, answers_of, score_of
        self._prompts: dict[int, FittedPrompt] = {}
        self.path = path
        settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False, **(generation or {})}
        self._shown: dict[str, Any] = {
            "task": name,
            "output_type": "generate_until",
            "test_split": "test",
            "num_fewshot": 0,
            "generation_kwargs": settings,
            "metadata": dict(metadata),
        }
        super().__init__(
            config={
                **self._shown,
                "doc_to_text": self._text_of,
                "doc_to_target": self._target_of,
                "process_results": self.process_results,
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": metric not in PROMPT_METRICS}
                    for metric in (*metrics, *PROMPT_METRICS)
                ],
            }
        )

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Take the rows; nothing is loaded."""
        self.dataset = {"test": datasets.Dataset.from_list(self._rows)}
        self._rows = []

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int = 0, *args: Any, **kwargs: Any) -> str:
        """The whole prompt; chat template and system message are in it already."""
        fitted = self._prompts[doc["row"]] = self._prompt_of(doc)
        return fitted.text

    def process_results(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        """Scores of one answer, and the size of its prompt."""
        prompt = self._prompts[doc["row"]]
        sizes = {"prompt_tokens": float(prompt.num_tokens), "removed_tokens": float(prompt.num_removed)}
        return {**self._score_of(doc, results[0]), **sizes}

    def dump_config(self) -> dict[str, Any]:
        """The settings that can be told in JSON."""
        return {**self._shown, "metadata": dict(self._shown["metadata"])}

    def _text_of(self, doc: dict[str, Any]) -> str:
        # asked for once, when the task is made: the prompt proper comes from `fewshot_context`
        return ""

    def _target_of(self, doc: dict[str, Any]) -> str:
        return " | ".join(self._answers_of(doc))


def make_group(name: str, tasks: Sequence[LongContextTask]) -> Group:
    """A group whose score is the unweighted mean over its tasks."""
    group = Group(
        name,
        aggregate_metric_list=[AggMetricConfig(metric="score", filter_list=["none"], weight_by_size=False)],
        metadata={"version": 1.0},
    )
    for task in tasks:
        group.add(task)
    return group
