import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.experiments.commands.evaluate import main

TASKS = ["wikipedia_bits_per_byte", "wikipedia_title_cloze"]


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer.tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def articles() -> list[dict[str, str]]:
    names = [f"{first}{second}" for first in ("Alba", "Bren", "Cald", "Dorn") for second in ("mere", "ford", "wick")]
    body = "is a small town beside a slow river, known for its bridge, its market and {} old mills."
    return [{"title": name, "text": f"{name} {body.format(number + 2)}"} for number, name in enumerate(names)]


@pytest.fixture(scope="module")
def data(articles: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tenfold.inference import build_wikipedia_tasks

    path = tmp_path_factory.mktemp("data")
    build_wikipedia_tasks(articles, path)
    return path


def arguments(folder: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--model", str(folder), "--tasks", ",".join(TASKS), "--data-dir", str(data), "--output", str(output)),
        *more,
    ]


def test_prints_and_writes(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    more = ("--limit", "5", "--batch-size", "2", "--seed", "7", "--max-length", "64", "--no-log-samples")
    assert main(arguments(folder, data, output, *more)) == 0
    stored = json.loads((output / "results.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == ["report.html", "results.json"]
    assert stored["config"]["limit"] == 5
    assert set(stored["tenfold"]["seeds"].values()) == {7}
    assert stored["tenfold"]["max_length"] == 64
    printed = capsys.readouterr()
    assert f"{stored['results'][TASKS[0]]['bits_per_byte,none']:.4f}" in printed.out
    assert f"{stored['results'][TASKS[1]]['acc_norm,none']:.4f}" in printed.out
    assert f"results: {output}" in printed.out
    # nothing of other libraries' bars and remarks
    assert printed.err == ""


def test_held_out_articles_are_found_without_a_data_folder(
    folder: Path, articles: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tenfold.datamodules

    asked = []

    class Articles:
        def __init__(self, data: str, *, tokenizer: str) -> None:
            asked.append(data)

        def documents(self, split: str) -> list[dict[str, str]]:
            asked.append(split)
            return articles

    monkeypatch.setattr(tenfold.datamodules, "TextDataModule", Articles, raising=False)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    for run in ("a", "b"):
        command = ["--model", str(folder), "--tasks", "tenfold_wikipedia", "--output", str(tmp_path / run)]
        assert main(command) == 0
    assert asked == ["asset:wikipedia-summaries", "test"] * 2
    first, second = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("a", "b"))
    assert first["results"] == second["results"]
    assert first["tenfold"]["data"] == second["tenfold"]["data"]
    # the configuration names files that are still there
    (file,) = first["configs"][TASKS[0]]["dataset_kwargs"]["data_files"]["test"]
    assert len(Path(file).read_text().splitlines()) == len(articles)


def test_asset_names_are_resolved(folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.datamodules import assets

    monkeypatch.setattr(assets, "resolve", {"asset:some-model": str(folder)}.__getitem__)
    command = ["--model", "asset:some-model", "--tasks", TASKS[1], "--data-dir", str(data), "--limit", "2"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    assert stored["tenfold"]["model"] == "some-model"
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no asset is named"):
        main(["--model", "asset:smolm", "--tasks", TASKS[1], "--data-dir", str(data)])


def test_both_forms_of_mole_score_the_same(tiny_tokenizer: Any, data: Path, tmp_path: Path) -> None:
    from tenfold.lightning_modules import decoder_config
    from tenfold.lightning_modules.mole.convert import export_lookup
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoder_config("mole-tiny-4e", vocab_size=320)).eval()
    model.save_pretrained(tmp_path / "experts")
    tiny_tokenizer.tokenizer.save_pretrained(tmp_path / "experts")
    export_lookup(model, tmp_path / "lookup", tokenizer=tiny_tokenizer.tokenizer, dtype="float32")
    stored = {}
    for form in ("experts", "lookup"):
        assert main(arguments(tmp_path / form, data, tmp_path / f"scores-{form}")) == 0
        stored[form] = json.loads((tmp_path / f"scores-{form}" / "results.json").read_text())
    for task in TASKS:
        for key, value in stored["experts"]["results"][task].items():
            if isinstance(value, float):
                assert stored["lookup"]["results"][task][key] == pytest.approx(value, rel=1e-5), key
    assert stored["experts"]["tenfold"]["model_digest"] != stored["lookup"]["tenfold"]["model_digest"]


def test_offline_wandb(folder: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(arguments(folder, data, output, "--limit", "2", "--wandb", "tests", "--wandb-offline")) == 0
    assert list(output.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"--tasks": "wikipedia_bits_per_bite"}, ValueError, "nearest names: wikipedia_bits_per_byte"),
        ({"--tasks": ","}, ValueError, "no task is asked for"),
        ({"--model": "./nowhere"}, FileNotFoundError, "model folder './nowhere' does not exist"),
        ({"--tokenizer": "./nowhere"}, FileNotFoundError, "does not exist"),
        ({"--data-dir": "./nowhere"}, FileNotFoundError, "data folder nowhere does not exist"),
        ({"--include-path": "./nowhere"}, FileNotFoundError, "task folder nowhere does not exist"),
        ({"--max-length": "1"}, ValueError, "need at least 2"),
        ({"--limit": "-3"}, ValueError, "limit is -3"),
        ({"--batch-size": "x"}, ValueError, "batch_size is 'x'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_one_line_and_writes_nothing(
    folder: Path, data: Path, tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    options = {"--model": str(folder), "--tasks": TASKS[0], "--data-dir": str(data), "--output": str(tmp_path / "run")}
    command = [part for pair in (options | changes).items() for part in pair]
    with pytest.raises(error, match=re.escape(message)) as caught:
        main(command)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "command", [[], ["--model", "x"], ["--model", "x", "--tasks", "y", "--wandb-offline"], ["--dtype", "int3"]]
)
def test_incomplete_command_lines(command: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2


def test_lists_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list-tasks", "wiki"]) == 0
    names = capsys.readouterr().out.split()
    assert names[:2] == TASKS
    assert "wikitext" in names
    assert all("wiki" in name for name in names)


def test_console_script(folder: Path, data: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).parent / "tenfold"
    environment = dict(os.environ, TENFOLD_CACHE=str(tmp_path / "cache"))

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, "evaluate", *command], capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path
        )

    done = run("--model", str(folder), "--tasks", TASKS[1], "--data-dir", str(data), "--limit", "2")
    assert done.returncode == 0, done.stderr
    (output,) = (tmp_path / "runs" / "evaluate").iterdir()
    assert f"results: {output.relative_to(tmp_path)}" in done.stdout
    wrong = run("--model", str(tmp_path), "--tasks", TASKS[1], "--data-dir", str(data))
    assert wrong.returncode == 2
    assert "no config.json" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.eval
@pytest.mark.slow
def test_smollm2_scores_as_lm_eval_called_directly(
    require_asset: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model and real held-out text, through the command and through lm-eval alone."""
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from tenfold.inference.evals.task_selection import SHIPPED_FOLDER

    model = require_asset("smollm2-135m")
    require_asset("wikipedia-summaries")
    command = ["--model", "asset:smollm2-135m", "--tasks", ",".join(TASKS), "--limit", "12", "--batch-size", "4"]
    assert main([*command, "--output", str(tmp_path / "run")]) == 0
    stored = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in TASKS:
        config = yaml.safe_load((SHIPPED_FOLDER / f"{name}.yaml").read_text())
        files = stored["configs"][name]["dataset_kwargs"]["data_files"]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | {"dataset_kwargs": {"data_files": files}}))
    direct: Any = simple_evaluate(
        model=HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        limit=12,
    )
    assert stored["results"] == json.loads(json.dumps(direct["results"], default=float))
    # far better than a guess: the questions can be answered from the extract
    assert stored["results"][TASKS[1]]["acc_norm,none"] > 0.4
    assert stored["results"][TASKS[0]]["bits_per_byte,none"] < 1.5
