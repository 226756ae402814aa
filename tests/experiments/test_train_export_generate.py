"""From text to a lookup table and text again, through the commands; and what they refuse."""

import json
import os
from pathlib import Path

import pytest
import torch
from tenfold.experiments.cli import main

CONFIG = """
trainer:
  accelerator: cpu
  max_steps: 3
  limit_val_batches: 1
  num_sanity_val_steps: 0
  enable_progress_bar: false
  enable_model_summary: false
model:
  class_path: MoLELightning
  init_args:
    model:
      preset: mole-tiny-4e
      num_hidden_layers: 2
      hidden_size: 32
      num_attention_heads: 2
data:
  class_path: TextDataModule
  init_args:
    data: {data}
    tokenizer: bpe:300
    sequence_length: 32
    batch_size: 2
    val_fraction: 0.2
    test_fraction: 0.2
    cache: {cache}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short MoLE run with its plain and its lookup form."""
    folder = tmp_path_factory.mktemp("run")
    source = Path(os.__file__).parent / "argparse.py"
    rows = [{"text": part} for part in source.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(data=folder / "data.jsonl", cache=folder / "cache"), encoding="utf-8")
    assert main(["fit", "--config", str(config), f"--run.root={folder}", "--run.experiment=e", "--run.name=n"]) == 0
    checkpoint = folder / "e" / "n" / "checkpoints" / "last.ckpt"
    assert main(["export", "--model", str(checkpoint), "--output", str(folder / "plain")]) == 0
    lookup = ["export", "--form", "lookup", "--dtype", "float32", "--model", str(folder / "plain")]
    assert main([*lookup, "--output", str(folder / "lookup")]) == 0
    return folder


def generated(capsys: pytest.CaptureFixture[str], model: Path, *options: str) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["generate", "--model", str(model), "--prompt", "def ", "--max-new-tokens", "12", *options]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_all_forms_generate_the_same_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = generated(capsys, run / "e" / "n" / "checkpoints" / "last.ckpt")
    plain, _ = generated(capsys, run / "plain")
    lookup, cost = generated(capsys, run / "lookup")
    assert checkpoint == plain == lookup
    assert plain.startswith("def ")
    # 12 forward passes: the prompt's distinct tokens, then one token each; the last one is not fed back
    row = 2 * 4 * 32 * 4
    assert f"({row:,} per token)" in cost
    in_memory, _ = generated(capsys, run / "lookup", "--table-storage", "memory")
    assert in_memory == lookup


def test_sampling_depends_on_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "1.5", "--seed")
    first, again, other = (generated(capsys, run / "plain", *options, seed)[0] for seed in ("1", "1", "2"))
    assert first == again != other


def test_exported_weights_are_the_checkpoints(run: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = torch.load(run / "e" / "n" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported = load_file(run / "plain" / "model.safetensors")
    assert {f"model.{name}" for name in exported} == {name for name in checkpoint if name.startswith("model.")}
    assert all(torch.equal(tensor, checkpoint[f"model.{name}"]) for name, tensor in exported.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--model", "{run}/plain", "--output", "{run}/lookup"], "exists; name a new folder or remove it"),
        (["export", "--model", "{run}/no.ckpt", "--output", "{run}/x"], "no.ckpt does not exist"),
        (["export", "--model", "{run}/data.jsonl", "--output", "{run}/x"], "cannot be read as a checkpoint"),
        (["export", "--form", "lookup", "--model", "{run}/lookup", "--output", "{run}/x"], "this one is 'mole_lookup'"),
        (
            ["export", "--form", "lookup", "--memory-limit", "1KB", "--model", "{run}/plain", "--output", "{run}/x"],
            "memory limit of 1000 bytes is below",
        ),
        (["generate", "--model", "{run}/nothing", "--prompt", "a"], "does not exist"),
        (["generate", "--model", "{run}", "--prompt", "a"], "it has no config.json"),
        (["generate", "--model", "asset:smollm", "--prompt", "a"], "the nearest: smollm2-135m"),
        (["generate", "--model", "{run}/plain", "--prompt", "a", "--chat"], "has no chat template"),
        (["generate", "--model", "{run}/plain", "--prompt", "a", "--table-storage", "mmap"], "is not a lookup form"),
        (["generate", "--model", "{run}/plain", "--prompt", "a", "--max-new-tokens", "5000"], "1024 positions"),
    ],
)
def test_wrong_input_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    capsys.readouterr()
    assert main([argument.format(run=run) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in lines[-1]
    assert lines[-1].startswith(f"tenfold {arguments[0]}: error: ")
    assert not (run / "x").exists()


def test_foreign_tokenizer_is_refused(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "plain")
    tokenizer.add_tokens([f"extra{i}" for i in range(40)])
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", "--model", str(run / "plain"), "--tokenizer", str(tmp_path), "--prompt", "a"]) == 2
    assert "the tokenizer does not match the model: its largest token id is" in capsys.readouterr().err
