"""Training resumed three times in a row from coded saves: loss and first update against an exact resume.

One row per mode and decay rate of the second moment, over all seeds; see `experiments/excp/resume_quality.py`. All runs
and the picture go to `runs/bench/excp-resume`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from ..excp.resume_quality import BETA2S, EXACT, QUICK, Study, draw, run_study
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs", "bench", "excp-resume")
LOSS_LIMIT, UPDATE_LIMIT = 0.02, 1.5


def run(settings: Settings) -> Iterator[Row]:
    """Rows by mode and beta2: loss and update after resumes, final losses, size and error of the saves."""
    study = QUICK if settings.quick else Study()
    result = run_study(study, FOLDER, lambda line: print(f"excp-resume: {line}", flush=True))
    (FOLDER / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, FOLDER / "rate_distortion.png")
    for beta2 in BETA2S:
        runs = [each for each in result["runs"] if each["beta2"] == beta2]
        exact = {each["seed"]: each for each in runs if each["mode"] == EXACT}
        for mode in study.modes:
            chosen = [each for each in runs if each["mode"] == mode]
            resumes = [resume for each in chosen for resume in each["resumes"]]
            case = f"{mode} beta2={beta2}"
            count = len(resumes)
            excess = [resume["loss"] - resume["exact_loss"] for resume in resumes]
            steps = f"loss_excess_{study.watched_steps}_steps"
            yield Row(
                case, f"{steps}_mean", fmean(excess), "nats", bound="limit", bound_value=LOSS_LIMIT, repeats=count,
                spread=max(excess) - min(excess),
            )  # fmt: skip
            yield Row(
                case, f"{steps}_largest", max(excess), "nats", bound="limit", bound_value=LOSS_LIMIT, repeats=count
            )
            worst = max(resumes, key=lambda resume: resume["update"] / resume["exact_update"])
            yield Row(
                case, "first_update_largest", worst["update"], "learning rates", peer="exact_resume",
                peer_value=worst["exact_update"], ratio=ratio(worst["update"], worst["exact_update"]),
                bound="limit", bound_value=UPDATE_LIMIT * worst["exact_update"], repeats=count,
            )  # fmt: skip
            for metric in ("train_loss", "held_out_loss"):
                tail = study.tail_steps
                pairs = [
                    (each["held_out_loss"], exact[each["seed"]]["held_out_loss"])
                    if metric == "held_out_loss"
                    else (fmean(each["losses"][-tail:]), fmean(exact[each["seed"]]["losses"][-tail:]))
                    for each in chosen
                ]
                mine, other = (fmean(values) for values in zip(*pairs, strict=True))
                gaps = [a - b for a, b in pairs]
                yield Row(
                    case, f"final_{metric}", mine, "nats", peer="uninterrupted", peer_value=other,
                    ratio=ratio(mine, other), repeats=len(pairs), spread=max(gaps) - min(gaps),
                )  # fmt: skip
            for metric, unit in (
                ("ratio", "x"), ("bits_per_parameter", "bits"), ("error_over_step", "of the step"),
                ("largest_error_over_step", "of the step"),
            ):  # fmt: skip
                yield Row(case, metric, fmean(resume[metric] for resume in resumes), unit, repeats=count)
