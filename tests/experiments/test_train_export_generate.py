"""From text to a lookup table and text again, through the commands; and what they refuse."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from tenfold.experiments.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer

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
    for storage in ("memory", "direct"):
        other, cost = generated(capsys, run / "lookup", "--storage", storage)
        assert other == lookup
        assert cost.rstrip().endswith(f"per token), {storage}")


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.01), ("nf4", 0.2), ("nf3", 0.3)])
def test_quantised_tables_say_their_error_and_loss(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, largest: float
) -> None:
    output = tmp_path / kind
    arguments = ["--form", "lookup", "--quantisation", kind, "--score-text", os.__file__]
    assert main(["export", *arguments, "--model", str(run / "plain"), "--output", str(output)]) == 0
    said = capsys.readouterr().out
    error = float(re.search(r"error of the stored values: (\S+) of their size", said)[1])
    assert largest / 20 < error < largest
    experts, table = (float(text) for text in re.search(r"experts (\S+), table (\S+) nats", said).groups())
    assert 0 < abs(table - experts) < 0.2 or kind == "int8"
    # the score is that of the exported folder, computed here once more
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    text = torch.tensor(tokenizer(Path(os.__file__).read_text(encoding="utf-8")).input_ids)
    nats, count = 0.0, 0
    with torch.no_grad():
        for piece in text.split(256)[:16]:
            loss = model(piece[None], labels=piece[None]).loss.item()
            nats, count = nats + loss * (len(piece) - 1), count + len(piece) - 1
    assert table == pytest.approx(nats / count, abs=1e-4)
    assert f"on {count + 16:,} tokens" in said
    mmap, _ = generated(capsys, output)
    direct, _ = generated(capsys, output, "--storage", "direct")
    assert mmap == direct


def test_evaluation_reads_the_table_from_where_it_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenfold.lightning_modules.mole import LookupTable

    opened = []
    real = LookupTable.open.__func__
    monkeypatch.setattr(
        LookupTable,
        "open",
        classmethod(lambda cls, path, storage, **rest: opened.append(storage) or real(cls, path, storage)),
    )
    rows = [{"text": f"def f{number}(): return {number}"} for number in range(3)]
    data = tmp_path / "data" / "wikipedia_bits_per_byte"
    data.mkdir(parents=True)
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = []
    for storage in ("direct", "mmap"):
        output = tmp_path / storage
        arguments = [
            "--tasks",
            "wikipedia_bits_per_byte",
            "--data-dir",
            str(tmp_path / "data"),
            "--output",
            str(output),
        ]
        assert main(["evaluate", "--model", str(run / "lookup"), "--storage", storage, *arguments]) == 0
        scores.append(json.loads((output / "results.json").read_text())["results"])
    assert opened == ["direct", "mmap"]
    assert scores[0] == scores[1]
    assert main(["evaluate", "--model", str(run / "plain"), "--storage", "mmap", *arguments]) == 2


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
        (["export", "--quantisation", "nf4", "--model", "{run}/plain", "--output", "{run}/x"], "is for --form lookup"),
        (
            [
                "export",
                "--form=lookup",
                "--quantisation=nf4",
                "--dtype=float16",
                "--model={run}/plain",
                "--output={run}/x",
            ],
            "both name the table's type; drop one",
        ),
        (
            ["export", "--form=lookup", "--score-text={run}/none", "--model={run}/plain", "--output={run}/x"],
            "no such file",
        ),
        (["generate", "--model", "{run}/nothing", "--prompt", "a"], "does not exist"),
        (["generate", "--model", "{run}", "--prompt", "a"], "it has no config.json"),
        (["generate", "--model", "asset:smollm", "--prompt", "a"], "the nearest: smollm2-135m"),
        (["generate", "--model", "{run}/plain", "--prompt", "a", "--chat"], "has no chat template"),
        (["generate", "--model", "{run}/plain", "--prompt", "a", "--storage", "mmap"], "is not a lookup form"),
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
