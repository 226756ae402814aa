"""The recall study: what it counts, what it keeps, and symbols of a real vocabulary."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.datamodules import recall_prompts
from tenfold.experiments.model_source import Source
from tenfold.experiments.specache import recall
from tenfold.experiments.specache.recall import Recall, mean_and_spread, recall_of_seed, symbol_ids
from transformers import LlamaConfig, LlamaForCausalLM

STUDY = Recall(
    num_prompts=3, num_keys=7, value_length=4, vocab_size=64, rows=(0, 8, 256), top_k=8, residual_length=8, group_size=8
)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def found(model: LlamaForCausalLM) -> dict[str, Any]:
    return dict(recall_of_seed(STUDY, model, 5, torch.arange(64) + 30))


def test_the_full_cache_is_a_forward_pass_over_prompt_and_answer(model, found) -> None:
    prompts = recall_prompts(num_prompts=3, num_keys=7, value_length=4, vocab_size=64, seed=5)
    ids = torch.cat([prompts.input_ids, prompts.answers], dim=1) + 30
    with torch.no_grad():
        # the last three tokens are decoded, the first of the answer comes from the prefill
        logits = model(ids).logits[:, -4:-1].log_softmax(-1)
    wanted = ids[:, -3:]
    assert found["full"].tokens == (logits.argmax(-1) == wanted).double().mean().item()
    assert found["full"].nats == pytest.approx(-logits.gather(2, wanted.unsqueeze(2)).mean().item(), abs=1e-5)
    assert found["full"].divergence == pytest.approx(0, abs=1e-9)
    # prompt and answer but for its last token, which is an output only
    assert found["full"].device_bytes == (ids.shape[1] - 1) * 2 * 2 * 8 * 2 * 4


def test_every_cache_is_measured_and_rows_for_all_tokens_lose_nothing(found) -> None:
    expected = {"full", "specache-1-kivi-levels"}
    for bits in (2, 1):
        expected |= {f"{name}-{bits}" for name in ("exact-fetch", "specache", "kivi", "window", "h2o")}
        expected |= {f"kivi-{bits}-centred", *(f"specache-{bits} k={rows}" for rows in (0, 8, 256))}
        assert found[f"specache-{bits} k=256"].divergence < 1e-6 < found[f"specache-{bits} k=0"].divergence
        assert found[f"specache-{bits} k=8"] != found[f"specache-{bits} k=0"]
        ours = found[f"specache-{bits}"]
        assert ours.divergence == pytest.approx(found[f"specache-{bits} k=8"].divergence)
        assert 0 <= ours.coverage_ratio <= 1
        for name in ("kivi", "window", "h2o"):
            assert found[f"{name}-{bits}"].device_bytes <= ours.device_bytes
            assert found[f"{name}-{bits}"].coverage_ratio is None
    assert set(found) == expected
    assert found["specache-1-kivi-levels"].divergence != found["specache-1"].divergence


def test_what_is_finished_is_not_run_again(model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, told = replace(STUDY, seeds=(5,), rows=(), words=False), []
    monkeypatch.setattr(recall, "load_source", lambda *_, **__: Source(model, None))
    first = recall.run_recall(study, tmp_path, told.append)
    (path,) = tmp_path.iterdir()
    stored = json.loads(path.read_text())
    # as if the run had been stopped before the last caches
    kept = dict(list(stored.items())[:4])
    kept["full"]["tokens"] = 0.125
    path.write_text(json.dumps(kept))
    second = recall.run_recall(study, tmp_path, told.append)
    assert mean_and_spread(second, "full") == (0.125, 0.0)
    assert second["caches"]["h2o-1"] == first["caches"]["h2o-1"]
    monkeypatch.setattr(recall, "load_source", None)
    assert recall.run_recall(study, tmp_path, told.append) == second
    assert told == ["recall, seed 5"] * 2
    values = {"caches": {"full": [{"tokens": 0.25}, {"tokens": 0.75}]}}
    assert mean_and_spread(values, "full") == (0.5, pytest.approx(0.5 / 2**0.5))


class _Words:
    """A vocabulary with few whole words."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [7]}

    def get_vocab(self) -> dict[str, int]:
        return {"Ġriver": 12, "Ġold": 3, "stone": 4, "Ġbridge": 9, "ĠRiver": 5, "Ġéclair": 6}

    def convert_ids_to_tokens(self, number: int) -> str:
        return {value: text for text, value in self.get_vocab().items()}[number]


def test_symbols_are_whole_words_most_frequent_first() -> None:
    assert symbol_ids(_Words(), 4).tolist() == [7, 7, 9, 12]
    with pytest.raises(ValueError, match="the tokenizer has 2 words of one token, 3 are needed"):
        symbol_ids(_Words(), 5)
