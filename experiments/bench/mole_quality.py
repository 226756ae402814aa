"""Held-out loss and lm-eval scores of small decoders on the same tokens, three seeds: `experiments/mole/quality.py`.

Runs are kept in `runs/mole-quality`; what is there is not trained again. Started several times, the command spreads the
runs over its processes.
"""

from collections.abc import Iterator
from pathlib import Path

from ..kept_runs import mean_and_spread
from ..mole.quality import QUICK, SEEDS, VARIANTS, Study, runs
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/mole-quality")
METRICS = {
    "wikipedia_bits_per_byte": ("bits_per_byte,none", "bits/byte", False),
    "wikipedia_title_cloze": ("acc,none", "", True),
}


def run(settings: Settings) -> Iterator[Row]:
    """A row per variant and metric: mean over seeds, with the largest less the smallest as the spread."""
    study = QUICK if settings.quick else Study()
    seeds = SEEDS[:1] if settings.quick else SEEDS
    names = ["dense", "mole-4e", "bigram-4e"] if settings.quick else list(VARIANTS)
    baseline: dict[str, float] = {}
    for name, results in runs(study, FOLDER).all(names, seeds).items():
        values = {"val_loss": ([result["val_loss"] for result in results], "nats", False)}
        for task, (metric, unit, higher) in METRICS.items():
            values[task] = ([result["scores"][task][metric] for result in results], unit, higher)
        for metric, (samples, unit, higher) in values.items():
            mean, spread = mean_and_spread(samples)
            theirs = baseline.setdefault(metric, mean)
            yield Row(
                f"{name} parameters={results[0]['parameters']}",
                metric,
                mean,
                unit,
                peer=None if name == names[0] else names[0],
                peer_value=None if name == names[0] else theirs,
                ratio=None if name == names[0] else ratio(mean, theirs, higher_is_better=higher),
                repeats=len(samples),
                spread=spread,
            )
