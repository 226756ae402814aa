"""Runs benchmarks, shows their rows and writes them to JSON."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .environment import environment
from .registry import Settings, load
from .rows import Row
from .timing import WrongResult

OK, FAILURE = 0, 1


def run_benches(
    names: Sequence[str], settings: Settings, *, show: Callable[[str, Row], None] | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run benchmarks one after the other.

    Args:
        names: registered names.
        settings: device and size.
        show: called with the benchmark's name and every row as it comes.

    Returns:
        The results in the layout of the JSON, and one message per benchmark that refused to report.
    """
    results, refusals = [], []
    for name in names:
        facts = environment(settings.device)
        rows = []
        try:
            for row in load(name)(settings):
                rows.append(asdict(row))
                if show is not None:
                    show(name, row)
        except WrongResult as error:
            refusals.append(f"{name}: {error}")
            continue
        results.append({"bench": name, "environment": facts, "rows": rows})
    return results, refusals


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    """Write one result as an object, several as a list; under the final name there is a whole file or none."""
    text = json.dumps(results[0] if len(results) == 1 else results, indent=1, ensure_ascii=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cells(row: Row) -> list[str]:
    against = row.peer or "-"
    theirs = row.reason or _number(row.peer_value)
    spread = f" ± {_number(row.spread)}" if row.spread is not None else ""
    limit = f"{_number(row.bound_value)} ({row.bound})" if row.bound else "-"
    return [
        row.case,
        row.metric,
        f"{_number(row.value)}{spread} {row.unit}",
        against,
        theirs,
        _number(row.ratio),
        limit,
    ]


HEADINGS = ["case", "metric", "ours", "peer", "peer's", "ratio", "bound"]


def plain_line(name: str, row: Row) -> str:
    """A row as one line of text."""
    case, metric, ours, peer, theirs, quotient, limit = _cells(row)
    return f"{name} | {case} | {metric} {ours} | {peer} {theirs} | ratio {quotient} | bound {limit}"


def _show_tables(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        facts = result["environment"]
        where = facts["gpu"]["name"] if facts["gpu"] else f"{facts['cpu']}, {facts['threads']} threads"
        table = Table(title=f"{result['bench']} on {where}, torch {facts['torch']} (ratio above 1: ours is better)")
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading in ("ours", "peer's", "ratio") else "left")
        for row in result["rows"]:
            table.add_row(*_cells(Row(**row)))
        console.print(table)


def run_and_report(names: Sequence[str], settings: Settings, json_path: Path | None) -> int:
    """Run, show (tables on a terminal, plain lines elsewhere) and save.

    Returns:
        Exit status: 1 when a benchmark refused to report; what the others measured is shown and saved all the same.

    Raises:
        FileNotFoundError: the folder of `json_path` does not exist; nothing is run then.
    """
    if json_path is not None and not json_path.parent.is_dir():
        raise FileNotFoundError(f"{json_path}: the folder {json_path.parent} does not exist; make it first")
    if sys.stdout.isatty():
        from rich.console import Console

        with Console().status("measuring") as status:
            results, refusals = run_benches(
                names, settings, show=lambda name, row: status.update(f"{name}: {row.case} {row.metric}")
            )
        _show_tables(results)
    else:
        results, refusals = run_benches(
            names, settings, show=lambda name, row: print(plain_line(name, row), flush=True)
        )
    if json_path is not None and results:
        write_json(json_path, results)
        print(f"results in {json_path}")
    for refusal in refusals:
        print(f"tenfold bench: {refusal}", file=sys.stderr)
    return FAILURE if refusals else OK
