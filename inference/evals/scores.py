"""Scores with their standard errors and baselines, out of lm-eval's results."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# metrics that are a function of the ratio of two sums over documents, for which lm-eval gives no standard error
_RATIO_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of an evaluation.

    Args:
        task: Name of the task or group.
        metric: Name of the metric.
        filter: What was cut out of the answers before they were compared; `none` for log-likelihoods.
        value: The score.
        standard_error: Its standard error over documents; None where none can be given.
        num_documents: Documents scored; None for a group.
        num_fewshot: Examples in the prompt.
        higher_is_better: Direction; None where lm-eval states none.
        chance: Expected value of a guess, for accuracies of multiple-choice tasks.
    """

    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    num_documents: int | None
    num_fewshot: int | None
    higher_is_better: bool | None
    chance: float | None


def scores_of(results: Mapping[str, Any]) -> list[Score]:
    """All scores of a results dictionary, tasks and metrics in lm-eval's order.

    Args:
        results: What `evaluate_model` returns, or the content of a `results.json`.
    """
    extra = results.get("tenfold", {})
    scores = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = values.get(f"{metric}_stderr,{filter_name}")
            if not isinstance(error, (int, float)):
                error = extra.get("standard_errors", {}).get(task, {}).get(key)
            chance = extra.get("baselines", {}).get(task, {}).get("chance")
            scores.append(
                Score(
                    task=task,
                    metric=metric,
                    filter=filter_name,
                    value=float(value),
                    standard_error=float(error) if error is not None and math.isfinite(error) else None,
                    num_documents=results.get("n-samples", {}).get(task, {}).get("effective"),
                    num_fewshot=results.get("n-shot", {}).get(task),
                    higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric),
                    chance=chance if metric in ("acc", "acc_norm") else None,
                )
            )
    return scores


def ratio_standard_errors(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Standard errors of perplexities and bits per byte over documents.

    Each is a function of r = sum of log-likelihoods / sum of weights (bytes or words). r's standard error is that of a
    ratio estimator, linearised over documents (Cochran 1977, Sampling Techniques, section 2.11, without the correction
    for a finite population); the delta method carries it over to the metric.

    Args:
        samples: lm-eval's sample rows of one task.

    Returns:
        Standard error by `metric,filter`; empty for fewer than two documents or another kind of task.
    """
    errors: dict[str, float] = {}
    for filter_name in {row["filter"] for row in samples}:
        rows = [row for row in samples if row["filter"] == filter_name]
        for metric in _RATIO_METRICS:
            if len(rows) < 2 or metric not in rows[0]:
                continue
            pairs = np.array([row[metric] for row in rows], dtype=np.float64)
            ratio = pairs[:, 0].sum() / pairs[:, 1].sum()
            residuals = pairs[:, 0] - ratio * pairs[:, 1]
            error = math.sqrt(len(rows) / (len(rows) - 1) * (residuals**2).sum()) / pairs[:, 1].sum()
            slope = 1 / math.log(2) if metric == "bits_per_byte" else math.exp(-ratio)
            errors[f"{metric},{filter_name}"] = float(slope * error)
    return errors


def baselines(samples: Sequence[Mapping[str, Any]], output_type: str | None) -> dict[str, float]:
    """What a multiple-choice task gives to those who know nothing.

    Args:
        samples: lm-eval's sample rows of one task.
        output_type: The task's output type.

    Returns:
        `chance`, the accuracy of a uniform guess, and `majority`, that of always naming the commonest position; empty
        for other tasks.
    """
    if output_type != "multiple_choice" or not samples:
        return {}
    # with mutual information each choice is asked for a second time, without context
    repeats = 2 if "acc_mutual_info" in samples[0]["metrics"] else 1
    found = {"chance": float(np.mean([repeats / len(row["arguments"]) for row in samples]))}
    targets = [row["target"] for row in samples]
    if all(isinstance(target, (int, np.integer)) for target in targets):
        found["majority"] = Counter(map(int, targets)).most_common(1)[0][1] / len(targets)
    return found


def score_figure(scores: Sequence[Score]) -> "Figure":
    """Bars of all scores with one standard error each way, one panel per metric, the level of a guess marked."""
    from matplotlib.figure import Figure

    by_metric: dict[str, list[Score]] = {}
    for score in scores:
        by_metric.setdefault(score.metric, []).append(score)
    heights = [len(group) + 1.2 for group in by_metric.values()]
    figure = Figure(figsize=(7.5, 0.34 * sum(heights) + 0.5), layout="constrained")
    panels = figure.subplots(len(by_metric), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (metric, group) in zip(panels, by_metric.items(), strict=True):
        group = group[::-1]
        labels = [score.task if score.filter == "none" else f"{score.task} ({score.filter})" for score in group]
        errors = [score.standard_error or 0.0 for score in group]
        panel.barh(labels, [score.value for score in group], xerr=errors, height=0.6, color="#4c78a8", ecolor="#888888")
        for row, score in enumerate(group):
            if score.chance is not None:
                panel.plot([score.chance] * 2, [row - 0.4, row + 0.4], color="#e45756", linestyle="--", linewidth=1.5)
        panel.set_title(metric, loc="left", fontsize="medium")
        panel.spines[["top", "right"]].set_visible(False)
    return figure
