"""Prediction files of the official code: the same numbers as its `eval.py`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tenfold.inference.evals.long_context import metrics, score_predictions

GOLDEN = json.loads(Path(__file__).with_name("golden_predictions.json").read_text(encoding="utf-8"))


@pytest.fixture
def write_predictions(tmp_path: Path) -> Callable[..., Path]:
    def write(files: dict[str, list[Any]]) -> Path:
        for name, rows in files.items():
            lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
            (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return tmp_path

    return write


@pytest.mark.parametrize("by_length", [False, True], ids=["plain", "by-length"])
def test_scores_are_those_of_the_official_file(write_predictions: Callable[..., Path], by_length: bool) -> None:
    expected = GOLDEN["result_by_length" if by_length else "result"]
    if "difflib" not in metrics.code_similarity_backend():
        expected = {name: score for name, score in expected.items() if name != "lcc"}
    folder = write_predictions({name: GOLDEN["predictions"][name] for name in expected})
    assert score_predictions(folder, by_length=by_length) == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"hotpot": [{}]}, "'hotpot' is no set of LongBench; sets: narrativeqa"),
        ({"hotpotqa": ["{"]}, r"hotpotqa.jsonl:1: not JSON"),
        ({"hotpotqa": [{"pred": "x", "answers": []}, {"pred": "x"}]}, r"hotpotqa.jsonl:2: field 'answers' is missing"),
        ({"hotpotqa": []}, "holds no predictions"),
    ],
)
def test_bad_files_are_named(write_predictions: Callable[..., Path], files: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_predictions(write_predictions(files))


def test_an_empty_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no SET.jsonl in "):
        score_predictions(tmp_path)
