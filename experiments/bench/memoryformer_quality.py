"""Bits per byte and bucket entropy of small decoders on the same tokens, three seeds: `experiments/memoryformer`.

Runs are kept in `runs/memoryformer-quality`; what is there is not trained again.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

from ..memoryformer.quality import QUICK, SEEDS, VARIANTS, Study, run_one
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/memoryformer-quality")
METRICS = {
    "val/bits_per_byte": ("bits/byte", False),
    "buckets/entropy_share": ("", True),
    "buckets/dead_rows_share": ("", False),
}


def run(settings: Settings) -> Iterator[Row]:
    """A row per variant and metric: mean over seeds, with the largest less the smallest as the spread."""
    study = QUICK if settings.quick else Study()
    seeds = SEEDS[:1] if settings.quick else SEEDS
    names = ["dense", "tau-8"] if settings.quick else list(VARIANTS)
    baseline: dict[str, float] = {}
    for name in names:
        runs = [run_one(name, seed, study, FOLDER) for seed in seeds]
        for metric, (unit, higher) in METRICS.items():
            if metric not in runs[0]["metrics"]:
                continue
            samples = [result["metrics"][metric] for result in runs]
            mean = statistics.fmean(samples)
            theirs = baseline.get(metric)
            if name == names[0]:
                baseline[metric] = mean
            yield Row(
                f"{name} parameters={runs[0]['parameters']}",
                metric.replace("val/", "").replace("/", "_"),
                mean,
                unit,
                peer=None if theirs is None else names[0],
                peer_value=theirs,
                ratio=None if theirs is None else ratio(mean, theirs, higher_is_better=higher),
                repeats=len(samples),
                spread=max(samples) - min(samples),
            )
