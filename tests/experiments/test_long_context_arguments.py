"""The long-context arguments of `tenfold evaluate`."""

import json
from pathlib import Path
from typing import Any

import pytest
from tenfold.experiments.cli import main


@pytest.fixture(scope="module")
def haystack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hay") / "documents.jsonl"
    rows = [
        {"text": f"Town {number} has a bridge of {number + 3} arches. The road to it is old. Many come to see it."}
        for number in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=600,
        bos_token_id=0,
        eos_token_id=0,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.tokenizer.save_pretrained(folder)
    return folder


def test_needle_from_the_shell(haystack: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--model", str(model), "--tasks", "needle", "--haystack", str(haystack), "--limit", "3"]
    assert main([*command, "--lengths", "400", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    told = results["tenfold"]["long_context"]["needle"]
    assert [(cell["length"], cell["depth"]) for cell in told["cells"]] == [(400, 0.0), (400, 10.0), (400, 20.0)]
    assert "needle" in capsys.readouterr().out
    assert "Needle in a haystack" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "4096"], "length 4096 passes the model's window of 600 tokens"),
        (["--lengths", "64"], "needle: length 64 is smaller than the template"),
        (["--samples-per-length", "0"], "num_samples is 0"),
        (["--haystack", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_gives_one_line_and_status_2(
    haystack: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "--haystack" not in arguments:
        arguments = [*arguments, "--haystack", str(haystack)]
    output = ["--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(["evaluate", "--model", str(model), "--tasks", "needle", *arguments, *output]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_lengths_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--model", "x", "--tasks", "needle", "--lengths", "4k"]) == 2
    assert "'4k' is not a list of whole numbers such as 1024,4096" in capsys.readouterr().err
