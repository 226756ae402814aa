"""The long-context part of a report: a table per suite, and the needle's heat map."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..report import Page
from .longbench_sets import CATEGORIES, LOCAL_SETS, SETS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "longbench_official": "LongBench (official protocol)",
    "longbench_official_e": "LongBench-E (official protocol)",
    "longbench_v2": "LongBench v2",
    "longbench_local": "longbench-local (a stand-in: no LongBench numbers)",
    "needle": "Needle in a haystack",
    "ruler_local": "RULER's families (worded here: no RULER numbers)",
}


def add_long_context(page: Page, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Add a section per suite.

    Args:
        page: Grows at its end.
        summaries: What `summarise` gives.
    """
    for suite, found in summaries.items():
        page.heading(_TITLES.get(suite, suite))
        page.paragraph(_remark(found))
        if suite == "longbench_v2":
            keys = ("overall", "easy", "hard", "short", "medium", "long", "answered", "overall_with_guesses")
            page.table([{key: found[key] for key in keys}], {key: key.replace("_", " ") for key in keys})
            continue
        if suite == "needle":
            page.plot(needle_figure(found["cells"]), caption="Share of needles found, in percent.")
        lengths = list(dict.fromkeys(key for row in found["lengths"].values() for key in row))
        page.table(
            _rows(found), {"set": "Set", "category": "Category", "score": "Score", **{key: key for key in lengths}}
        )
        if "categories" in found:
            means = {CATEGORIES[key]: value for key, value in found["categories"].items()}
            means |= {f"language {key}": value for key, value in found["languages"].items()}
            means |= {"mean of sets": found["mean_of_sets"], "mean of categories": found["mean_of_categories"]}
            page.table([{"what": key, "score": value} for key, value in means.items()], {"what": "", "score": "Score"})


def needle_figure(cells: list[Mapping[str, Any]]) -> "Figure":
    """Depth by length, coloured and labelled by score."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    # see-through: the labels take the page's colour, which must show on a light and on a dark page
    shades = LinearSegmentedColormap.from_list("found", [(0.30, 0.47, 0.66, 0.0), (0.30, 0.47, 0.66, 0.75)])

    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    scores = {(cell["depth"], cell["length"]): cell["score"] for cell in cells}
    grid = [[scores.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    figure = Figure(figsize=(1.6 + 0.8 * len(lengths), 1.4 + 0.36 * len(depths)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(grid, cmap=shades, vmin=0, vmax=100, edgecolors="#888888", linewidth=0.5)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:
                axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", fontsize="small")
    axes.set_xticks([place + 0.5 for place in range(len(lengths))], [f"{length:,}" for length in lengths])
    axes.set_yticks([place + 0.5 for place in range(len(depths))], [f"{depth:g}" for depth in depths])
    axes.invert_yaxis()
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth (%)")
    figure.colorbar(mesh, ax=axes, label="found (%)")
    return figure


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, score in found["sets"].items():
        item = SETS.get(name) or LOCAL_SETS.get(name)
        category = CATEGORIES[item.category] if item else None
        rows.append({"set": name, "category": category, "score": score, **found["lengths"].get(name, {})})
    if "mean_by_length" in found:
        rows.append({"set": "mean", "category": None, "score": found.get("mean_of_sets"), **found["mean_by_length"]})
    return rows


def _remark(found: Mapping[str, Any]) -> str:
    parts = [
        f"{found['num_documents']:,} prompts of {found['mean_prompt_tokens']:,} tokens on average "
        f"(longest {found['longest_prompt_tokens']:,}), {found['num_cut']:,} cut in the middle"
    ]
    if "templates" in found:
        parts.append(f"prompt templates: {found['templates']}")
    if "backend" in found:
        parts.append(f"code compared by {found['backend']}")
    if found["num_malformed"]:
        parts.append(f"{found['num_malformed']:,} malformed lines left out, first {found['malformed'][0]}")
    return "; ".join(parts) + "."
