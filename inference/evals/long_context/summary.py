"""Scores of the long-context suites by set, category, length and depth, in percent, out of lm-eval's sample rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from .longbench_sets import BUCKETS, CATEGORIES, bucket_of
from .longbench_v2 import DIFFICULTIES, LENGTHS
from .metrics import mean_percent

Rows = Sequence[Mapping[str, Any]]


def summarise(samples: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries by suite.

    Args:
        samples: lm-eval's sample rows by task.
        metadata: What the tasks tell about themselves, by task; tasks of other origin are left out.
    """
    suites: dict[str, dict[str, Rows]] = {}
    for name, about in metadata.items():
        if name in samples:
            suites.setdefault(about["suite"], {})[name] = samples[name]
    makers: dict[str, Callable[..., dict[str, Any]]] = {
        "longbench_v2": _longbench_v2,
        "needle": _needle,
        "ruler_local": _by_length,
        "longbench_local": _longbench_local,
        "longbench_official": _longbench,
        "longbench_official_e": _longbench_e,
    }
    return {suite: {**makers[suite](tasks, metadata), **_about(tasks, metadata)} for suite, tasks in suites.items()}


def _about(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for found in tasks.values() for row in found]
    described = [metadata[name] for name in tasks]
    about: dict[str, Any] = {
        "num_documents": len(rows),
        "mean_prompt_tokens": round(fmean(row["prompt_tokens"] for row in rows), 1),
        "longest_prompt_tokens": int(max(row["prompt_tokens"] for row in rows)),
        "num_cut": sum(row["removed_tokens"] > 0 for row in rows),
        "num_malformed": sum(len(item.get("malformed", ())) for item in described),
        "malformed": [line for item in described for line in item.get("malformed", ())][:20],
    }
    for key in ("templates", "backend", "seed"):
        if found := sorted({str(item[key]) for item in described if key in item}):
            about[key] = ", ".join(found)
    return about


def _scores(rows: Iterable[Mapping[str, Any]]) -> list[float]:
    return [row["score"] for row in rows]


def _longbench(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    sets = {metadata[name]["set"]: mean_percent(_scores(rows)) for name, rows in tasks.items()}
    about = {metadata[name]["set"]: metadata[name] for name in tasks}
    return {
        "sets": sets,
        "lengths": {
            metadata[name]["set"]: _by(rows, lambda row: bucket_of(row["doc"]["length"]), BUCKETS)
            for name, rows in tasks.items()
        },
        **_means(sets, about),
    }


def _longbench_e(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = _longbench(tasks, metadata)
    # a set's score in LongBench-E is the mean of its buckets
    found["sets"] = {
        name: _rounded_mean(value for value in by_bucket.values() if value is not None)
        for name, by_bucket in found["lengths"].items()
    }
    about = {metadata[name]["set"]: metadata[name] for name in tasks}
    return {**found, **_means(found["sets"], about), "mean_by_length": _columns(found["lengths"], BUCKETS)}


def _longbench_local(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = _longbench(tasks, metadata)
    lengths = sorted({row["doc"]["max_tokens"] for rows in tasks.values() for row in rows})
    found["lengths"] = {
        metadata[name]["set"]: _by(rows, lambda row: row["doc"]["max_tokens"], lengths) for name, rows in tasks.items()
    }
    return {**found, "mean_by_length": _columns(found["lengths"], lengths)}


def _longbench_v2(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for found in tasks.values() for row in found]
    parts = {
        **_by(rows, lambda row: row["doc"]["difficulty"], DIFFICULTIES, digits=1, pairwise=False),
        **_by(rows, lambda row: row["doc"]["length"], LENGTHS, digits=1, pairwise=False),
    }
    # what the official code gives with `compensated`: a guess's worth for answers without a letter
    compensated = [row["score"] if row["answered"] else 0.25 for row in rows]
    return {
        "overall": mean_percent(_scores(rows), digits=1),
        **parts,
        "overall_with_guesses": mean_percent(compensated, digits=1),
        "answered": mean_percent([row["answered"] for row in rows], digits=1),
        "sets": {"longbench_v2": mean_percent(_scores(rows), digits=1)},
    }


def _needle(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for found in tasks.values() for row in found]
    cells: dict[tuple[int, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["doc"]["length"], row["doc"]["depth"]), []).append(row)
    return {
        "cells": [
            {
                "length": length,
                "depth": depth,
                "score": mean_percent(_scores(found)),
                "rouge_1_recall": mean_percent([row["rouge_1_recall"] for row in found]),
                "num_documents": len(found),
            }
            for (length, depth), found in sorted(cells.items())
        ],
        "sets": {"needle": mean_percent(_scores(rows))},
        "rouge_1_recall": mean_percent([row["rouge_1_recall"] for row in rows]),
        "lengths": {"needle": _by(rows, lambda row: row["doc"]["length"], sorted({length for length, _ in cells}))},
    }


def _by_length(tasks: Mapping[str, Rows], metadata: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    lengths = sorted({row["doc"]["length"] for rows in tasks.values() for row in rows})
    by_length = {
        metadata[name]["set"]: _by(rows, lambda row: row["doc"]["length"], lengths) for name, rows in tasks.items()
    }
    return {
        "sets": {metadata[name]["set"]: mean_percent(_scores(rows)) for name, rows in tasks.items()},
        "lengths": by_length,
        "mean_by_length": _columns(by_length, lengths),
    }


def _by(
    rows: Rows,
    key_of: Callable[[Mapping[str, Any]], Any],
    keys: Sequence[Any],
    *,
    digits: int = 2,
    pairwise: bool = True,
) -> dict[str, float | None]:
    """Mean percentages by key, None where there is no row."""
    return {
        str(key): mean_percent(_scores(row for row in rows if key_of(row) == key), digits=digits, pairwise=pairwise)
        for key in keys
    }


def _means(sets: Mapping[str, float | None], about: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sets: of each category and language, of all, and of the categories."""

    def of(key: str, value: str) -> float | None:
        return _rounded_mean(score for name, score in sets.items() if about[name][key] == value and score is not None)

    categories = {name: of("category", name) for name in CATEGORIES}
    languages = {name: of("language", name) for name in ("en", "zh")}
    return {
        "categories": {name: value for name, value in categories.items() if value is not None},
        "languages": {name: value for name, value in languages.items() if value is not None},
        "mean_of_sets": _rounded_mean(value for value in sets.values() if value is not None),
        "mean_of_categories": _rounded_mean(value for value in categories.values() if value is not None),
    }


def _columns(table: Mapping[str, Mapping[str, float | None]], keys: Sequence[Any]) -> dict[str, float | None]:
    return {
        str(key): _rounded_mean(row[str(key)] for row in table.values() if row.get(str(key)) is not None)
        for key in keys
    }


def _rounded_mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(fmean(found), 2) if found else None
