"""Average precision of small detectors with LayerNorm, PRepBN and fused PRepBN in the backbone: three seeds.

`experiments/slab/detection.py` trains them. Runs are kept in `runs/slab-detection`; what is there is not trained again.
Some test scenes with their boxes go into `runs/slab-detection/slab-detection-scenes.png`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..kept_runs import mean_and_spread
from ..slab.detection import QUICK, SEEDS, VARIANTS, Study, data_of, runs
from ..slab.scene_picture import draw_scenes
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs/slab-detection")
METRICS = ("map", "map_50", "map_75")


def run(settings: Settings) -> Iterator[Row]:
    """A row per variant and metric: mean over seeds, with the largest less the smallest as the spread."""
    study = QUICK if settings.quick else Study()
    seeds = SEEDS[:1] if settings.quick else SEEDS
    results = runs(study, FOLDER).all(VARIANTS, seeds)
    draw_scenes(data_of(study, 0).folder(), FOLDER / "slab-detection-scenes.png")
    first = VARIANTS[0]
    shown: dict[str, list[dict[str, Any]]] = {**results, "prepbn-fused": [run["fused"] for run in results["prepbn"]]}
    for name, found in shown.items():
        for metric in METRICS:
            mean, spread = mean_and_spread([result["scores"][metric] for result in found])
            theirs, _ = mean_and_spread([result["scores"][metric] for result in results[first]])
            yield Row(
                f"rt-detr swin {name} parameters={found[0]['parameters']} test-scenes={study.test}",
                metric,
                mean,
                "",
                peer=None if name == first else first,
                peer_value=None if name == first else theirs,
                ratio=None if name == first else ratio(mean, theirs, higher_is_better=True),
                repeats=len(found),
                spread=spread,
            )
    for metric in ("max_logit_difference", "max_box_difference"):
        values = [result[metric] for result in shown["prepbn-fused"]]
        yield Row("rt-detr swin prepbn fused against unfused", metric, max(values), "", repeats=len(values))
