"""`tenfold fit` with coded checkpoints: one line of configuration, continued from the command line, exported."""

import csv
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from tenfold.callbacks.excp import load_checkpoint
from tenfold.callbacks.excp.container import is_save, read_identity, read_save
from tenfold.experiments.cli import main

TOYS = Path(__file__).parent
WIDTH = 512


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose `toy.yaml` asks for the plugin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TOYS), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("TENFOLD_RUN_FOLDER", raising=False)
    config = {
        "model": {"class_path": "toy_run.ToyModule", "init_args": {"width": WIDTH}},
        "data": {"class_path": "toy_run.ToyData", "init_args": {"width": WIDTH}},
        "checkpoint": {"every_n_train_steps": 10, "save_top_k": -1},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 30,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "plugins": {"class_path": "ExCPCheckpointIO", "init_args": {"options": {"min_numel": 256}}},
        },
    }
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "toy.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def fit(*flags: str) -> int:
    return main(["fit", "-c", "exp/toy.yaml", *flags])


def checkpoints(run: str = "toy") -> Path:
    return Path("runs/exp", run, "checkpoints")


def test_one_line_codes_every_checkpoint_and_logs_it(place: Path) -> None:
    assert fit() == 0
    names = sorted(path.name for path in checkpoints().glob("*.ckpt"))
    assert names == ["last.ckpt", "step10.ckpt", "step20.ckpt", "step30.ckpt"]
    assert all(is_save(checkpoints() / name) for name in names)
    assert load_checkpoint(checkpoints() / "last.ckpt")["global_step"] == 30
    with Path("runs/exp/toy/logs/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("ckpt/ratio")]
    assert [int(row["step"]) for row in rows] == [10, 20, 30]
    saved = yaml.safe_load(Path("runs/exp/toy/config.yaml").read_text())
    plugin = saved["trainer"]["plugins"]
    assert plugin["class_path"].endswith("ExCPCheckpointIO")
    assert plugin["init_args"]["options"]["min_numel"] == 256


def test_flags_reach_the_codec(place: Path) -> None:
    assert fit("--trainer.plugins.options.backend=lzma", "--trainer.plugins.key_frame_every=1") == 0
    paths = list(checkpoints().glob("step*.ckpt"))
    assert [read_identity(path).base_id for path in paths] == [None] * 3
    assert {read_save(path).header["options"]["backend"] for path in paths} == {"lzma"}


def test_a_run_is_continued_by_name_in_its_own_chain(place: Path) -> None:
    assert fit("--trainer.max_steps=20") == 0
    stored = load_checkpoint(checkpoints() / "last.ckpt")
    assert fit("--ckpt_path=last", "--trainer.max_steps=20") == 0
    # nothing was left to do, and what is saved is what was loaded
    again = load_checkpoint(checkpoints() / "last.ckpt")
    assert torch.equal(stored["state_dict"]["layer.weight"], again["state_dict"]["layer.weight"])
    with pytest.warns(UserWarning, match=f"model.init_args.width is {WIDTH} from the checkpoint"):
        assert fit("--ckpt_path=last", "--model.init_args.width=300") == 0
    assert load_checkpoint(checkpoints() / "last.ckpt")["global_step"] == 30
    assert not Path("runs/exp/toy-2").exists()
    chains = {read_identity(path).chain_id for path in checkpoints().glob("*.ckpt")}
    assert len(chains) == 1


def test_validation_and_best_read_coded_checkpoints(place: Path) -> None:
    assert fit("--checkpoint.monitor=val/loss", "--checkpoint.every_n_train_steps=null") == 0
    assert main(["validate", "-c", "exp/toy.yaml", "--ckpt_path=last"]) == 0
    assert main(["test", "-c", "exp/toy.yaml", "--ckpt_path=best"]) == 0


def test_a_missing_base_is_told_before_anything_is_built(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.max_steps=20") == 0
    for path in (checkpoints() / "excp").glob("*-key-*.excp"):
        path.unlink()
    (checkpoints() / "step10.ckpt").unlink()
    capsys.readouterr()
    assert fit("--ckpt_path=last") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if "is missing in" in line]) == 1
    assert sorted(path.name for path in checkpoints().glob("*.ckpt")) == ["last.ckpt", "step20.ckpt"]


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_strategies_that_read_past_the_plugin_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], strategy: str
) -> None:
    assert fit(f"--trainer.strategy={strategy}") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"strategy {strategy}" in message
    advised = re.search(r"--trainer.strategy=(\w+)", message)
    if advised:
        # what is advised is taken, and asks for an accelerator at most
        assert fit(f"--trainer.strategy={advised[1]}") == 1
        assert "non-CPU accelerator" in capsys.readouterr().err


def test_a_wrong_option_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.plugins.options.sparsity=2") == 2
    assert "sparsity=2.0 is out of range; use a fraction from 0 to below 1" in capsys.readouterr().err
