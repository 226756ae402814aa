"""The offloaded MoE computes what the resident one does; its cache, its reads, and the paper's latency model."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.lightning_modules import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.latency import expert_bytes, loaded_experts, loading_ms, row_bytes
from tenfold.lightning_modules.mole.offloaded_experts import ExpertCache, offload_experts, write_experts

WAYS: dict[str, dict[str, Any]] = {
    "direct": {"storage": "direct"},
    "direct, nothing kept": {"storage": "direct", "experts_in_memory": 0, "read_ahead": False},
    "mmap": {"storage": "mmap", "experts_in_memory": 3},
    "mmap in place": {"storage": "mmap", "in_place": True},
    "memory": {"storage": "memory"},
}


def make(**fields: Any) -> DecoderForCausalLM:
    torch.manual_seed(0)
    options = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    model = DecoderForCausalLM(decoder_config("moe-tiny-10e", **(options | fields)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    write_experts(make(), tmp_path / "experts")
    return tmp_path / "experts"


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_it_computes_what_the_resident_model_does(way: str, experts: Path) -> None:
    model = make()
    ids = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    start, options = ids[:, :2], {"do_sample": False, "max_new_tokens": 10, "attention_mask": torch.ones(3, 2)}
    text = model.generate(start, **options)
    before = sum(p.numel() for p in model.parameters())
    cache = offload_experts(model, experts, **WAYS[way])
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(model.generate(start, **options), text)
    # the experts are gone, the routers are not
    width = 64
    assert before - sum(p.numel() for p in model.parameters()) == 3 * 10 * 2 * 32 * width
    assert cache.source.bytes_read > 0
    for entries in cache._entries:
        assert len(entries) <= cache.capacity


@torch.no_grad()
def test_bytes_are_those_of_the_experts_that_were_missing(experts: Path) -> None:
    model = make()
    one = 2 * 32 * 64 * 4
    cache = offload_experts(model, experts, storage="direct", experts_in_memory=0, read_ahead=False)
    model(torch.tensor([[5]]))
    # nothing is kept: 3 layers, top 2
    assert (cache.misses, cache.hits) == (6, 0)
    assert cache.source.bytes_read == 6 * one
    model = make()
    cache = offload_experts(model, experts, storage="direct", experts_in_memory=10, read_ahead=False)
    for _ in range(3):
        model(torch.tensor([[5]]))
    assert (cache.misses, cache.hits) == (6, 12)
    assert cache.source.bytes_read == 6 * one


@torch.no_grad()
def test_experts_guessed_from_the_layer_before_are_hits(experts: Path) -> None:
    model = make()
    # layers that add nothing: the next router sees what this one saw, up to its norm
    for layer in model.model.layers:
        layer.attention.o_proj.weight.zero_()
    model.model.layers[0].feed_forward.experts.down.zero_()
    model.model.layers[1].feed_forward.experts.down.zero_()
    write_experts(model, experts)
    other = copy.deepcopy(model)
    with_guess = offload_experts(model, experts, storage="direct", experts_in_memory=0)
    without = offload_experts(other, experts, storage="direct", experts_in_memory=0, read_ahead=False)
    ids = torch.tensor([[5]])
    assert torch.equal(model(ids).logits, other(ids).logits)
    assert (without.misses, without.hits) == (6, 0)
    # only the first layer has to be read on demand
    assert (with_guess.misses, with_guess.hits) == (2, 4)


def test_the_least_recently_used_expert_goes_first() -> None:
    class Source:
        region = type("Region", (), {"row_bytes": 64})()
        asked: list[int] = []  # noqa: RUF012

        def request(self, rows: np.ndarray, out: np.ndarray, **_: Any) -> Any:
            self.asked.append(int(rows[0]))
            return type("Pending", (), {"wait": lambda self: None})()

    source: Any = Source()
    cache = ExpertCache(source, (2, 8, 2, 4), torch.float32, capacity=2)
    for experts in ([0], [1], [0], [2], [0], [1]):
        cache.fetch(1, experts)
        cache.release(1)
    # 2 displaced 1 and not 0, which was used later; then 1 displaced 2
    assert source.asked == [8, 9, 10, 9]
    cache.fetch(1, [3, 4, 5])
    assert len(cache._entries[1]) == 5
    cache.release(1)
    assert list(cache._entries[1]) == [4, 5]


def test_what_does_not_fit_is_refused(experts: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds layers, experts, width, hidden width \[3, 10, 32, 64\] in float32, the"
    ):
        offload_experts(make(num_hidden_layers=2), experts)
    with pytest.raises(ValueError, match="in bfloat16; write its own experts"):
        offload_experts(make().bfloat16(), experts)
    with pytest.raises(ValueError, match="only a decoder with feed_forward 'moe' has experts to offload"):
        write_experts(DecoderForCausalLM(decoder_config("dense-tiny", vocab_size=8)), experts)
    with pytest.raises(ValueError, match="in_place needs storage 'mmap', not 'direct'"):
        offload_experts(make(), experts, in_place=True)
    with pytest.raises(ValueError, match="capacity -1 is below 0"):
        offload_experts(make(), experts, experts_in_memory=-1)


def test_the_papers_numbers_of_loaded_experts_are_uniform_routing() -> None:
    published = {10: (1.6, 6.7, 8.0), 34: (1.9, 12.3, 27.4)}
    for num_experts, expected in published.items():
        for batch, value in zip((1, 8, 32), expected, strict=True):
            assert round(loaded_experts(num_experts, batch), 1) == value
    assert [round(loaded_experts(n, b), 2) for n in (10, 34) for b in (1, 8, 32)] == [
        1.60, 6.66, 7.99, 1.88, 12.30, 27.40,
    ]  # fmt: skip


@pytest.mark.parametrize(("num_experts", "batch"), [(10, 1), (10, 8), (34, 32)])
def test_the_formula_against_throws_of_dice(num_experts: int, batch: int) -> None:
    generator = np.random.default_rng(0)
    loaded = []
    for _ in range(2000):
        used = {e for _ in range(batch) for e in generator.choice(num_experts, 2, replace=False).tolist()}
        loaded.append(len(used - {0, 1}))
    error = np.std(loaded) / len(loaded) ** 0.5
    assert abs(np.mean(loaded) - loaded_experts(num_experts, batch)) < 4 * error


def test_loading_times_at_the_papers_bandwidth() -> None:
    # 410M: 24 layers, d 1024, experts of width 2048, 16 bits, 16 GB/s; megabytes and milliseconds
    table = {
        ("moe", 10): ((322, 20.1), (1349, 84.3), (1611, 100.7)),
        ("moe", 34): ((383, 23.9), (2476, 154.8), (5516, 344.8)),
        ("mole", 4): ((0.20, 0.01), (1.6, 0.10), (6.3, 0.39)),
        ("mole", 16): ((0.79, 0.05), (6.3, 0.39), (25.2, 1.57)),
    }
    for (kind, experts), expected in table.items():
        for batch, (megabytes, milliseconds) in zip((1, 8, 32), expected, strict=True):
            if kind == "moe":
                # the paper states the number of experts to one decimal, and the times follow from that
                loaded = 24 * round(loaded_experts(experts, batch), 1) * expert_bytes(1024, 2048)
                assert loaded / 1e6 == pytest.approx(megabytes, abs=0.6)
            else:
                loaded = batch * row_bytes(24, experts, 1024)
                assert loaded / 1e6 == pytest.approx(megabytes, abs=0.05)
            assert loading_ms(loaded) == pytest.approx(milliseconds, rel=5e-3, abs=5e-3)
