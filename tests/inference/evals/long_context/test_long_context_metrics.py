"""Metrics against what the official scorer gives, quirk by quirk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tenfold.inference.evals.long_context import metrics

GOLDEN = json.loads(Path(__file__).with_name("golden_scores.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['metric']}: {case['what']}")
def test_golden_score(case: dict[str, Any]) -> None:
    if case["metric"] == "code_similarity" and "difflib" not in metrics.code_similarity_backend():
        pytest.skip("golden scores of code are those of difflib")
    found = metrics.score(case["metric"], case["prediction"], [case["reference"]], classes=case["classes"])
    assert found == pytest.approx(case["score"], abs=1e-12)


def test_every_metric_has_golden_cases() -> None:
    from typing import get_args

    assert {case["metric"] for case in GOLDEN} == set(get_args(metrics.MetricName))


def test_best_reference_counts() -> None:
    assert metrics.score("qa_f1", "Lisbon", ["Porto", "Lisbon", "Faro"]) == 1.0
    assert metrics.score("qa_f1", "Lisbon", []) == 0.0
    assert metrics.score("classification", "City", ["Food", "City"], classes=["City", "Food"]) == 1.0


@pytest.mark.parametrize(
    ("answer", "line"),
    [("\n\nCity\nQuestion: x", "City"), ("City", "City"), ("", ""), ("\n\n", ""), (" \nCity", " "), ("a\r\nb", "a\r")],
)
def test_first_line(answer: str, line: str) -> None:
    assert metrics.first_line(answer) == line


@pytest.mark.parametrize(
    ("response", "choice"),
    [
        ("The correct answer is (B)", "B"),
        ("The correct answer is C.", "C"),
        ("**The correct answer is (D)**", "D"),
        ("The correct answer is *A*", "A"),
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("The correct answer is: (B)", None),
        ("B", None),
        ("", None),
        # brackets anywhere win over an earlier letter without
        ("The correct answer is A. No: The correct answer is (B)", "B"),
    ],
)
def test_choice_of_longbench_v2(response: str, choice: str | None) -> None:
    assert metrics.extract_choice(response) == choice


def test_substrings_as_ruler_counts_them() -> None:
    assert metrics.contains("It is 4471203.", "4471203") == 1.0
    assert metrics.contains("ORCHARD-pebble", "orchard-Pebble") == 1.0
    assert metrics.contains("44712", "4471203") == 0.0
    assert metrics.contains("", "x") == 0.0
    # control characters are line ends there
    assert metrics.contains("a\tb", "a\nb") == 1.0
    assert metrics.contains_all("one two", ["one", "two", "three", "four"]) == 0.5


def test_rouge_1_recall_is_the_share_of_distinct_reference_words() -> None:
    assert metrics.rouge_1_recall("eat a sandwich in the park", "a sandwich in the sun sun") == pytest.approx(4 / 5)
    assert metrics.rouge_1_recall("", "a sandwich") == 0.0


def test_means_are_summed_and_rounded_like_the_official_files() -> None:
    scores = np.random.default_rng(0).random(1001).tolist()
    total = 0.0
    for value in scores:
        total += value
    assert metrics.mean_percent(scores) == round(100 * total / len(scores), 2)
    assert metrics.mean_percent(scores, pairwise=True) == round(100 * np.mean(scores), 2)
    assert metrics.mean_percent([1, 0, 0], digits=1) == 33.3
    assert metrics.mean_percent([]) is None


def test_a_reference_without_paragraph_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the reference 'third' names no paragraph"):
        metrics.retrieval("3", "third")


@pytest.mark.parametrize(
    ("package", "names"),
    [("jieba", ["qa_f1_zh"]), ("rouge", ["rouge_l"]), ("fuzzywuzzy", ["code_similarity"]), ("jieba", ["rouge_l_zh"])],
)
def test_a_missing_package_is_named(package: str, names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    for cached in (metrics._jieba, metrics._rouge, metrics._fuzz):
        cached.cache_clear()
    try:
        with pytest.raises(ValueError, match=rf"the package {package} is not installed .* pip install"):
            metrics.check_packages(names)
    finally:
        for cached in (metrics._jieba, metrics._rouge, metrics._fuzz):
            cached.cache_clear()
