"""Bucket use of a model with hash tables while `tenfold evaluate` scores it: a picture and a table in `report.html`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..callbacks.bucket_use import EDGES, TableUse, draw, shares
from ..inference.evals.results import REPORT_FILE, report_page

# several hundred per row of a table of 2^10 rows: entropy is then exact to three digits
MAX_POSITIONS = 2**18


def has_hash_tables(folder: str | Path) -> bool:
    """Whether a model folder's configuration has memory layers."""
    try:
        fields = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(fields, dict):
        return False
    options = fields.get("feed_forward_options") or {}
    keyed = options.get("key", "sign_lsh") != "sign_lsh"
    return fields.get("projection") == "memory" or (fields.get("feed_forward") == "memory" and not keyed)


@contextmanager
def counting_buckets(uses: dict[str, TableUse]) -> Iterator[None]:
    """Count the buckets of every memory layer that runs meanwhile, whoever loads the model: `uses` by layer's name.

    The first `MAX_POSITIONS` positions of each layer count, padded ones among them.
    """
    known: dict[int, str] = {}
    positions: dict[str, int] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not hasattr(module, "reachable_buckets"):
            # the whole model runs before its layers do and knows their names
            if hasattr(module, "get_input_embeddings"):
                for name, part in module.named_modules():
                    known.setdefault(id(part), name.removeprefix("model."))
            return
        name = known.setdefault(id(module), f"table {len(known)}")
        use: Any = uses.get(name)
        if use is None:
            layer: Any = module
            use = uses[name] = TableUse(layer.num_bits, list(layer.reachable_buckets))
            positions[name] = 0
        if positions[name] < MAX_POSITIONS:
            positions[name] += inputs[0].shape[:-1].numel()
            with torch.no_grad():
                use.add(module.buckets(inputs[0]))  # type: ignore[operator]

    handle = register_module_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def add_bucket_use(results: Mapping[str, Any], uses: dict[str, TableUse], folder: Path) -> dict[str, float]:
    """Write `report.html` again with bucket use, and `bucket_use.json` beside it; gives entropy and dead rows.

    Args:
        results: what `evaluate_model` returned.
        uses: counts by layer.
        folder: where the results lie.
    """
    values = shares(uses)
    layers = [
        {
            "layer": name,
            "bits": use.num_bits,
            "entropy_share": float(use.entropy_share.mean()),
            "entropy_share_min": float(use.entropy_share.min()),
            "dead_rows": use.dead_rows,
            "rows": sum(use.reachable),
            "histogram": use.histogram,
        }
        for name, use in uses.items()
    ]
    page = report_page(results)
    page.heading("Bucket use")
    page.paragraph(
        f"Rows of hash tables that the scored text reached: entropy is {values['buckets/entropy_share']:.1%} of the "
        f"bits (lowest table {values['buckets/entropy_share_min']:.1%}), {values['buckets/dead_rows_share']:.1%} of "
        f"the rows were not reached."
    )
    if (figure := draw(uses, "")) is not None:
        page.plot(figure, caption="Left: hits of a table's rows, most used first. Right: entropy of each table's use.")
    columns = {
        "layer": "Layer",
        "bits": "Bits",
        "entropy_share": "Entropy, share of bits",
        "entropy_share_min": "Lowest table",
        "dead_rows": "Rows not reached",
        "rows": "of",
    }
    page.table(layers, columns)
    page.write(folder / REPORT_FILE)
    partial = folder / "bucket_use.json.partial"
    partial.write_text(
        json.dumps({**values, "histogram_edges": EDGES, "layers": layers}, indent=2) + "\n", encoding="utf-8"
    )
    partial.replace(folder / "bucket_use.json")
    return values
