"""Ordinary norm, batch norm, RepBN and PRepBN on pictures and text at an equal budget: `experiments/slab/quality.py`.

Runs are kept in `runs/slab-quality`; what is there is not trained again. Started several times, the command spreads the
runs over its processes. The picture is `runs/slab-quality/slab-quality.png`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...datamodules.assets import find_asset
from ..kept_runs import mean_and_spread
from ..slab.controls import STAGES
from ..slab.picture import draw
from ..slab.quality import GROUPS, IMAGES, PRETRAINED_SEEDS, QUICK, SEEDS, Study, runs
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/slab-quality")
TASK_METRICS = {
    "wikipedia_bits_per_byte": ("bits_per_byte,none", "bits/byte", False),
    "wikipedia_title_cloze": ("acc,none", "", True),
}


def run(settings: Settings) -> Iterator[Row]:
    """Rows per variant: each stage's score, the difference that fusing makes, and lm-eval's scores of the last form.

    A value is the mean over the seeds that did not diverge, with the largest less the smallest as the spread;
    `diverged_runs` counts the others. The peer is the last stage of the group's first variant.
    """
    study = QUICK if settings.quick else Study()
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for group, names in GROUPS.items():
        seeds = PRETRAINED_SEEDS if group == "smollm2" else SEEDS
        wanted = _chosen(group, names, quick=settings.quick)
        if missing := missing_assets(group, study):
            reason = f"{' and '.join(missing)} not there: tenfold assets get {' '.join(missing)}"
            yield Row(group, "score", float("nan"), "", reason=reason)
            continue
        found[group] = runs(study, FOLDER).all(wanted, seeds[:1] if settings.quick else seeds)
        yield from group_rows(group, found[group])
    if found:
        draw(found, FOLDER / "slab-quality.png")


def _chosen(group: str, names: list[str], *, quick: bool) -> list[str]:
    if not quick:
        return names
    # half a gigabyte is not quick
    return [] if group == "smollm2" else [names[0], f"{group}-prepbn"]


def missing_assets(group: str, study: Study) -> list[str]:
    """Names of the assets that a group needs and that are not there."""
    texts = ["asset:wikipedia-summaries"]
    needed = {"text": texts, "smollm2": [study.pretrained, *texts]}.get(group) or [IMAGES[group]["data"]]
    return [name.removeprefix("asset:") for name in needed if name.startswith("asset:") and find_asset(name) is None]


def group_rows(group: str, results: dict[str, list[dict[str, Any]]]) -> Iterator[Row]:
    """Rows of one data set."""
    metric, unit, higher = ("accuracy", "", True) if group in IMAGES else ("bits_per_byte", "bits/byte", False)
    baseline: dict[str, float] = {}
    first = next(iter(results), None)
    for name, samples in results.items():
        case = f"{name} parameters={samples[0]['parameters']}"
        whole = [result for result in samples if result["diverged_at"] is None]
        yield Row(case, "diverged_runs", len(samples) - len(whole), "", repeats=len(samples))
        for stage in STAGES:
            values = [result["scores"][stage][metric] for result in whole if stage in result["scores"]]
            key = metric
            if name == first and values:
                baseline[key] = mean_and_spread(values)[0]
            yield from _compared(
                case, f"{metric} {stage}", values, unit, higher, None if name == first else baseline.get(key), first
            )
        changes = [result["fusion"]["max_abs_logit_diff"] for result in whole if "fusion" in result]
        if changes:
            yield Row(case, "max_abs_logit_diff fused", max(changes), "logits", repeats=len(changes))
        for task, (key, task_unit, task_higher) in TASK_METRICS.items():
            values = [result["tasks"][task][key] for result in whole if "tasks" in result]
            if name == first and values:
                baseline[task] = mean_and_spread(values)[0]
            peer = None if name == first else baseline.get(task)
            yield from _compared(case, task, values, task_unit, task_higher, peer, first)


def _compared(
    case: str, metric: str, values: list[float], unit: str, higher: bool, peer_value: float | None, peer: str | None
) -> Iterator[Row]:
    if not values:
        return
    mean, spread = mean_and_spread(values)
    yield Row(
        case,
        metric,
        mean,
        unit,
        peer=None if peer_value is None else peer,
        peer_value=peer_value,
        ratio=None if peer_value is None else ratio(mean, peer_value, higher_is_better=higher),
        repeats=len(values),
        spread=spread,
    )
