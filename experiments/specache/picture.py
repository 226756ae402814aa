"""Pictures of the studies."""

from pathlib import Path
from statistics import fmean
from typing import Any

from .real_text import PERPLEXITY, summary


def draw(result: dict[str, Any], path: Path) -> None:
    """Scores by cache with standard errors, and the share of needles found by depth.

    Args:
        result: What `run_study` gives.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.8))
    for axis, suite, title in zip(
        axes, ("longbench_local", "needle", PERPLEXITY), ("longbench-local", "needle", "decoded perplexity (nats)"),
        strict=False,
    ):  # fmt: skip
        scores = summary(result, suite)
        labels = list(scores)
        colours = ["#666666" if not label[-1].isdigit() else _COLOURS[int(label[-1])] for label in labels]
        errors = [0.0 if score.error != score.error else score.error for score in scores.values()]
        axis.barh(labels, [score.mean for score in scores.values()], xerr=errors, color=colours)
        axis.invert_yaxis()
        count = next(iter(scores.values())).count if scores else 0
        axis.set_title(f"{title}, {count} prompts", fontsize="medium")
    _needles(result, axes[3], figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_COLOURS = {1: "#d98c3f", 2: "#3f7fd9"}


def _needles(result: dict[str, Any], axis: Any, figure: Any) -> None:
    """Caches by length and depth, coloured by the share of needles found."""
    found: dict[str, dict[tuple[int, float], list[float]]] = {}
    for record in result["batches"]:
        if record["suite"] != "needle":
            continue
        for label, values in record["methods"].items():
            for depth, score in zip(record["depths"], values["scores"], strict=True):
                found.setdefault(label, {}).setdefault((record["length"], depth), []).append(100 * score)
    columns = sorted({column for cells in found.values() for column in cells})
    grid = [[fmean(cells[column]) for column in columns] for cells in found.values()]
    if not grid:
        return
    mesh = axis.pcolormesh(grid, cmap="RdYlGn", vmin=0, vmax=100, edgecolors="#888888", linewidth=0.5)
    axis.set_yticks([place + 0.5 for place in range(len(found))], list(found))
    names = [f"{length}\n{depth:g} %" for length, depth in columns]
    axis.set_xticks([place + 0.5 for place in range(len(columns))], names, fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xlabel("tokens of the prompt, depth of the needle")
    figure.colorbar(mesh, ax=axis, label="found (%)")
