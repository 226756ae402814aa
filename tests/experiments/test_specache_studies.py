"""The studies of SpeCache: what a batch of prompts records, what a stopped run keeps, and how scores are added up."""

import json
import math
from pathlib import Path

import pytest
import torch
from tenfold.experiments.bench.specache_quality import _recall_rows, _rows
from tenfold.experiments.specache import real_text
from tenfold.experiments.specache.methods import methods
from tenfold.experiments.specache.picture import draw
from tenfold.experiments.specache.real_text import Batch, Score, Study, summary
from tenfold.inference.specache import CacheShape, build_cache, decode_recorded, record_prompt
from transformers import LlamaConfig, LlamaForCausalLM

TEXTS = (
    "the river flows under the old stone bridge and the market is open in winter",
    "copper and silver from the island were sold at the harbour",
)
STUDY = Study(top_k=4, residual_length=16, group_size=8)


@pytest.fixture(scope="module")
def model(tiny_tokenizer) -> LlamaForCausalLM:
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
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tokenizer = tiny_tokenizer.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_a_batch_records_every_method_at_equal_bytes(model, tokenizer) -> None:
    asked = []

    def score(place: int, answer: str) -> float:
        asked.append((place, answer))
        return 0.25 * place

    batch = Batch("needle", "needle", 64, 0, TEXTS, 6, score, (0.0, 100.0))
    reasons: dict[str, str] = {}
    found = dict(real_text._run_batch(STUDY, model, tokenizer, batch, reasons))
    assert set(found) | set(reasons) == {method.label for method in methods()}
    assert all(values["scores"] == [0.0, 0.25] for values in found.values())
    assert len(asked) == 2 * len(found)
    encoded = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    capacity = encoded["input_ids"].shape[1] + 5
    assert found["full"]["device_bytes"] == CacheShape.of(model.config, model.dtype).full_bytes(1, capacity)
    for bits in (2, 1):
        ours = found[f"specache-{bits}"]
        assert ours["hit_ratio"] is not None
        for name in ("kivi", "window", "h2o"):
            assert 0 < found[f"{name}-{bits}"]["device_bytes"] <= ours["device_bytes"] < found["full"]["device_bytes"]
    # answers are those of the model alone, cut at the end token
    alone = model.generate(**encoded, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(alone[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["full"]["answers"] == texts


def test_perplexity_counts_decoded_tokens_only(model, tokenizer) -> None:
    text = " ".join(TEXTS)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = Batch("perplexity", "perplexity", len(ids), 0, (text,), 5, None)
    found = dict(real_text._run_batch(STUDY, model, tokenizer, batch, {}))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    wanted = -sum(logits[place - 1, ids[place]].item() for place in range(len(ids) - 4, len(ids))) / 4
    assert found["full"]["nats"][0] == pytest.approx(wanted, abs=1e-4)
    assert found["kivi-1"]["nats"][0] != pytest.approx(wanted, abs=1e-3)


def test_long_prompts_have_fewer_rounds_and_rounds_may_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_text, "_tasks", lambda suite, study, tok, docs, length, number: [(suite, length, number)])
    monkeypatch.setattr(real_text, "_text", lambda study, tok, docs, length, number: ("text", length, number))
    study = Study(lengths=(2, 4), needle_lengths=(2, 4, 8), rounds=3)
    found = list(real_text.batches(study, None, []))  # type: ignore[arg-type]
    assert [number for suite, length, number in found if (suite, length) == ("longbench_local", 2)] == [0, 1, 2]
    assert [number for suite, length, number in found if (suite, length) == ("longbench_local", 4)] == [0]
    assert [(length, number) for suite, length, number in found if suite == "needle"] == [
        (2, 0), (4, 0), (8, 0), (2, 1), (4, 1), (2, 2),
    ]  # fmt: skip
    assert [place[2] for place in found] == sorted(place[2] for place in found)
    assert Study(rounds=8).digest == Study(lengths=(2048,)).digest != Study(seed=1).digest


def result(scores: dict[str, list[float]], **record) -> dict:
    base = {"suite": "needle", "task": "needle", "length": 64, "number": 0, "depths": [0.0, 100.0], **record}
    methods_found = {label: {"scores": values, "device_bytes": 10} for label, values in scores.items()}
    return {"batches": [{**base, "methods": methods_found}], "missing": {}}


def test_scores_are_means_over_prompts_with_paired_gaps() -> None:
    found = summary(result({"full": [1.0, 0.0, 1.0], "kivi-2": [0.0, 0.0, 1.0]}), "needle")
    assert found["full"] == Score(pytest.approx(200 / 3), pytest.approx(100 / 3), 0.0, 0.0, 3, 10)
    assert found["kivi-2"].gap == pytest.approx(-100 / 3)
    assert found["kivi-2"].gap_error == pytest.approx(100 / 3)
    assert summary(result({"full": [1.0]}), "longbench_local") == {}
    assert math.isnan(summary(result({"full": [1.0]}), "needle")["full"].error)
    one = result({"full": [1.0]})
    assert set(summary(one, "needle", length=64, task="needle")) == {"full"}
    assert summary(one, "needle", length=65) == summary(one, "needle", task="other") == {}


def test_rows_have_the_published_names_and_reasons() -> None:
    values = {label: [1.0, 0.5] for label in ("full", "specache-2", "kivi-2", "window-2", "h2o-2")}
    scores = summary(result(values), "needle")
    rows = list(_rows("needle", "needle", 2, scores, {"quantized-2": "needs the package hqq"}))
    by_peer = {row.peer: row for row in rows if row.metric == "score"}
    assert set(by_peer) == {"full", "quantized-2", "kivi-2", "window-2", "h2o-2"}
    assert by_peer["quantized-2"].reason == "needs the package hqq"
    assert by_peer["full"].value == by_peer["full"].peer_value == 75.0
    gap = next(row for row in rows if row.metric == "gap_to_full")
    assert (gap.value, gap.bound_value) == (0.0, -1.0)


def test_recall_rows_compare_means_over_seeds() -> None:
    labels = {"full": 0.0, "kivi-1-centred": 0.5, "specache-1-kivi-levels": 0.75}
    for bits in (2, 1):
        labels |= {f"{name}-{bits}": 0.25 for name in ("exact-fetch", "specache", "kivi", "window", "h2o")}
        labels |= {f"specache-{bits} k=0": 0.5, f"specache-{bits} k=8": 0.125}
    measures = ("tokens", "nats", "divergence", "hit_ratio", "coverage_ratio")
    caches = {label: [dict.fromkeys(measures, value + step) for step in (0, 2)] for label, value in labels.items()}
    rows = list(_recall_rows({"study": {"seeds": (0, 1), "rows": (0, 8)}, "caches": caches}, "recall"))
    found = {(row.case, row.metric, row.peer): row for row in rows}
    tokens = found["recall bits=1", "tokens", "full"]
    assert (tokens.value, tokens.peer_value, tokens.ratio, tokens.repeats) == (1.25, 1.0, 1.25, 2)
    assert found["recall bits=2", "divergence", "h2o-2"].ratio == 1.0
    assert found["recall bits=2 rows=8", "divergence", "full"].value == 1.125
    levels = found["recall bits=1 levels=centred", "divergence", "kivi-1"]
    assert (levels.value, levels.peer_value) == (1.5, 1.25)
    levels = found["recall bits=1 levels=centred", "divergence", "specache-1-kivi-levels"]
    assert (levels.value, levels.peer_value) == (1.25, 1.75)


def test_finished_batches_are_read_back_and_half_a_line_is_not(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    assert real_text._finished(path) == {}
    path.write_text(json.dumps({"key": "a", "methods": {}}) + "\n" + json.dumps({"key": "b", "methods": {}})[:9])
    assert list(real_text._finished(path)) == ["a"]
    with path.open("a") as file:
        file.write(json.dumps({"key": "c", "methods": {}}) + "\n")
    assert list(real_text._finished(path)) == ["a", "c"]


def test_the_picture_is_written(tmp_path: Path) -> None:
    draw(result({"full": [1.0, 0.0], "specache-2": [1.0, 0.0]}), tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_what_follows_a_recorded_prompt_is_the_same_for_every_order_of_caches(model, tokenizer) -> None:
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    prompt = record_prompt(model, ids)
    first = decode_recorded(model, prompt, build_cache("full", model.config)[0], num_tokens=5)[1]
    decode_recorded(model, prompt, build_cache("h2o", model.config, budget=4)[0], num_tokens=5)
    decode_recorded(model, prompt, build_cache("kivi", model.config, bits=1, residual_length=64)[0], num_tokens=5)
    assert torch.equal(first, decode_recorded(model, prompt, build_cache("full", model.config)[0], num_tokens=5)[1])
