"""`--cache` of `tenfold generate` and `tenfold evaluate`: flags, numbers told, and refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.experiments.cache_arguments import CACHE_NAMES, add_cache_arguments
from tenfold.experiments.cli import main
from tenfold.inference.specache import CACHES

PROMPT = "the river flows under the old stone bridge and the market is open in winter " * 3
SMALL = ("--cache-residual-length", "16", "--cache-group-size", "8")


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.tokenizer.save_pretrained(path)
    return path


def generate(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    capsys.readouterr()
    command = ["generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "8", *options]
    status = main(command)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_there_is_a_flag_for_every_option_of_every_cache() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    group = add_cache_arguments(parser)
    flags = {action.dest.removeprefix("cache_"): action for action in group._group_actions if action.dest != "cache"}
    options = {option.name: option for choice in CACHES.values() for option in choice.options}
    assert set(CACHE_NAMES) == set(CACHES)
    assert set(flags) == set(options)
    for name, option in options.items():
        assert flags[name].default is None
        if option.type is not bool and name != "bits":
            assert flags[name].type is option.type
            assert tuple(flags[name].choices or ()) == option.choices


@pytest.mark.parametrize(
    "options",
    [
        ("specache", "--cache-top-k", "256", *SMALL),
        ("specache", "--cache-top-k", "256", "--cache-mode", "exact_fetch", *SMALL),
        ("kivi", "--cache-residual-length", "256"),
        ("window", "--cache-budget", "256"),
        ("h2o", "--cache-budget", "256"),
        ("full",),
    ],
    ids=lambda options: "-".join(options[:5]),
)
def test_caches_that_lose_nothing_write_what_the_model_writes(folder: Path, capsys, options) -> None:
    status, plain, _ = generate(folder, capsys)
    assert status == 0
    assert generate(folder, capsys, "--cache", *options)[:2] == (0, plain)


def test_generate_tells_bytes_transfers_and_hits(folder: Path, capsys) -> None:
    options = ("--cache", "specache", "--cache-bits", "1", "--cache-top-k", "4", "--cache-measure", *SMALL)
    status, _, err = generate(folder, capsys, *options)
    assert status == 0
    line = err.splitlines()[-1]
    found = re.fullmatch(
        r"cache specache: ([\d,]+) bytes on the device \((0\.\d+) of a full cache\), ([\d,]+) on the host, "
        r"([\d,]+) fetched \(([\d,]+) at a time\), [\d.]+ % of guesses were right, [\d.]+ % of wanted rows were there",
        line,
    )
    assert found, line
    device, host, fetched, each = (int(found[group].replace(",", "")) for group in (1, 3, 4, 5))
    assert float(found[2]) == pytest.approx(device / host, abs=5e-4)
    # pre-decode and 7 steps, each 2 layers of 2 heads of 4 rows of a key and a value of 8 float32 channels
    assert fetched == 8 * each == 8 * 2 * 2 * 4 * 2 * 8 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--cache-bits", "2"), "--cache-bits has no effect without --cache; add --cache specache"),
        (("--cache", "window", "--cache-bits", "2"), "--cache-bits is no option of --cache window, which takes"),
        (("--cache", "full", "--cache-top-k", "2"), "--cache-top-k is no option of --cache full, which takes no opt"),
        (("--cache", "specache", "--cache-top-k", "257"), "top_k is 257, larger than the model's context of 256"),
        (("--cache", "specache", "--cache-residual-length", "48"), "residual_length 48 is not a positive multiple of"),
        (("--cache", "specache", "--cache-host-limit-bytes", "99"), r"needs \d+ bytes of host memory, host_limit_byt"),
        (("--cache", "h2o", "--cache-budget", "0"), "budget is 0; HeavyHitterCache must hold at least 1 token"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(folder: Path, capsys, options, message: str) -> None:
    status, _, err = generate(folder, capsys, *options)
    assert status == 2
    assert re.search(message, err)
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_cache_is_refused_with_the_list(folder: Path, capsys) -> None:
    status, _, err = generate(folder, capsys, "--cache", "paged")
    assert status == 2
    assert all(name in err for name in CACHE_NAMES)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that generates, with prompts of several lengths, and one that scores likelihoods."""
    path = tmp_path_factory.mktemp("tasks")
    words = PROMPT.split()
    rows = [{"text": " ".join(words[: 6 + 9 * number]), "answer": "river"} for number in range(4)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}/rows.jsonl}}}}\ntest_split: test\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\n'
    )
    (path / "writes.yaml").write_text(
        f"task: writes\noutput_type: generate_until\n{shared}"
        "generation_kwargs: {until: [], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    (path / "scores.yaml").write_text(
        f"task: scores\noutput_type: loglikelihood\n{shared}metric_list: [{{metric: acc}}]\n"
    )
    return path


