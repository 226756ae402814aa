"""Picture of the study of controls: one panel per data set, a column per norm, a point per seed and stage."""

from pathlib import Path
from statistics import fmean
from typing import Any

from .controls import STAGES

_COLOURS = {"trained": "#8a8a8a", "recalibrated": "#d98c3f", "fused": "#3f7fd9"}
_SHIFTS = {"trained": -0.22, "recalibrated": 0.0, "fused": 0.22}


def draw(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Scores by norm before and after recalibration and after fusion.

    Args:
        found: results of the seeds by group and variant, see `quality.result_of`.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = {group: results for group, results in found.items() if results}
    figure = Figure(figsize=(4.2 * len(groups), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axis, (group, results) in zip(panels, groups.items(), strict=True):
        _panel(axis, group, results)
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=len(unique), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panel(axis: Any, group: str, results: dict[str, list[dict[str, Any]]]) -> None:
    scored = [stages for runs in results.values() for run in runs for stages in run["scores"].values()]
    metric = "accuracy" if any("accuracy" in stages for stages in scored) else "bits_per_byte"
    for column, runs in enumerate(results.values()):
        for stage in STAGES:
            values = [run["scores"][stage][metric] for run in runs if stage in run["scores"]]
            values = [value for value in values if value is not None]
            place = column + _SHIFTS[stage]
            axis.plot([place] * len(values), values, "o", color=_COLOURS[stage], markersize=4, label=stage)
            if values:
                axis.hlines(fmean(values), place - 0.1, place + 0.1, color=_COLOURS[stage])
        diverged = sum(run["diverged_at"] is not None for run in runs)
        if diverged:
            axis.text(
                column, 0.02, f"{diverged} diverged", transform=axis.get_xaxis_transform(), ha="center", color="#c03030"
            )
    axis.set_xticks(range(len(results)), [name.partition("-")[2] for name in results], rotation=20, fontsize="small")
    better = "higher is better" if metric == "accuracy" else "lower is better"
    axis.set_title(f"{group}: {metric.replace('_', ' ')} on test, {better}", fontsize="medium")
    axis.grid(axis="y", alpha=0.3)
