"""Scores prediction files of the official LongBench code, to compare runs made elsewhere."""

import json
import os
from pathlib import Path
from typing import Any

from . import metrics
from .longbench_sets import BUCKETS, SETS, bucket_of


def score_predictions(folder: str | os.PathLike[str], *, by_length: bool = False) -> dict[str, Any]:
    """What the official `eval.py` writes to `result.json` for a folder of its `SET.jsonl` files.

    Args:
        folder: Folder of files whose lines hold `pred`, `answers`, `all_classes` and, for LongBench-E, `length`.
        by_length: Whether scores are given by LongBench-E's buckets.

    Returns:
        Percentages by set, or by set and bucket (None for an empty bucket, where the official file has NaN).

    Raises:
        FileNotFoundError: The folder holds no such file.
        ValueError: A file is no set's, or a line is malformed.
    """
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"no SET.jsonl in {folder}: name a folder that LongBench's pred.py wrote")
    return {path.stem: _score_file(path, by_length=by_length) for path in paths}


def _score_file(path: Path, *, by_length: bool) -> Any:
    if path.stem not in SETS:
        raise ValueError(f"{path}: {path.stem!r} is no set of LongBench; sets: {', '.join(SETS)}")
    item = SETS[path.stem]
    with open(path, encoding="utf-8") as file:
        rows = [_row(line, f"{path}:{number}", by_length) for number, line in enumerate(file, 1)]
    if not rows:
        raise ValueError(f"{path} holds no predictions")
    # the official scorer keeps those of the last line
    classes = rows[-1].get("all_classes") or []
    scores = []
    for row in rows:
        answer = metrics.first_line(row["pred"]) if item.first_line else row["pred"]
        scores.append(metrics.score(item.metric, answer, row["answers"], classes=classes))
    if not by_length:
        return metrics.mean_percent(scores)
    buckets: dict[str, list[float]] = {name: [] for name in BUCKETS}
    for row, score in zip(rows, scores, strict=True):
        buckets[bucket_of(row["length"])].append(score)
    return {name: metrics.mean_percent(found, pairwise=True) for name, found in buckets.items()}


def _row(line: str, where: str, by_length: bool) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg})") from error
    wanted = {"pred": str, "answers": list} | ({"length": (int, float)} if by_length else {})
    for name, kind in wanted.items():
        if not isinstance(row, dict) or not isinstance(row.get(name), kind):
            raise ValueError(f"{where}: field {name!r} is missing or of another kind")
    return row
