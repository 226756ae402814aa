"""`tenfold fit` and its sisters on a small model: continuing, announcing, saving, stopping."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tenfold.experiments.cli import main

TOYS = Path(__file__).parent
BASE = {
    "model": {"class_path": "toy_run.ToyModule"},
    "data": {"class_path": "toy_run.ToyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 30,
        "log_every_n_steps": 1,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    },
}
TENFOLD = Path(sys.executable).with_name("tenfold")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with `toy.yaml`, in which the toy classes can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(TOYS), os.environ.get("PYTHONPATH")))))
    monkeypatch.delenv("TENFOLD_RUN_FOLDER", raising=False)
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "toy.yaml").write_text(yaml.safe_dump(BASE))
    return tmp_path


def fit(*flags: str, command: str = "fit") -> int:
    return main([command, "-c", "exp/toy.yaml", *flags])


def signal_at(step: int, what: str, where: str = "train") -> list[str]:
    values = {"step": step, "what": what, "where": where}
    return ["--trainer.callbacks+=toy_run.SignalAt", *(f"--trainer.callbacks.{k}={v}" for k, v in values.items())]


def last(run: str) -> dict:
    return torch.load(f"runs/exp/{run}/checkpoints/last.ckpt", weights_only=True)


def curve(run: str) -> dict[int, str]:
    found = {}
    for path in sorted(Path("runs/exp", run).glob("logs/*/metrics.csv")):
        with path.open(newline="") as file:
            found |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    return found


def assert_same_end(run: str, other: str) -> None:
    one, two = last(run), last(other)
    assert one["global_step"] == two["global_step"]
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer_states"], two["optimizer_states"], rtol=0, atol=0)


def test_a_run_leaves_its_configuration_metrics_and_last_checkpoint(place, capsys):
    assert fit() == 0
    out = capsys.readouterr().out
    assert out.endswith("last checkpoint: runs/exp/toy/checkpoints/last.ckpt\n")
    run = place / "runs" / "exp" / "toy"
    assert last("toy")["global_step"] == 30
    assert list(curve("toy")) == list(range(30))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "toy_run.ToyModule"
    assert saved["run"]["name"] == "toy"
    assert saved["seed_everything"] == 0
    assert saved["weights_only"] is True


def test_the_saved_configuration_repeats_the_run(place):
    assert fit("--model.init_args.learning_rate=0.1") == 0
    assert main(["fit", "-c", "runs/exp/toy/config.yaml"]) == 0
    assert curve("toy") == curve("toy-2")
    assert_same_end("toy", "toy-2")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("between-intervals", ["--checkpoint.every_n_train_steps=7"]),
        ("no-interval-reached", ["--checkpoint.every_n_train_steps=1000"]),
        ("in-the-middle-of-an-epoch", []),
        ("validation-never-ran", ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=7"]),
        ("no-validation-data", ["--data.init_args.validate=false", "--trainer.val_check_interval=5"]),
        ("monitor-never-logged", ["--trainer.val_check_interval=1.0", "--checkpoint.monitor=val/other"]),
        ("by-epochs", ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--checkpoint.every_n_train_steps=7"]),
        ("nothing-else-kept", ["--checkpoint.save_top_k=0", "--checkpoint.every_n_train_steps=7"]),
        ("accumulated", ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=15"]),
    ],
)
def test_last_checkpoint_is_there_and_current_however_training_ended(place, name, flags):
    if name == "monitor-never-logged":
        flags = [*flags, "--trainer.limit_val_batches=0"]
    assert fit(f"--run.name={name}", *flags) == 0
    assert last(name)["global_step"] == {"accumulated": 15, "by-epochs": 24}.get(name, 30)
    names = {path.name for path in Path("runs/exp", name, "checkpoints").iterdir()}
    assert all(re.fullmatch(r"last\.ckpt|step\d+\.ckpt", name) for name in names), names


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss"])
def test_the_best_by_a_metric_are_kept_under_plain_names(place, monitor):
    assert fit(f"--checkpoint.monitor={monitor}", "--checkpoint.save_top_k=2", "--trainer.val_check_interval=5") == 0
    names = {path.name for path in Path("runs/exp/toy/checkpoints").iterdir()}
    assert len(names) == 3
    assert all(re.fullmatch(r"last\.ckpt|step\d+\.ckpt", name) for name in names), names
    state = next(v for k, v in last("toy")["callbacks"].items() if k.startswith("RunCheckpoint"))
    assert {Path(p).name for p in state["best_k_models"]} == names - {"last.ckpt"}
    assert fit("--ckpt_path=best", command="test") == 0


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--checkpoint.every_n_train_steps=5"],
        ["--checkpoint.every_n_train_steps=1000"],
        ["--checkpoint.monitor=val/loss"],
        ["--trainer.limit_val_batches=0"],
        ["--trainer.limit_val_batches=0", "--checkpoint.every_n_train_steps=6"],
        ["--trainer.val_check_interval=6"],
        ["--trainer.check_val_every_n_epoch=2"],
    ],
    ids=lambda flags: "+".join(flag.partition(".")[2] for flag in flags) or "default",
)
@pytest.mark.parametrize("steps", [12, 17])
def test_a_continued_run_equals_an_uninterrupted_one(place, flags, steps):
    assert fit("--run.name=whole", "--trainer.max_steps=40", *flags) == 0
    # an epoch has 12 batches, so 17 lies in the middle of the second one
    assert fit("--run.name=parts", f"--trainer.max_steps={steps}", *flags) == 0
    assert fit("--run.name=parts", "--trainer.max_steps=40", "--ckpt_path=last", *flags) == 0
    assert_same_end("whole", "parts")
    assert curve("whole") == curve("parts")
    assert not Path("runs/exp/parts-2").exists()


@pytest.mark.parametrize(
    ("what", "where", "step", "status"),
    [
        ("SIGTERM", "train", 7, 143),
        ("SIGTERM", "update", 14, 143),
        ("SIGINT", "train", 7, 130),
        ("SIGINT", "update", 7, 130),
        ("SIGTERM", "val", 12, 143),
        ("SIGINT", "val", 12, 130),
    ],
)
def test_a_stopped_run_is_saved_and_continues_exactly(place, what, where, step, status):
    assert fit("--run.name=whole") == 0
    # at their first step the optimiser's state is new; saving is left to the stop
    flags = ["--run.name=stopped", "--checkpoint.every_n_train_steps=1000"]
    done = subprocess.run(
        [TENFOLD, "fit", "-c", "exp/toy.yaml", *flags, *signal_at(step, what, where)], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert "--ckpt_path last` continues" in done.stderr
    stopped_at = step if where == "val" else step + 1
    assert last("stopped")["global_step"] == stopped_at
    assert fit(*flags, "--ckpt_path=last") == 0
    assert_same_end("whole", "stopped")
    assert curve("whole") == curve("stopped")


def test_a_second_interrupt_stops_at_once_and_saves_nothing_half_updated(place):
    code = (
        "import signal, time, torch, toy_run\n"
        "from tenfold.experiments.cli import main\n"
        "step = torch.optim.AdamW.step\n"
        "def interrupt():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        # two signals at once would be one: the first has to be handled before the second comes
        "    time.sleep(0.1)\n"
        "def interrupted(self, closure=None):\n"
        "    loss = step(self, closure)\n"
        "    if int(self.state[self.param_groups[0]['params'][0]]['step']) == 6:\n"
        "        interrupt(), interrupt()\n"
        "    return loss\n"
        "torch.optim.AdamW.step = interrupted\n"
        "raise SystemExit(main(['fit', '-c', 'exp/toy.yaml', '--checkpoint.every_n_train_steps=4']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert last("toy")["global_step"] == 4


def test_a_failing_step_keeps_what_was_learned(place, capsys):
    assert fit(*signal_at(9, "error")) == 1
    assert "RuntimeError: the step failed" in capsys.readouterr().err
    assert last("toy")["global_step"] == 9


def test_an_error_in_validation_alone_saves_nothing(place):
    assert fit("--trainer.max_steps=5") == 0
    before = sorted(str(p) for p in Path("runs").rglob("*.ckpt"))
    assert fit(*signal_at(0, "error", "val"), "--ckpt_path=last", command="validate") == 1
    assert sorted(str(p) for p in Path("runs").rglob("*.ckpt")) == before


def test_hyper_parameters_from_the_checkpoint_are_announced(place):
    assert fit("--model.init_args.learning_rate=0.2", "--trainer.max_steps=5") == 0
    with pytest.warns(UserWarning, match=r"model\.init_args\.learning_rate is 0\.2 from .*, not 0\.5") as caught:
        assert fit("--ckpt_path=last", "--model.init_args.learning_rate=0.5", "--trainer.max_steps=6") == 0
    announced = [w for w in caught if "from the checkpoint" in str(w.message)]
    assert len(announced) == 1
    assert last("toy")["hyper_parameters"]["learning_rate"] == 0.2


def test_each_overridden_key_is_announced_once(place):
    assert fit("--model.init_args.options={a: 1, b: 2}", "--trainer.max_steps=2") == 0
    flags = ["--model.init_args.options={a: 1, b: 3}", "--model.init_args.learning_rate=0.5"]
    with pytest.warns(UserWarning, match="from the checkpoint") as caught:
        assert fit("--ckpt_path=last", *flags, "--trainer.max_steps=3") == 0
    lines = sorted(str(w.message).split(" is ")[0] for w in caught if "from the checkpoint" in str(w.message))
    assert lines == ["model.init_args.learning_rate", "model.init_args.options.b"]


def test_the_configuration_can_win_over_the_checkpoint(place):
    assert fit("--trainer.max_steps=5") == 0
    flags = ["--run.hyper_parameters=config", "--model.init_args.learning_rate=0.5", "--trainer.max_steps=6"]
    assert fit("--ckpt_path=last", *flags) == 0
    assert last("toy")["hyper_parameters"]["learning_rate"] == 0.5


def test_nothing_to_continue_from_is_wrong_input(place, capsys):
    assert fit("--ckpt_path=last") == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("tenfold fit: error: --ckpt_path last: no runs/exp/toy*/checkpoints/last.ckpt")
    assert not Path("runs").exists()
    assert fit("--ckpt_path=auto", "--trainer.max_steps=2") == 0
    assert fit("--ckpt_path=auto", "--trainer.max_steps=4") == 0
    assert last("toy")["global_step"] == 4


@pytest.mark.parametrize("kind", ["missing", "cut", "text", "objects"])
def test_an_unreadable_checkpoint_is_wrong_input(place, kind, capsys):
    path = place / "some.ckpt"
    if kind == "cut":
        torch.save({"state_dict": {"w": torch.ones(1000)}}, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("hello")
    elif kind == "objects":
        torch.save({"state_dict": {}, "hyper_parameters": {"a": subprocess.Popen}}, path)
    assert fit(f"--ckpt_path={path}") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(path) in line
    assert "--ckpt_path" in line
    assert not Path("runs").exists()


def test_a_second_run_with_wandb_takes_its_own_folder(place):
    assert fit("--run.wandb=offline", "--trainer.max_steps=3") == 0
    assert fit("--run.wandb=offline", "--trainer.max_steps=3") == 0
    ids = [Path("runs/exp", run, "wandb_id.txt").read_text().strip() for run in ("toy", "toy-2")]
    assert ids[0] != ids[1]
    for run, name in zip(("toy", "toy-2"), ids, strict=True):
        assert Path("runs/exp", run, "config.yaml").is_file()
        assert list(Path("runs/exp", run, "wandb").glob(f"offline-run-*-{name}"))
    # a continued run goes on under its own id and keeps both configurations
    assert fit("--run.wandb=offline", "--trainer.max_steps=5", "--ckpt_path=last") == 0
    assert len(list(Path("runs/exp/toy-2/wandb").glob(f"offline-run-*-{ids[1]}"))) >= 1
    assert Path("runs/exp/toy-2/config-2.yaml").is_file()


def test_a_list_in_a_later_file_replaces_and_a_plus_appends(place, capsys):
    one = {"trainer": {"callbacks": [{"class_path": "PlainProgress", "init_args": {"every_n_steps": 3}}]}}
    two = {"trainer": {"callbacks": [{"class_path": "GracefulInterrupt"}]}}
    (place / "one.yaml").write_text(yaml.safe_dump(one))
    (place / "two.yaml").write_text(yaml.safe_dump(two))
    (place / "plus.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": two["trainer"]["callbacks"]}}))

    def printed(*flags):
        assert fit(*flags, "--print_config") == 0
        callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        return [entry["class_path"].rpartition(".")[2] for entry in callbacks]

    assert printed("-c", "one.yaml", "-c", "two.yaml") == ["GracefulInterrupt"]
    assert printed("-c", "one.yaml", "-c", "plus.yaml") == ["PlainProgress", "GracefulInterrupt"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (
            ["--model.init_args.widht=3"],
            "model: Option 'widht' is not accepted by toy_run.ToyModule; did you mean width?",
        ),
        (["--model=CausalLMModul"], "model: there is no class 'CausalLMModul'; did you mean CausalLMModule"),
        (["--trainer.max_steps=many"], "trainer.max_steps"),
        (["--trainer.accelerator=abacus"], "the trainer cannot be built"),
        (["--run.wandb=maybe"], "run.wandb"),
        (["--run.name=a/b"], "--run.name is 'a/b'"),
        (["-c", "none.yaml"], "none.yaml"),
        (["--trainer.callbacks+=PlainProgress", "--trainer.callbacks.every_n_steps=0"], "every_n_steps is 0"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(place, flags, part, capsys):
    assert fit(*flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tenfold")]
    assert len(errors) == 1
    assert part in errors[0]
    assert "Traceback" not in errors[0]


def test_a_real_process_gives_the_status_and_one_line(place):
    done = subprocess.run(
        [TENFOLD, "fit", "-c", "exp/toy.yaml", "--model.init_args.widht=3"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Option 'widht' is not accepted" in done.stderr


def test_trying_out_leaves_nothing_behind(place):
    assert fit("--trainer.fast_dev_run=true") == 0
    assert os.listdir(place) == ["exp"]


def test_scoring_a_checkpoint(place, capsys):
    assert fit("--trainer.max_steps=5") == 0
    assert fit("--ckpt_path=last", command="validate") == 0
    assert fit("--ckpt_path=runs/exp/toy/checkpoints/last.ckpt", command="test") == 0
    assert "test/loss" in capsys.readouterr().out
    assert [path.name for path in Path("runs/exp").iterdir()] == ["toy"]


@pytest.mark.slow
def test_two_processes_share_a_folder(place):
    flags = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=10"]
    for _ in range(2):
        done = subprocess.run([TENFOLD, "fit", "-c", "exp/toy.yaml", *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("last checkpoint:") == 1
    assert sorted(path.name for path in Path("runs/exp").iterdir()) == ["toy", "toy-2"]
    assert_same_end("toy", "toy-2")
    assert len(list(Path("runs/exp/toy/logs").iterdir())) == 1


def test_checkpoints_can_be_turned_off(place):
    assert fit("--trainer.enable_checkpointing=false", "--trainer.max_steps=2") == 0
    assert not list(Path("runs").rglob("*.ckpt"))
