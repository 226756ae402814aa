"""One prefill for many caches gives what each cache gives after a prefill of its own."""

from itertools import product

import pytest
import torch
from tenfold.inference.specache import build_cache, decode_logits, decode_recorded, record_prompt

CACHES = {
    "full": {},
    "specache": {"bits": 1, "top_k": 4, "residual_length": 16, "group_size": 8},
    "exact-fetch": {"bits": 2, "top_k": 4, "residual_length": 16, "group_size": 8},
    "kivi": {"bits": 2, "residual_length": 16, "group_size": 8},
    "window": {"budget": 20},
    "h2o": {"budget": 20},
}


@pytest.fixture(scope="module")
def setting(tiny_llama, prompt):
    model, ids, mask = tiny_llama(), prompt(batch=3, length=50), torch.ones(3, 50, dtype=torch.long)
    mask[1, :11] = 0
    return model, ids, mask, record_prompt(model, ids, attention_mask=mask)


@pytest.mark.parametrize("name", CACHES)
def test_given_tokens_get_the_logits_of_a_prefill_of_ones_own(setting, prompt, name: str) -> None:
    model, ids, mask, recorded = setting
    continuation = prompt(batch=3, length=9, seed=4)
    cache = build_cache(name, model.config, **CACHES[name])[0]
    tokens, found = decode_recorded(model, recorded, cache, continuation=continuation)
    own = build_cache(name, model.config, **CACHES[name])[0]
    wanted = decode_logits(model, ids, continuation, cache=own, attention_mask=mask)
    assert torch.equal(tokens, continuation)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CACHES)
def test_greedy_tokens_are_those_of_generate(setting, name: str) -> None:
    model, ids, mask, recorded = setting
    cache = build_cache(name, model.config, **CACHES[name])[0]
    tokens, _ = decode_recorded(model, recorded, cache, num_tokens=8)
    _, arguments = build_cache(name, model.config, **CACHES[name])
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **arguments)
    assert torch.equal(tokens, wanted[:, 50:])
    if name == "specache":
        theirs = arguments["past_key_values"].statistics
        assert cache.statistics.speculation_hit_ratio == theirs.speculation_hit_ratio
        assert cache.statistics.bytes_to_device == theirs.bytes_to_device


def test_decoding_ends_when_every_sequence_has_met_a_stop(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(sharp=False, initializer_range=0.3), prompt(batch=3, length=20)
    recorded = record_prompt(model, ids)
    tokens, _ = decode_recorded(model, recorded, build_cache("full", model.config)[0], num_tokens=8)
    rows = tokens.tolist()
    firsts = {
        stops: [next((place for place, token in enumerate(row) if token in stops), 8) for row in rows]
        for stops in product(*rows)
    }
    stops = next(stops for stops, first in firsts.items() if min(first) < max(first) < 7)
    met = max(firsts[stops])
    cut, logits = decode_recorded(model, recorded, build_cache("full", model.config)[0], num_tokens=8, stop_ids=stops)
    assert torch.equal(cut, tokens[:, : met + 1])
    assert logits.shape == (*cut.shape, model.config.vocab_size)


def test_what_cannot_be_filled_or_decoded_is_told(setting) -> None:
    model, *_, recorded = setting
    cache = build_cache("window", model.config, budget=20)[0]
    with pytest.raises(ValueError, match="give num_tokens for a greedy continuation, or continuation, not both"):
        decode_recorded(model, recorded, cache)
    decode_recorded(model, recorded, cache, num_tokens=2)
    with pytest.raises(ValueError, match="the cache holds 51 tokens already: use a new one"):
        decode_recorded(model, recorded, cache, num_tokens=2)
    assert model.config._attn_implementation == "sdpa"
