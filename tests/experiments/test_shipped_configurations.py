"""Every shipped YAML parses against the real signatures, and every tiny one runs."""

from pathlib import Path

import pytest
import yaml
from tenfold.experiments.cli import main

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def is_run(path: Path) -> bool:
    """Whether a file configures a run, rather than a sweep or a job."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return isinstance(content, dict) and "model" in content


RUNS = [path for path in sorted(EXPERIMENTS.glob("*/*.yaml")) if is_run(path)]
TINY = [path for path in RUNS if path.name.startswith("tiny")]


def short(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", RUNS, ids=short)
def test_it_parses_and_prints_what_it_says(path, capsys):
    assert main(["fit", "-c", str(path), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    name = given["model"]["class_path"] if isinstance(given["model"], dict) else given["model"]
    assert printed["model"]["class_path"].endswith(name.rpartition(".")[2])
    for key, value in given.get("trainer", {}).items():
        if isinstance(value, (int, float, str)):
            assert printed["trainer"][key] == value


@pytest.mark.parametrize("path", TINY, ids=short)
def test_a_tiny_one_runs(path, tmp_path, monkeypatch, require_asset):
    data = str(
        (yaml.safe_load(path.read_text(encoding="utf-8")).get("data") or {}).get("init_args", {}).get("data", "")
    )
    if data.startswith("asset:"):
        require_asset(data.removeprefix("asset:"))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "-c", str(path), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0
