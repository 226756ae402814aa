"""Lookup experts added to SmolLM2-135M against plain fine-tuning at equal compute: `experiments/mole/adapters.py`.

Runs are kept in `runs/mole-adapter`; what is there is not trained again. Started several times, the command spreads the
runs over its processes. The picture is `runs/mole-adapter/mole-adapter.png`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...datamodules.assets import find_asset
from ..kept_runs import mean_and_spread
from ..mole.adapters import QUICK, SEEDS, VARIANTS, Study, runs
from ..mole.picture import Panel, draw
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/mole-adapter")
METRICS = {"loss": "nats", "bits_per_byte": "bits/byte"}
QUICK_VARIANTS = ("frozen", "feed-forward", "token-4e")


def run(settings: Settings) -> Iterator[Row]:
    """A row per variant and metric: mean over seeds, with the largest less the smallest as the spread.

    The peer of every variant is the model as it came; `feed-forward` has the trained parameters of `token-4e`. Then,
    with the first seed, every exported table against the form that was trained.
    """
    missing = [name for name in ("smollm2-135m", "wikipedia-summaries") if find_asset(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not there: tenfold assets get {' '.join(missing)}"
        yield Row("token-4e", "loss", float("nan"), "nats", reason=reason)
        return
    study = QUICK if settings.quick else Study()
    seeds = SEEDS[:1] if settings.quick else SEEDS
    names = QUICK_VARIANTS if settings.quick else tuple(VARIANTS)
    done = runs(study, FOLDER).all([name for name in names if name != "frozen"], seeds)
    # nothing in it is random
    done["frozen"] = runs(study, FOLDER).all(["frozen"], SEEDS[:1])["frozen"]
    for name in names:
        yield from _rows(name, done[name], done["frozen"][0])
    values = {name: [result["bits_per_byte"] for result in done[name]] for name in names if name != "frozen"}
    panel = Panel(
        "bits per byte of held-out text after equal multiply-adds: lower is better",
        values,
        done["frozen"][0]["bits_per_byte"],
        "before training",
    )
    draw([panel], FOLDER / "mole-adapter.png")


def _rows(name: str, results: list[dict[str, Any]], frozen: dict[str, Any]) -> Iterator[Row]:
    first = results[0]
    case = (
        f"{name} trained={first['trained_parameters']} multiply-adds={first['multiply_adds']:.3g} "
        f"tokens={first['tokens']} rate={first['learning_rate']:g}"
    )
    is_peer = name == "frozen"
    for metric, unit in METRICS.items():
        mean, spread = mean_and_spread([result[metric] for result in results])
        yield Row(
            case,
            metric,
            mean,
            unit,
            peer=None if is_peer else "frozen",
            peer_value=None if is_peer else frozen[metric],
            ratio=None if is_peer else ratio(mean, frozen[metric]),
            repeats=len(results),
            spread=spread,
        )
    seconds, spread = mean_and_spread([result["train_seconds"] for result in results])
    yield Row(case, "train_seconds", seconds, "s", repeats=len(results), spread=spread)
    for quantisation, table in first.get("tables", {}).items():
        yield Row(
            f"{name} table={quantisation} bytes={table['table_bytes']}",
            "loss",
            table["loss"],
            "nats",
            peer="trained form",
            peer_value=first["loss"],
            ratio=ratio(table["loss"], first["loss"]),
        )
        yield Row(f"{name} table={quantisation}", "relative_rms_error", table["relative_rms_error"], "")