def evaluate(folder: Path, tasks: Path, output: Path, name: str, *options: str) -> int:
    command = ["evaluate", "--model", str(folder), "--tasks", name, "--include-path", str(tasks)]
    return main([*command, "--output", str(output), "--batch-size", "4", *options])


def answers(output: Path) -> list[list[list[str]]]:
    lines = (output / "samples_writes.jsonl").read_text().splitlines()
    return [json.loads(line)["resps"] for line in lines]


def test_evaluate_answers_through_the_cache_in_padded_batches(folder, tasks, tmp_path, capsys) -> None:
    exact = ("--cache", "specache", "--cache-top-k", "256", *SMALL)
    assert evaluate(folder, tasks, tmp_path / "plain", "writes") == 0
    assert evaluate(folder, tasks, tmp_path / "exact", "writes", *exact) == 0
    assert answers(tmp_path / "exact") == answers(tmp_path / "plain")
    lossy = ("--cache", "specache", "--cache-top-k", "2", "--cache-bits", "1", *SMALL)
    capsys.readouterr()
    assert evaluate(folder, tasks, tmp_path / "lossy", "writes", *lossy) == 0
    assert answers(tmp_path / "lossy") != answers(tmp_path / "plain")
    stored = json.loads((tmp_path / "lossy" / "results.json").read_text())["tenfold"]["cache"]
    assert stored["options"] == {"top_k": 2, "bits": 1, "residual_length": 16, "group_size": 8}
    assert (stored["name"], stored["batches"], stored["steps"]) == ("specache", 1, 5)
    assert 0 < stored["device_bytes"] < stored["full_cache_bytes"] == stored["host_bytes"]
    assert stored["bytes_to_device"] == 6 * 4 * 2 * 2 * 2 * 2 * 8 * 4
    assert 0 <= stored["speculation_hit_ratio"] <= 1
    assert "cache specache: " in capsys.readouterr().out
    assert "cache" not in json.loads((tmp_path / "plain" / "results.json").read_text())["tenfold"]


def test_likelihood_tasks_are_refused_in_one_line_or_decoded(folder, tasks, tmp_path, capsys) -> None:
    capsys.readouterr()
    assert evaluate(folder, tasks, tmp_path / "refused", "scores", "--cache", "kivi", *SMALL) == 2
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1
    assert "which a forward pass computes without reading the kivi cache" in err
    for name, options in (("specache", SMALL), ("window", ("--cache-budget", "16"))):
        more = ("--cache", name, "--cache-likelihood", "decode", *options)
        assert evaluate(folder, tasks, tmp_path / name, "scores", *more) == 0
        stored = json.loads((tmp_path / name / "results.json").read_text())["tenfold"]["cache"]
        assert stored["likelihood"] == "decode"
        assert stored["batches"] == 4
    assert evaluate(folder, tasks, tmp_path / "alone", "scores", "--cache-likelihood", "decode") == 2
    assert "--cache-likelihood has no effect without --cache" in capsys.readouterr().err
