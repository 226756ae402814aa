"""A run killed with -9 at a random step and continued is bit for bit the uninterrupted run."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

MAX_STEPS = 40
CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  max_steps: {max_steps}
  val_check_interval: 12
  check_val_every_n_epoch: null
  limit_val_batches: 2
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  accumulate_grad_batches: 2
checkpoint:
  every_n_train_steps: 3
model:
  class_path: MoLELightning
  init_args:
    model:
      preset: mole-tiny-4e
      num_hidden_layers: 2
      hidden_size: 32
      num_attention_heads: 2
      attention_dropout: 0.1
data:
  class_path: TextDataModule
  init_args:
    data: {text}
    tokenizer: bpe:400
    sequence_length: 64
    batch_size: 2
    val_fraction: 0.2
    test_fraction: 0.1
"""


def start(config: Path, root: Path, *extra: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TENFOLD_CACHE": str(root / "cache")}
    command = [Path(sys.executable).with_name("tenfold"), "fit", "--config", config, f"--run.root={root}", *extra]
    return subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def losses(run: Path) -> dict[int, str]:
    """Logged training loss by step, as printed; a continued run's values win."""
    found: dict[int, str] = {}
    for path in sorted(
        run.glob("logs/version_*/metrics.csv"), key=lambda p: int(p.parent.name.removeprefix("version_"))
    ):
        with open(path, newline="", encoding="utf-8") as file:
            found |= {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")}
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_killed_and_continued_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    source = Path(os.__file__).parent
    documents = [
        (source / name).read_text(encoding="utf-8") for name in ("random.py", "argparse.py", "heapq.py", "csv.py")
    ]
    text = tmp_path / "text"
    text.mkdir()
    for index, document in enumerate(part for whole in documents for part in whole.split("\n\n\n") if part.strip()):
        (text / f"{index:04d}.txt").write_text(document, encoding="utf-8")
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(max_steps=MAX_STEPS, text=text), encoding="utf-8")

    whole = start(config, tmp_path, "--run.name=whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read().decode()[-2000:]
    experiment = next(path for path in tmp_path.glob("*/whole")).parent
    expected = losses(experiment / "whole")

    killed = experiment / "killed"
    kill_after = random.Random(time.time_ns()).randint(4, MAX_STEPS - 8)
    process = start(config, tmp_path, "--run.name=killed")
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(path.stem.removeprefix("step")) for path in killed.glob("checkpoints/step*.ckpt")]
        if max(steps, default=0) >= kill_after:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(timeout=60) == -signal.SIGKILL, f"not killed after step {kill_after}"

    continued = start(config, tmp_path, "--run.name=killed", "--ckpt_path=last")
    assert continued.wait(timeout=300) == 0, continued.stderr.read().decode()[-2000:]
    assert len(expected) == MAX_STEPS
    got = losses(killed)
    # values that the killed process had not flushed are gone; every other one is the same to the last digit
    assert got.keys() >= {step for step in expected if step >= kill_after}
    assert got == {step: expected[step] for step in got}, f"killed after step {kill_after}"
    for name, tensor in weights(experiment / "whole").items():
        assert torch.equal(tensor, weights(killed)[name]), name
    assert len(list(killed.glob("logs/version_*"))) == 2
