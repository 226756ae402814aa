"""Bits per byte and bucket entropy of small decoders on the same tokens, three seeds: `experiments/memoryformer`.

Runs are kept in `runs/memoryformer-quality`; what is there is not trained again. Started several times, the command
spreads the runs over its processes.
"""

from collections.abc import Iterator
from pathlib import Path

from ..kept_runs import mean_and_spread
from ..memoryformer.quality import QUICK, SEEDS, VARIANTS, Study, runs
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
    for name, results in runs(study, FOLDER).all(names, seeds).items():
        for metric, (unit, higher) in METRICS.items():
            if metric not in results[0]["metrics"]:
                continue
            samples = [result["metrics"][metric] for result in results]
            mean, spread = mean_and_spread(samples)
            theirs = baseline.get(metric)
            if name == names[0]:
                baseline[metric] = mean
            yield Row(
                f"{name} parameters={results[0]['parameters']}",
                metric.replace("val/", "").replace("/", "_"),
                mean,
                unit,
                peer=None if theirs is None else names[0],
                peer_value=theirs,
                ratio=None if theirs is None else ratio(mean, theirs, higher_is_better=higher),
                repeats=len(samples),
                spread=spread,
            )
