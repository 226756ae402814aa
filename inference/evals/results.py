"""Writes a results folder and prints the scores."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .long_context.report_sections import add_long_context
from .report import Page
from .scores import Score, score_figure, scores_of

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check the results folder, before time is spent on what goes in; nothing is made yet.

    Raises:
        FileExistsError: It holds results already and `overwrite` is off.
        NotADirectoryError: The path is a file.
        PermissionError: It cannot be written.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: --output names a folder")
    if (path / RESULTS_FILE).exists() and not overwrite:
        raise FileExistsError(f"{path} already holds {RESULTS_FILE}: choose another --output, or pass --overwrite")
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise PermissionError(f"{existing} cannot be written: choose another --output")
    return path


def write_results(
    results: Mapping[str, Any], folder: str | os.PathLike[str], *, log_samples: bool = True
) -> dict[str, Path]:
    """Write `results.json` (lm-eval's layout with a `tenfold` block), `samples_TASK.jsonl` and `report.html`.

    Each file is written under another name and renamed when whole, `results.json` last.

    Args:
        results: What `evaluate_model` returns.
        folder: Where the files go.
        log_samples: Whether to write the sample rows.

    Returns:
        Paths by file name.
    """
    from lm_eval.utils import handle_non_serializable

    def dumps(value: Any, **options: Any) -> str:
        return json.dumps(_plain(value), default=handle_non_serializable, ensure_ascii=False, **options)

    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = {}
    if log_samples:
        for task, rows in results.get("samples", {}).items():
            name = f"samples_{task.replace('/', '_')}.jsonl"
            written[name] = _write(target / name, "".join(dumps(row) + "\n" for row in rows))
    written[REPORT_FILE] = report_page(results).write(target / REPORT_FILE)
    aggregated = {key: value for key, value in results.items() if key != "samples"}
    written[RESULTS_FILE] = _write(target / RESULTS_FILE, dumps(aggregated, indent=2) + "\n")
    return written


def report_page(results: Mapping[str, Any]) -> Page:
    """A page with the scores, their plot, and what was run on what."""
    scores, extra = scores_of(results), results.get("tenfold", {})
    page = Page(f"Scores of {extra.get('model', 'a model')}", subtitle=_subtitle(extra))
    page.heading("Scores")
    page.table(
        [_row(score) for score in scores],
        {
            "task": "Task",
            "metric": "Metric",
            "score": "Score",
            "error": "± standard error",
            "chance": "Guess",
            "documents": "Documents",
            "shots": "Examples in prompt",
            "better": "Better",
        },
    )
    if scores:
        page.plot(score_figure(scores), caption="Bars show scores, whiskers one standard error, red marks a guess.")
    if by_suite := extra.get("long_context"):
        add_long_context(page, by_suite)
    page.heading("Provenance")
    page.table(_provenance(results), {"key": "", "value": ""})
    return page


def print_scores(results: Mapping[str, Any], *, console: Any = None) -> None:
    """Print the scores as a table.

    Args:
        results: What `evaluate_model` returns.
        console: A rich console; standard output when None.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if console is None:
        console = Console()
        # a pipe or a file has no width that names would have to fit
        console = console if console.is_terminal else Console(width=120)
    extra = results.get("tenfold", {})
    title = f"{extra.get('model', 'model')} ({_subtitle(extra)})"
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    rows = [_row(score) for score in scores_of(results)]
    headings = {"task": "task", "metric": "metric", "score": "score", "error": "± s.e.", "chance": "guess"}
    headings |= {"documents": "docs", "shots": "shots"}
    # columns that say nothing make way
    shown = [key for key in headings if key in ("task", "metric", "score", "error") or any(row[key] for row in rows)]
    for key in shown:
        justify: Any = "left" if key in ("task", "metric") else "right"
        grid.add_column(headings[key], justify=justify, overflow="fold")
    for row in rows:
        grid.add_row(*("" if row[key] is None else str(row[key]) for key in shown))
    console.print(grid)


def _row(score: Score) -> dict[str, Any]:
    arrow = {True: "higher", False: "lower", None: None}[score.higher_is_better]
    return {
        "task": score.task,
        "metric": score.metric if score.filter == "none" else f"{score.metric} ({score.filter})",
        "score": _digits(score.value),
        "error": None if score.standard_error is None else _digits(score.standard_error),
        "chance": None if score.chance is None else _digits(score.chance),
        "documents": score.num_documents,
        "shots": score.num_fewshot,
        "better": arrow,
    }


def _digits(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _subtitle(extra: Mapping[str, Any]) -> str:
    processes = extra.get("world_size", 1)
    known = (extra.get("dtype"), extra.get("device"), f"{processes} processes" if processes > 1 else None)
    return ", ".join(str(part) for part in known if part)


def _provenance(results: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    extra = results.get("tenfold", {})
    rows = [{"key": key.replace("_", " "), "value": value} for key, value in extra.items() if _is_plain(value)]
    for key in ("versions", "seeds", "seconds"):
        text = ", ".join(f"{name} {value}" for name, value in extra.get(key, {}).items())
        rows.append({"key": key, "value": text})
    for task, data in extra.get("data", {}).items():
        rows.append({"key": f"data of {task}", "value": f"{data['digest']} ({data['num_documents']:,} documents)"})
    return rows


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def _plain(value: Any) -> Any:
    """The value with what JSON has no word for (NaN, infinity) as null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path
