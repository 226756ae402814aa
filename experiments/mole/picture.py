"""Picture of a study: a panel per metric, a column per variant, a point per seed, a bar at their mean."""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

_POINT, _LEVEL = "#3f7fd9", "#c03030"


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        title: what was measured, in which unit.
        values: of the seeds, by variant, in the order of the columns.
        level: what to compare all with, such as a guess; none drawn where None.
        level_name: what that is.
    """

    title: str
    values: dict[str, list[float]]
    level: float | None = None
    level_name: str = ""


def draw(panels: list[Panel], path: Path) -> None:
    """Write a PNG file, one panel below the other.

    Raises:
        ValueError: no panels, or a variant without values.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("there is no panel to draw")
    columns = max(len(panel.values) for panel in panels)
    figure = Figure(figsize=(1.5 + 0.95 * columns, 0.4 + 2.3 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for column, (variant, values) in enumerate(panel.values.items()):
            if not values:
                raise ValueError(f"variant {variant!r} has no values for {panel.title!r}")
            axis.plot([column] * len(values), values, "o", color=_POINT, markersize=4, alpha=0.7)
            axis.hlines(fmean(values), column - 0.25, column + 0.25, color=_POINT)
        if panel.level is not None:
            axis.axhline(panel.level, color=_LEVEL, linestyle="--", linewidth=1)
            axis.annotate(panel.level_name, (0.995, panel.level), xycoords=("axes fraction", "data"), ha="right",
                          va="bottom", color=_LEVEL, fontsize="x-small")  # fmt: skip
        axis.set_xticks(range(len(panel.values)), list(panel.values), rotation=15, fontsize="small")
        axis.set_title(panel.title, fontsize="medium", loc="left")
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
