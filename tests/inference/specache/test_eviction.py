"""Window and heavy-hitter caches against a full forward pass whose mask drops the same tokens."""

import pytest
import torch
from tenfold.inference.specache import (
    CacheShape,
    HeavyHitterCache,
    SpeCacheOptions,
    WindowCache,
    build_cache,
    decode_logits,
    equal_bytes_options,
    specache_generate,
)
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

STEPS = 14


class Oracle:
    """A Llama in float64, one sequence, one token at a time over explicit sets of tokens per layer and head."""

    def __init__(self, model: LlamaForCausalLM, budget: int, num_kept: int, *, heavy: bool) -> None:
        self.model, self.budget, self.num_kept, self.heavy = model, budget, num_kept, heavy
        self.ring = budget - num_kept
        layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
        self.held: list[list[set[int]]] = [[set() for _ in range(heads)] for _ in range(layers)]
        self.received: list[list[dict[int, float]]] = [[{} for _ in range(heads)] for _ in range(layers)]
        self.keys: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self.values: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def token(self, token: int, position: int, prompt_length: int) -> torch.Tensor:
        """Logits (V,) after one token; sets are cut from the prompt's last token on."""
        body, config = self.model.model, self.model.config
        hidden = body.embed_tokens(torch.tensor([[token]]))
        cos, sin = body.rotary_emb(hidden, torch.tensor([[position]]))
        group = config.num_attention_heads // config.num_key_value_heads
        for number, layer in enumerate(body.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                projection(normed).view(1, 1, -1, config.head_dim).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            self.keys[number].append(key[0, :, 0])
            self.values[number].append(value[0, :, 0])
            out = torch.zeros(config.num_attention_heads, config.head_dim, dtype=hidden.dtype)
            for head in range(config.num_attention_heads):
                kv = head // group
                seen = sorted(self.held[number][kv] | {position})
                keys = torch.stack([self.keys[number][slot][kv] for slot in seen])
                values = torch.stack([self.values[number][slot][kv] for slot in seen])
                weights = (keys @ query[0, head, 0] * config.head_dim**-0.5).softmax(0)
                out[head] = weights @ values
                for slot, weight in zip(seen, weights.tolist(), strict=True):
                    received = self.received[number][kv]
                    received[slot] = received.get(slot, 0.0) + weight
            for kv in range(config.num_key_value_heads):
                self.held[number][kv].add(position)
                if position >= prompt_length - 1:
                    self._drop(number, kv, position)
            hidden = hidden + attention.o_proj(out.view(1, 1, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(body.norm(hidden))[0, 0]

    def _drop(self, number: int, kv: int, position: int) -> None:
        held, received = self.held[number][kv], self.received[number][kv]
        while len(held) > self.budget:
            old = sorted(slot for slot in held if slot <= position - self.ring)
            held.remove(min(old, key=lambda slot: received[slot]) if self.heavy else old[self.num_kept])


def oracle_logits(model, ids, continuation, budget, num_kept, *, heavy) -> tuple[torch.Tensor, Oracle]:
    oracle = Oracle(model, budget, num_kept, heavy=heavy)
    tokens, prompt_length = [*ids.tolist(), *continuation.tolist()[:-1]], len(ids)
    with torch.no_grad():
        logits = [oracle.token(token, position, prompt_length) for position, token in enumerate(tokens)]
    return torch.stack(logits[prompt_length - 1 :]), oracle


@pytest.mark.parametrize(
    ("kind", "budget", "kept"),
    [("window", 20, 4), ("window", 9, 0), ("h2o", 20, 10), ("h2o", 6, 4), ("h2o", 7, 0), ("h2o", 45, 30)],
)
def test_logits_are_those_of_explicit_sets_of_tokens(tiny_llama, prompt, kind: str, budget: int, kept: int) -> None:
    model = tiny_llama(dtype=torch.float64, num_hidden_layers=2)
    # long enough for tokens of the continuation to leave the ring and to compete with one another
    ids, continuation = prompt(batch=1, length=40), prompt(batch=1, length=40, seed=5)
    if kind == "window":
        cache = WindowCache(model.config, budget=budget, num_sinks=kept)
    else:
        cache = HeavyHitterCache(model.config, budget=budget, num_recent=budget - kept)
    found = decode_logits(model, ids, continuation, cache=cache)[0]
    wanted, oracle = oracle_logits(model, ids[0], continuation[0], budget, kept, heavy=kind == "h2o")
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
    # the same tokens are held at the end, layer by layer and head by head
    for number, layer in enumerate(cache.layers):
        for head, held in enumerate(oracle.held[number]):
            wanted_keys = {tuple(oracle.keys[number][slot][head].tolist()) for slot in held}
            rows = min(budget, cache.get_seq_length())
            assert len(wanted_keys) == rows
            close = torch.cdist(layer.keys[0, head, :rows], torch.tensor(sorted(wanted_keys), dtype=torch.float64))
            assert (close.min(1).values < 1e-6).all()
            assert close.argmin(1).unique().numel() == rows


def test_attention_received_is_the_column_sum_of_causal_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from tenfold.inference.specache import eviction

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 11, 6, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 2, 11, 6, generator=generator, dtype=torch.float64)
    wanted = torch.zeros(2, 2, 11, dtype=torch.float64)
    for batch, pad in enumerate((0, 5)):
        for head in range(4):
            for row in range(pad, 11):
                scores = key[batch, head // 2, pad : row + 1] @ query[batch, head, row] * 0.7
                wanted[batch, head // 2, pad : row + 1] += scores.softmax(0)
    for block in (256, 3):
        monkeypatch.setattr(eviction, "_OBSERVED_QUERIES", block)
        found = eviction.attention_received(query, key, (0, 5), scaling=0.7)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["window", "h2o"])
def test_sequences_padded_on_the_left_equal_each_alone(tiny_llama, prompt, name: str) -> None:
    model, ids, continuation = tiny_llama(), prompt(batch=3, length=40), prompt(batch=3, length=STEPS, seed=7)
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 9, 31)):
        mask[row, :pad] = 0
    cache = build_cache(name, model.config, budget=12)[0]
    together = decode_logits(model, ids * mask, continuation, cache=cache, attention_mask=mask)
    for row, pad in enumerate((0, 9, 31)):
        alone = build_cache(name, model.config, budget=12)[0]
        single = decode_logits(model, ids[row : row + 1, pad:], continuation[row : row + 1], cache=alone)
        torch.testing.assert_close(together[row], single[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["window", "h2o"])
def test_with_room_for_all_tokens_they_are_the_full_cache(tiny_llama, prompt, name: str) -> None:
    model, ids = tiny_llama(), prompt(batch=2, length=30)
    cache, arguments = build_cache(name, model.config, budget=60)
    assert arguments["custom_generate"] is specache_generate
    out = model.generate(ids, max_new_tokens=STEPS, do_sample=False, **arguments)
    assert torch.equal(out, model.generate(ids, max_new_tokens=STEPS, do_sample=False))
    assert cache.statistics.forwards == STEPS
    assert cache.device_bytes < CacheShape.of(model.config, torch.float32).held_bytes(2, 60, scored=True)


@pytest.mark.parametrize(("name", "scored"), [("window", False), ("h2o", True)])
def test_bytes_held_are_the_formula_whatever_passes_through(tiny_llama, prompt, name: str, scored: bool) -> None:
    model = tiny_llama()
    cache, arguments = build_cache(name, model.config, budget=24)
    model.generate(prompt(batch=2, length=50), max_new_tokens=8, do_sample=False, **arguments)
    assert cache.device_bytes == CacheShape.of(model.config, torch.float32).held_bytes(2, 24, scored=scored)
    assert cache.host_bytes == 0


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("capacity", [1000, 4096])
def test_equal_budgets_take_no_more_bytes_and_hardly_less(bits: int, capacity: int) -> None:
    shape = CacheShape(num_layers=3, num_heads=2, head_dim=64, itemsize=2)
    options = SpeCacheOptions(bits=bits)
    wanted = shape.device_bytes(options, 1, capacity)
    for name in ("window", "h2o"):
        budget = equal_bytes_options(name, shape=shape, options=options, capacity_tokens=capacity)["budget"]
        taken, more = (shape.held_bytes(1, tokens, scored=name == "h2o") for tokens in (budget, budget + 1))
        assert taken <= wanted < more
    # the paper's own pairing: a residual of 64 and 64 rows against a residual of 128
    kivi = equal_bytes_options("kivi", shape=shape, options=options, capacity_tokens=capacity)
    assert kivi == {"bits": bits, "group_size": 64, "residual_length": 128}
    of_kivi = shape.device_bytes(SpeCacheOptions(mode="low_bit_only", **kivi), 1, capacity)
    assert 0.93 * wanted < of_kivi <= wanted
    same = equal_bytes_options("exact-fetch", shape=shape, options=options, capacity_tokens=capacity)
    assert shape.device_bytes(SpeCacheOptions(mode="exact_fetch", **same), 1, capacity) == wanted


def test_what_does_not_fit_is_told(tiny_llama, prompt) -> None:
    model = tiny_llama()
    for name, options, message in (
        ("window", {"budget": 0}, "budget is 0; WindowCache must hold at least 1 token"),
        ("window", {"budget": 4}, "4 of 4 tokens are kept for good; give 0 to 3"),
        ("h2o", {"budget": 8, "num_recent": 0}, "8 of 8 tokens are kept for good"),
        ("h2o", {"budget": 513}, "budget is 513, larger than the model's context of 512 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            build_cache(name, model.config, **options)
    shape = CacheShape.of(model.config, torch.float32)
    with pytest.raises(ValueError, match="the bytes of cache 'quantized' have no formula"):
        equal_bytes_options("quantized", shape=shape, options=SpeCacheOptions(), capacity_tokens=256)
    ids = prompt(batch=1, length=30)
    for name, kind in (("window", "WindowCache"), ("h2o", "HeavyHitterCache")):
        cache, arguments = build_cache(name, model.config, budget=16)
        with pytest.raises(ValueError, match=f"{kind} has dropped earlier tokens, so that a prompt must come whole"):
            model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=8, **arguments)
        cache, arguments = build_cache(name, model.config, budget=16)
        out = model.generate(ids, max_new_tokens=2, do_sample=False, **arguments)
        with pytest.raises(ValueError, match="a prompt must come whole"):
            model.generate(torch.cat([out, ids], dim=1), max_new_tokens=2, do_sample=False, **arguments)
        with pytest.raises(ValueError, match=f"num_beams is 2: {kind} does not support beam search"):
            model.generate(ids, max_new_tokens=2, num_beams=2, **build_cache(name, model.config, budget=16)[1])
        with pytest.raises(ValueError, match=f"{kind} cannot remove tokens"):
            cache.crop(-1)
    assert model.config._attn_implementation == "sdpa"
