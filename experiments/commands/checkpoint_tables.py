"""What `tenfold checkpoint inspect` shows: tables of tensors and of a chain, and a picture of the chain."""

import sys
from pathlib import Path
from typing import Any

import torch

from ...callbacks.excp.container import is_save, read_identity, read_save
from ...callbacks.excp.report import ParameterReport
from ...callbacks.excp.sharded import ExCPStorageReader
from ...callbacks.excp.store import store_of

Row = dict[str, Any]


def newest(folder: Path) -> Path:
    """The youngest coded checkpoint of a folder.

    Raises:
        ValueError: there is none.
    """
    found = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".") and is_save(path)]
    if not found:
        raise ValueError(f"{folder} has no coded checkpoints; a sharded one is told by its files, one per process")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def tensor_rows(path: Path, *, by_parameter: bool = False, weights_only: bool = True) -> list[Row]:
    """A row per group of parameters whose names differ in numbers only, or per parameter; the last is all together."""
    report = read_save(path, weights_only=weights_only).report
    parts = {part.name: part for part in report.parameters} if by_parameter else report.by_group()
    return [_tensor_row(name, part) for name, part in parts.items()] + [_tensor_row("all", report.total)]


def _tensor_row(name: str, part: ParameterReport) -> Row:
    numel = max(part.numel, 1)
    return {
        "tensor": name,
        "elements": f"{part.numel:,}",
        "stored as": " ".join(part.kinds),
        "zero weights": f"{part.weight_zero_ratio:.1%}",
        "zero momentum": f"{part.momentum_zero_ratio:.1%}",
        "bits each": f"{8 * part.coded_bytes / numel:.3f}",
        "bytes": f"{part.coded_bytes:,}",
        "times smaller": f"{part.raw_bytes / part.coded_bytes:.1f}" if part.coded_bytes else "",
        "error / step": f"{part.error_over_step:.3f}",
        "first update": f"{part.update_ratio:.2f}",
        "note": "; ".join(part.notes),
    }


def chain_rows(path: Path, *, weights_only: bool = True) -> list[Row]:
    """The saves from the checkpoint's key frame to itself, and those after it in the same chain."""
    identity = read_identity(path, weights_only=weights_only)
    store = store_of(path)
    entries = [entry for entry in store.entries().values() if identity.chain_id.startswith(entry.chain_id)]
    rows = []
    for entry in sorted(entries, key=lambda entry: entry.position):
        encoded = read_save(entry.path, weights_only=weights_only)
        report = encoded.report
        rows.append(
            {
                "save": entry.save_id[:8],
                "step": encoded.rest.get("global_step", ""),
                "kind": "repeats " + (entry.base_id or "")[:8]
                if encoded.alias
                else "key frame"
                if report.key_frame
                else "residual",
                "file bytes": entry.path.stat().st_size,
                "times smaller": None if encoded.alias else round(report.raw_bytes / entry.path.stat().st_size, 2),
                "error / step": None if encoded.alias or report.key_frame else round(report.total.error_over_step, 4),
                "largest error / step": None
                if encoded.alias or report.key_frame
                else round(report.largest_error_over_step, 4),
                "first update": None if encoded.alias else round(report.total.update_ratio, 3),
                "this one": "<-" if identity.save_id.startswith(entry.save_id) else "",
            }
        )
    return rows


def print_rows(title: str, rows: list[Row]) -> None:
    """A table on a terminal, tab-separated lines elsewhere."""
    if not rows:
        return
    shown = [key for key in rows[0] if any(row[key] not in ("", None) for row in rows)]
    text = [["" if row[key] is None else str(row[key]) for key in shown] for row in rows]
    if not sys.stdout.isatty():
        print(f"{title}\n" + "\t".join(shown))
        for line in text:
            print("\t".join(line))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*shown, title=title, title_justify="left")
    for line in text:
        table.add_row(*line)
    Console().print(table)


def write_report(path: Path, tensors: list[Row], chain: list[Row], output: Path) -> None:
    """An HTML page with both tables and a picture of ratio and error along the chain."""
    from matplotlib.figure import Figure

    from ...inference.evals.report import Page

    saves = [row for row in chain if row["times smaller"] is not None]
    figure = Figure(figsize=(7, 4.2))
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(saves))
    above.bar(places, [row["times smaller"] for row in saves])
    above.set_ylabel("times smaller")
    below.plot(places, [row["error / step"] or 0.0 for row in saves], marker="o", label="all weights")
    below.plot(places, [row["largest error / step"] or 0.0 for row in saves], marker="^", label="worst tensor")
    below.axhline(1.0, linestyle="--", linewidth=0.8)
    below.set_ylabel("error / step")
    below.set_xticks(list(places), [str(row["step"]) for row in saves])
    below.set_xlabel("global step of the save")
    below.legend()
    page = Page(f"Checkpoint {path.name}", subtitle=str(path.parent.name))
    page.plot(figure, caption="Size and error of the saves of the chain. Key frames hold weights exactly.")
    page.heading("Saves")
    page.table(chain, list(chain[0]))
    page.heading("Tensors of this checkpoint")
    page.table(tensors, list(tensors[0]))
    page.write(output)


def load_sharded(path: Path, *, workers: int, weights_only: bool) -> dict[str, Any]:
    """A sharded checkpoint as one dictionary in the layout of Lightning."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    reader = ExCPStorageReader(path, workers=workers)
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    optimisers = [state.pop(key) for key in sorted(state) if key.startswith("optimizer_")]
    meta = path / "meta.pt"
    rest = torch.load(meta, map_location="cpu", weights_only=weights_only) if meta.exists() else {}
    return rest | state | ({"optimizer_states": optimisers} if optimisers else {})
