"""The demo's page and its `summary.json`."""

import csv
import datetime
import json
import platform
from pathlib import Path
from typing import Any

from ...inference.evals.report import Page
from .stages import LOOKUP, MODELS, TASKS

FORM_NAMES = {
    "dense": "dense",
    "moe": "MoE, top 2 of 10",
    "mole": "MoLE, experts",
    LOOKUP: "MoLE, lookup table",
}
METRICS = {
    TASKS[0]: ("bits_per_byte", "byte_perplexity"),
    TASKS[1]: ("acc", "acc_norm"),
}


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Values by metric name from all launches of a run; a continued run's later values win."""
    curves: dict[str, dict[int, float]] = {}
    files = sorted(folder.glob("logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name.split("_")[1]))
    for file in files:
        with open(file, newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    if value and "/" in name:
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(points.items()) for name, points in curves.items()}


def summarise(demo: Any, scores: dict[str, Any], comparison: dict[str, Any], costs: dict[str, Any]) -> dict[str, Any]:
    """Everything that the page shows, as plain data."""
    import torch
    import transformers

    held_out = {}
    for name in MODELS:
        curves = read_curves(demo.path("train", name))
        held_out[name] = {metric: curves[metric][-1][1] for metric in curves if metric.startswith("val/")}
    return {
        "scores": {
            "dense": {"experts": scores["dense"]},
            "moe": {"experts": scores["moe"]},
            "mole": {"experts": scores["mole"], "lookup": scores[LOOKUP]},
        },
        **comparison,
        "held_out": held_out,
        "held_out_order": sorted(held_out, key=lambda name: held_out[name]["val/loss"]),
        "costs": costs,
        "seconds": demo.seconds | {"total": round(sum(demo.seconds.values()), 2)},
        "settings": {"size": demo.size, "seed": demo.seed, "max_steps": demo.max_steps, "limit": demo.limit},
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "platform": platform.platform(),
            "processor": _processor(),
            "torch_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def write_report(demo: Any, summary: dict[str, Any]) -> None:
    """Write `summary.json` and `report.html` into the demo's folder."""
    page = Page("Tenfold demo", subtitle="Dense, MoE and MoLE decoders on Wikipedia summaries")
    environment = summary["environment"]
    equal = summary["lookup_equals_experts"]
    page.paragraph(
        f"Three decoders that activate about the same number of parameters per token saw the same tokens (seed "
        f"{summary['settings']['seed']}). MoLE's experts were then written into a lookup table on disk. Both forms of "
        f"MoLE differ by at most {equal['max_abs_logit_diff']:.2e} in a logit and gave "
        f"{equal['identical_greedy_tokens']} of {equal['greedy_tokens']} greedy tokens alike."
    )
    page.heading("Loss")
    page.plot(_loss_figure(demo), caption="Next-token loss on the training batches, running mean of 5 logged values.")
    order = summary["held_out_order"]
    page.paragraph("Held-out loss from best to worst: " + ", ".join(order) + ". One seed: small gaps mean nothing.")
    page.table(
        [[FORM_NAMES[name], *(summary["held_out"][name].get(metric) for metric in HELD_OUT)] for name in order],
        {"model": "Model"} | HELD_OUT,
        caption="Validation documents, packed to the training length.",
    )
    page.heading("Scores through lm-eval, on test documents")
    page.table(
        [
            [FORM_NAMES[form]]
            + [_with_error(_scores(summary, form)[task], metric) for task in TASKS for metric in METRICS[task]]
            for form in FORM_NAMES
        ],
        ["Form", *(metric.replace("_", " ") for task in TASKS for metric in METRICS[task])],
        caption=f"{TASKS[0]}, then {TASKS[1]} with four choices, where guessing gives 0.25; ± standard error.",
    )
    page.plot(_score_figure(summary), caption="Whiskers are one standard error.")
    page.heading("What each form costs")
    page.table(
        [
            {
                "form": FORM_NAMES[form],
                "parameters": cost["parameters"],
                "activated": cost["activated_parameters"],
                "storage": cost["storage_bytes"],
                "table": cost["table_bytes_per_token"],
                "ms": f"{cost['decode_ms_per_token']['median']:.2f} ± {cost['decode_ms_per_token']['spread']:.2f}",
            }
            for form, cost in summary["costs"].items()
        ],
        {
            "form": "Form",
            "parameters": "Parameters in memory",
            "activated": "Activated per token",
            "storage": "Bytes on disk",
            "table": "Table bytes read per token",
            "ms": "Decode, ms per token (median ± quartile range)",
        },
        caption=f"Greedy decoding at batch 1, the forms taking turns, on {environment['processor']}. The table is "
        f"memory-mapped and warm in the file cache. MoLE's bytes per token were counted: "
        f"{summary['bytes_per_token']['counted']:,.0f}, the formula says {summary['bytes_per_token']['formula']:,}.",
    )
    page.heading("Time")
    page.table(list(summary["seconds"].items()), ["Stage", "Seconds"])
    page.heading("Provenance")
    rows = summary["environment"] | summary["settings"]
    page.table([[key.replace("_", " "), str(value)] for key, value in rows.items() if value is not None], ["", "Value"])
    partial = demo.path("summary.json.partial")
    partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    page.write(demo.path("report.html"))
    partial.replace(demo.path("summary.json"))


HELD_OUT = {"val/loss": "Loss, nats per token", "val/perplexity": "Perplexity", "val/bits_per_byte": "Bits per byte"}


def _scores(summary: dict[str, Any], form: str) -> dict[str, Any]:
    if form == LOOKUP:
        return summary["scores"]["mole"]["lookup"]
    return summary["scores"][form]["experts"]


def _with_error(metrics: dict[str, float], name: str) -> str:
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:,.4f}" + ("" if error is None else f" ± {error:.4f}")


def _loss_figure(demo: Any) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name in MODELS:
        # none when there were fewer steps than lie between two logged values
        points = read_curves(demo.path("train", name)).get("train/loss", [])
        steps = [step for step, _ in points]
        values = [value for _, value in points]
        means = [sum(values[max(0, i - 4) : i + 1]) / (i + 1 - max(0, i - 4)) for i in range(len(values))]
        axes.plot(steps, means, label=FORM_NAMES[name].split(",")[0])
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _score_figure(summary: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (task, metric) in zip(panels, ((TASKS[0], "bits_per_byte"), (TASKS[1], "acc")), strict=True):
        for row, form in enumerate(FORM_NAMES):
            metrics = _scores(summary, form)[task]
            axes.barh(row, metrics[metric], xerr=metrics.get(f"{metric}_stderr"), color=f"C{min(row, 2)}", height=0.6)
        axes.set_yticks(range(len(FORM_NAMES)), FORM_NAMES.values() if axes is panels[0] else [""] * len(FORM_NAMES))
        axes.invert_yaxis()
        axes.set_title(metric.replace("_", " ") + (" (lower is better)" if metric == "bits_per_byte" else ""))
    panels[1].axvline(0.25, linestyle="--", color="gray")
    return figure
