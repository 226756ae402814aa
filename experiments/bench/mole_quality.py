"""Held-out loss and lm-eval scores of small decoders on the same tokens, three seeds: `experiments/mole/quality.py`.

Runs are kept in `runs/mole-quality`; what is there is not trained again. Started several times, the command spreads the
runs over its processes. The picture is `runs/mole-quality/mole-quality.png`.

`wikipedia_yes_no` has a majority class: its bound is what always saying yes scores. The mean accuracy is given with and
without it, since a published lead over MoE rests on such a task.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ...inference.evals.wikipedia_tasks import NUM_CHOICES, YES_OF
from ..kept_runs import mean_and_spread
from ..mole.picture import Panel, draw
from ..mole.quality import CHOICE_TASKS, QUICK, SEEDS, VARIANTS, Study, runs
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/mole-quality")


class Metric(NamedTuple):
    """How a metric is shown, and what those score who know nothing."""

    unit: str
    higher_is_better: bool
    bound: str | None = None
    bound_value: float | None = None


METRICS = {
    "val_loss": Metric("nats", False),
    "wikipedia_bits_per_byte": Metric("bits/byte", False),
    "wikipedia_title_cloze": Metric("", True, "guessing", 1 / NUM_CHOICES),
    "wikipedia_yes_no": Metric("", True, "always yes", YES_OF[0] / YES_OF[1]),
    "mean accuracy with the majority-class task": Metric("", True),
    "mean accuracy without the majority-class task": Metric("", True),
}


def values_of(result: dict[str, Any]) -> dict[str, float]:
    """A run's number for every metric."""
    scores = result["scores"]
    accuracies = {task: scores[task]["acc,none"] for task in CHOICE_TASKS}
    return {
        "val_loss": result["val_loss"],
        "wikipedia_bits_per_byte": scores["wikipedia_bits_per_byte"]["bits_per_byte,none"],
        **accuracies,
        "mean accuracy with the majority-class task": fmean(accuracies.values()),
        "mean accuracy without the majority-class task": fmean(
            value for task, value in accuracies.items() if task != "wikipedia_yes_no"
        ),
    }


def run(settings: Settings) -> Iterator[Row]:
    """A row per variant and metric: mean over seeds, with the largest less the smallest as the spread."""
    study = QUICK if settings.quick else Study()
    seeds = SEEDS[:1] if settings.quick else SEEDS
    names = ["dense", "mole-4e", "bigram-4e"] if settings.quick else list(VARIANTS)
    found = runs(study, FOLDER).all(names, seeds)
    samples = {name: [values_of(result) for result in results] for name, results in found.items()}
    for name, results in found.items():
        for metric, shown in METRICS.items():
            mean, spread = mean_and_spread([values[metric] for values in samples[name]])
            theirs = None if name == names[0] else fmean(values[metric] for values in samples[names[0]])
            yield Row(
                f"{name} parameters={results[0]['parameters']}",
                metric,
                mean,
                shown.unit,
                peer=None if theirs is None else names[0],
                peer_value=theirs,
                ratio=None if theirs is None else ratio(mean, theirs, higher_is_better=shown.higher_is_better),
                bound=shown.bound,
                bound_value=shown.bound_value,
                repeats=len(results),
                spread=spread,
            )
    draw([_panel(metric, samples) for metric in ("val_loss", *CHOICE_TASKS)], FOLDER / "mole-quality.png")


def _panel(metric: str, samples: dict[str, list[dict[str, float]]]) -> Panel:
    shown = METRICS[metric]
    better = "higher" if shown.higher_is_better else "lower"
    unit = f", {shown.unit}" if shown.unit else ""
    return Panel(
        f"{metric}{unit}: {better} is better",
        {name: [values[metric] for values in results] for name, results in samples.items()},
        shown.bound_value,
        shown.bound or "",
    )
