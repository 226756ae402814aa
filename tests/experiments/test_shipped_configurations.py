"""Every shipped YAML parses against the real signatures, and every tiny run works."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tenfold.experiments.cli import main

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def content(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def names_a_model(path: Path) -> bool:
    model = content(path).get("model")
    return isinstance(model, str) or (isinstance(model, dict) and "class_path" in model)


def chains() -> list[list[Path]]:
    """The files of each run: a folder's base first; a file without a model of its own goes on top of a run."""
    found = []
    for folder in sorted({path.parent for path in EXPERIMENTS.glob("*/*.yaml")}):
        # sweeps and jobs are not for this command
        files = [path for path in sorted(folder.glob("*.yaml")) if {"model", "data", "trainer"} & content(path).keys()]
        base = [path for path in files if path.name == "base.yaml"]
        runs = [path for path in files if names_a_model(path)]
        found += [[*base, path] for path in runs]
        found += [[*base, run, path] for path in files if path not in [*base, *runs] for run in runs]
    return found


def short(files: list[Path]) -> str:
    return f"{files[0].parent.name}/{'+'.join(path.stem for path in files)}"


def flags(files: list[Path]) -> list[str]:
    return [part for path in files for part in ("-c", str(path))]


def test_every_file_is_in_some_run():
    for path in EXPERIMENTS.glob("*/*.yaml"):
        if {"model", "data", "trainer"} & content(path).keys():
            assert any(path in files for files in chains()), f"no run uses {path.relative_to(EXPERIMENTS)}"


@pytest.mark.parametrize("files", chains(), ids=short)
def test_it_parses_and_prints_what_it_says(files, capsys):
    assert main(["fit", *flags(files), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given: dict[str, Any] = {}
    for path in files:
        given |= {k: v for k, v in content(path).get("trainer", {}).items() if isinstance(v, (int, float, str))}
    assert given.items() <= printed["trainer"].items()
    assert printed["data"] is not None


@pytest.mark.parametrize("files", [files for files in chains() if files[-1].stem.startswith("tiny")], ids=short)
def test_a_tiny_one_runs(files, tmp_path, monkeypatch, require_asset):
    for path in files:
        source = str((content(path).get("data") or {}).get("init_args", {}).get("data", ""))
        if source.startswith("asset:"):
            require_asset(source.removeprefix("asset:"))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *flags(files), "--trainer.fast_dev_run=true", "--trainer.accelerator=cpu"]) == 0
