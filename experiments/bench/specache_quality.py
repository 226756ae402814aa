"""What models recall and find with SpeCache and with other caches of equal device bytes.

First a small decoder that was trained to look symbols up, then SmolLM2-135M on words, then the same on real text. That
takes hours on two CPU cores: what every cache gave is kept in `runs/bench/specache-quality`, and a run that was stopped
goes on where it was. All answers lie there too, and the pictures.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..model_source import load_source
from ..specache.picture import draw
from ..specache.real_text import PERPLEXITY, QUICK, Score, Study, run_study, summary
from ..specache.recall import TRAINED, WORDS, mean_and_spread, run_recall
from ..specache.recall_map import draw_map, recall_map
from .registry import Settings
from .rows import Row, missing_peer, ratio

FOLDER = Path("runs", "bench", "specache-quality")
_CASES = {"longbench_local": "longbench-local", "needle": "needle", PERPLEXITY: PERPLEXITY}
# case of the rows, study
RECALLS = {"recall": TRAINED, "recall-words": WORDS}
_PEERS = ("full", "quantized", "kivi", "window", "h2o")


def run(settings: Settings) -> Iterator[Row]:
    """Rows by suite and bits: scores, decoded perplexity, device bytes, and gaps to the full cache."""
    for case, recall in RECALLS.items():
        if settings.quick:
            recall = replace(recall, seeds=(0,), num_prompts=1, num_keys=12, rows=(0, 32))
        recalled = run_recall(recall, FOLDER, _tell)
        (FOLDER / f"{case}.json").write_text(json.dumps(recalled, indent=1) + "\n", encoding="utf-8")
        yield from _recall_rows(recalled, case)
    study_of_map = replace(TRAINED, seeds=(0,), num_prompts=1) if settings.quick else TRAINED
    decoder = load_source(TRAINED.model, dtype=TRAINED.dtype).model  # type: ignore[arg-type]
    draw_map(recall_map(decoder, study_of_map), FOLDER / "specache_recall_map.png")
    study = QUICK if settings.quick else Study(seed=settings.seed)
    result = run_study(study, FOLDER, _tell)
    (FOLDER / "study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, FOLDER / "specache_quality.png")
    for suite, case in _CASES.items():
        scores = summary(result, suite)
        for bits in (2, 1):
            name = case if bits == 2 else f"{case} bits={bits}"
            yield from _rows(name, suite, bits, scores, result["missing"])
    for task in dict.fromkeys(batch["task"] for batch in result["batches"] if batch["suite"] == "longbench_local"):
        scores = summary(result, "longbench_local", task=task)
        for bits in (2, 1):
            yield from _rows(f"{task} bits={bits}", "longbench_local", bits, scores, result["missing"])
    for length in result["study"]["needle_lengths"]:
        scores = summary(result, "needle", length=length)
        for bits in (2, 1):
            yield from _rows(f"needle length={length} bits={bits}", "needle", bits, scores, result["missing"])


def _tell(line: str) -> None:
    print(f"specache-quality: {line}", flush=True)


def _recall_rows(result: dict[str, Any], case: str) -> Iterator[Row]:
    """Symbols looked up far back: by bits and peer, then by rows and by the levels of one bit."""
    count = len(result["study"]["seeds"])

    def row(name: str, metric: str, label: str, peer: str) -> Row:
        unit, better = ("share", True) if metric == "tokens" else ("nats", False)
        (value, spread), (other, _) = (mean_and_spread(result, each, metric) for each in (label, peer))
        return Row(f"{case} {name}", metric, value, unit, peer=peer, peer_value=other,
                   ratio=ratio(value, other, higher_is_better=better), repeats=count, spread=spread)  # fmt: skip

    for bits in (2, 1):
        ours = f"specache-{bits}"
        for metric in ("tokens", "nats", "divergence"):
            for peer in ("full", f"exact-fetch-{bits}", f"kivi-{bits}", f"window-{bits}", f"h2o-{bits}"):
                yield row(f"bits={bits}", metric, ours, peer)
        for rows in result["study"]["rows"]:
            yield row(f"bits={bits} rows={rows}", "divergence", f"{ours} k={rows}", "full")
        for metric in ("hit_ratio", "coverage_ratio"):
            value, spread = mean_and_spread(result, ours, metric)
            yield Row(f"{case} bits={bits}", metric, value, "share", repeats=count, spread=spread)
    yield row("bits=1 levels=centred", "divergence", "kivi-1-centred", "kivi-1")
    yield row("bits=1 levels=centred", "divergence", "specache-1", "specache-1-kivi-levels")


def _rows(case: str, suite: str, bits: int, scores: dict[str, Score], missing: dict[str, str]) -> Iterator[Row]:
    ours = scores[f"specache-{bits}"]
    perplexity = suite == PERPLEXITY
    metric, unit = ("perplexity", "per token") if perplexity else ("score", "of 100")
    row = Row(case, metric, _shown(ours, perplexity), unit, repeats=ours.count, spread=_spread(ours, perplexity))
    for peer in _PEERS:
        # transformers' quantized cache is asked for 2 bits only
        label = peer if peer == "full" else f"{peer}-{2 if peer == 'quantized' else bits}"
        if label not in scores:
            yield missing_peer(row, label, missing.get(label, "not run"))
            continue
        value = _shown(scores[label], perplexity)
        yield Row(
            **{**row.__dict__, "peer": label, "peer_value": value,
               "ratio": ratio(row.value, value, higher_is_better=not perplexity)}
        )  # fmt: skip
        yield Row(
            case, "device_bytes", ours.device_bytes, "bytes", peer=label, peer_value=scores[label].device_bytes,
            ratio=ratio(ours.device_bytes, scores[label].device_bytes), repeats=ours.count,
        )  # fmt: skip
    gap_unit = "nats" if perplexity else "points"
    yield Row(
        case, "gap_to_full", ours.gap, gap_unit, bound="goal", bound_value=None if perplexity else -1.0,
        repeats=ours.count, spread=ours.gap_error,
    )  # fmt: skip


def _shown(score: Score, perplexity: bool) -> float:
    return math.exp(score.mean) if perplexity else score.mean


def _spread(score: Score, perplexity: bool) -> float:
    """Standard error over prompts."""
    return math.exp(score.mean) * score.error if perplexity else score.error
