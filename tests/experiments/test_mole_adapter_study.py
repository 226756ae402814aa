"""The study of adapters: equal sizes, counted compute, kept runs with pilots; on a small model and a cycle of ids."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.experiments.bench import mole_adapter
from tenfold.experiments.bench.registry import BENCHES, Settings
from tenfold.experiments.mole import adapters
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, D, WIDTH, V = 3, 32, 48, 40
STUDY = replace(
    adapters.QUICK, multiply_adds=4e6, num_layers=2, num_keys=64, num_rates=2, batch_size=2, sequence_length=16
)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


class Text:
    """Stands in for the data module."""

    def train_dataloader(self) -> list[dict[str, torch.Tensor]]:
        ids = torch.arange(32).view(2, 16) % 10
        return [{"input_ids": ids, "labels": ids, "num_bytes": torch.tensor([20, 20])}]

    val_dataloader = test_dataloader = train_dataloader


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(adapters, "load_base", llama)
    monkeypatch.setattr(adapters, "_open_data", lambda study, seed: Text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepared(name: str) -> Any:
    model = llama()
    adapters.VARIANTS[name].prepare(model, STUDY)
    return model


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_variants_train_about_as_many_weights_as_the_feed_forwards_have() -> None:
    rival = 2 * 3 * D * WIDTH
    assert trained(prepared("frozen")) == 0
    assert trained(prepared("full")) == sum(p.numel() for p in llama().parameters())
    assert trained(prepared("feed-forward")) == rival
    # beside the experts' matrices: two routers and norms
    assert trained(prepared("token-4e")) == rival + 2 * (4 * D + D)
    bigram = trained(prepared("bigram-4e")) - 2 * (4 * D + D)
    assert rival - 2 * 2 * 4 * D < bigram <= rival
    # rows of 32 for 40 tokens: seven layers would fit, there are two
    assert trained(prepared("token-table")) == 2 * (V * D + D)
    assert adapters.adapter_config(llama(), replace(STUDY, num_layers=1), "table").layers == (2,)
    with pytest.raises(ValueError, match="num_keys 1000 of width 32 take 32000 weights, the feed-forwards of 2 layers"):
        adapters.adapter_config(llama(), replace(STUDY, num_keys=1000), "bigram")


def test_multiply_adds_are_those_of_the_formula() -> None:
    batch = Text().train_dataloader()[0]
    tokens, length = 32, 16
    attention = LAYERS * 2 * D * length
    projections, ffn, head = D * D * 2 + D * D, 3 * D * WIDTH, V * D
    forward = LAYERS * (projections + ffn) + head
    full = adapters.step_multiply_adds(prepared("full"), batch)
    # backward: activations and weights; attention's backward recomputes the scores
    assert full == tokens * (3 * forward + attention * 2.5 + attention)
    # only the two last layers are walked back through, and only their feed-forwards' weights get gradients
    upper = adapters.step_multiply_adds(prepared("feed-forward"), batch)
    assert upper < full - tokens * (forward - 2 * ffn)
    # experts on ten distinct ids, three passes; routers of width 4, of which the upper one hands a gradient down; gated
    # sums, which are products in calls as small as these. What falls away: gradients of the feed-forwards' weights,
    # and the way back to the lower one's
    experts = adapters.step_multiply_adds(prepared("token-4e"), batch)
    lookup, routers, sums = 2 * 3 * D * WIDTH, (2 + 2 + 1) * 4 * D, 2 * 4 * D
    assert experts - upper == 3 * 10 * lookup + tokens * (routers + sums - 2 * ffn - D * WIDTH)


@pytest.mark.parametrize("name", [name for name in adapters.VARIANTS if name != "frozen"])
def test_every_variant_learns_within_its_budget(name: str, tmp_path: Path) -> None:
    study = replace(STUDY, multiply_adds=3e8, num_rates=1)
    before = adapters.run_one("frozen", 0, study, tmp_path)
    result = adapters.run_one(name, 0, study, tmp_path)
    per_step = adapters.step_multiply_adds(prepared(name), Text().train_dataloader()[0])
    assert result["multiply_adds"] == result["steps"] * per_step
    assert abs(result["multiply_adds"] - 3e8) <= per_step / 2
    assert result["loss"] < before["loss"] - 0.02
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * 30 / 40 / 0.6931472, rel=1e-5)
    if adapters.VARIANTS[name].has_table:
        table = result["tables"]["none"]
        assert table["loss"] == pytest.approx(result["loss"], abs=2e-3)
        assert 1e-4 < table["relative_rms_error"] < 4e-3
        assert not list(tmp_path.glob("table-*"))


def test_pilots_choose_the_rate_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = adapters.result_of

    def noted(name: str, seed: int, **options: Any) -> dict[str, Any]:
        asked.append((name, seed))
        result = real(name, seed, **options)
        # the second rate is made the better one
        return result | ({"val_loss": 1.0 if name.endswith("@0.0001") else 2.0} if "@" in name else {})

    monkeypatch.setattr(adapters, "result_of", noted)
    for seed in (0, 1):
        assert adapters.run_one("feed-forward", seed, STUDY, tmp_path)["learning_rate"] == 1e-4
    assert asked == [("feed-forward", 0), ("feed-forward@0.0003", 0), ("feed-forward@0.0001", 0), ("feed-forward", 1)]
    with pytest.raises(ValueError, match="unknown variant 'lora'; there are frozen, full, feed-forward"):
        adapters.run_one("lora", 0, STUDY, tmp_path)


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "mole-adapter" in BENCHES
    monkeypatch.setattr(mole_adapter, "FOLDER", tmp_path)
    monkeypatch.setattr(mole_adapter, "find_asset", lambda name: Path())
    monkeypatch.setattr(mole_adapter, "QUICK", replace(STUDY, num_rates=1))
    rows = list(mole_adapter.run(Settings("cpu", quick=True, seed=0)))
    losses = {row.case.split()[0]: row for row in rows if row.metric == "loss" and row.peer != "trained form"}
    assert list(losses) == ["frozen", "feed-forward", "token-4e"]
    assert losses["token-4e"].peer_value == losses["frozen"].value
    (table,) = (row for row in rows if row.peer == "trained form")
    assert table.peer_value == losses["token-4e"].value
    assert (tmp_path / "mole-adapter.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(mole_adapter, "find_asset", lambda name: None)
    (row,) = mole_adapter.run(Settings("cpu", quick=True, seed=0))
    assert row.reason is not None
    assert "tenfold assets get smollm2-135m wikipedia-summaries" in row.reason
