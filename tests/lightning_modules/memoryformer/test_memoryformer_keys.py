"""Tables keyed by token ids and n-grams: against embeddings and loops, and the same with and without a cache."""

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.memoryformer.keyed import ngram_rows
from torch.nn import functional as F
from transformers import DynamicCache

NGRAM = {"key": "ngram_hash", "orders": [2, 3], "num_heads": 2, "num_rows": 64}


def small(**options):
    torch.manual_seed(0)
    config = decoder_config(
        "ngram-tiny",
        vocab_size=31,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
        feed_forward_options=options or NGRAM,
    )
    return DecoderForCausalLM(config).double().eval()


def ids_of(rows, length, seed=1):
    return torch.randint(31, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_rows_depend_on_the_last_ids_alone_and_stay_in_their_part():
    ids = torch.cat([torch.full((1, 2), -1), ids_of(1, 4000)], dim=1)
    rows = ngram_rows(ids, 4000, (1, 3), 2, 50)
    assert rows.shape == (1, 4000, 4)
    seen = {}
    for t in range(4000):
        for term, order in enumerate((1, 1, 3, 3)):
            key = (term, tuple(ids[0, t + 3 - order : t + 3].tolist()))
            row = rows[0, t, term].item()
            assert term * 50 <= row < (term + 1) * 50
            assert seen.setdefault(key, row) == row
    # heads are different hashes, and rows are used about evenly
    assert (rows[0, :, 2] - 100 != rows[0, :, 3] - 150).float().mean() > 0.9
    counts = torch.bincount(rows[0, :, 3] - 150, minlength=50)
    assert counts.min() > 40
    assert counts.max() < 140


def test_token_ids_are_an_embedding_per_layer():
    model = small(key="token_id", gate="none", beside_dense=True)
    layer = model.model.layers[0].feed_forward
    assert layer.table.shape == (31, 16)
    u, ids = torch.randn(2, 5, 16, dtype=torch.float64), ids_of(2, 5)
    tokens = model.model.token_context(ids, torch.zeros_like(u), None)
    torch.testing.assert_close(layer(u, tokens), F.embedding(ids, layer.table) + layer.dense(u))


def test_softmax_over_heads_of_an_id_is_moles_sum():
    model = small(key="token_id", num_heads=3, gate="softmax", beside_dense=False)
    layer = model.model.layers[0].feed_forward
    u, ids = torch.randn(1, 4, 16, dtype=torch.float64), ids_of(1, 4)
    found = layer(u, model.model.token_context(ids, torch.zeros_like(u), None))
    gates = torch.softmax(u @ layer.router.weight.T, -1)
    for t, token in enumerate(ids[0].tolist()):
        expected = sum(gates[0, t, j] * layer.table[j * 31 + token] for j in range(3))
        torch.testing.assert_close(found[0, t], expected)


@pytest.mark.parametrize("steps", [[1] * 8, [3, 1, 4]], ids=["token-by-token", "chunks"])
def test_ngrams_reach_over_cached_steps(steps):
    model, ids = small(), ids_of(2, 8)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(steps, dim=1)]
    expected = model(ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=1e-10)
    # the table matters: another second-to-last id changes the last n-gram's rows
    rows = ngram_rows(torch.tensor([[1, 2, 3], [1, 4, 3]]), 1, (2, 3), 2, 64)
    assert (rows[0] != rows[1]).all()


def test_ngrams_follow_a_cache_that_is_cut_or_reordered():
    model, ids = small(), ids_of(2, 8)
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    cache.crop(-2)
    logits = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(ids).logits[:, 4:], rtol=0, atol=1e-10)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 1]))
    swapped = ids[[1, 1]]
    logits = model(swapped[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, model(swapped).logits[:, 6:], rtol=0, atol=1e-10)


def test_left_padding_changes_nothing():
    model, ids = small(), ids_of(1, 6)
    padded = torch.cat([torch.full((1, 3), 7), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-10)


def test_generation_with_and_without_a_cache_and_with_beams():
    model, ids = small(), ids_of(2, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    for beams in (1, 3):
        cached = model.generate(ids, num_beams=beams, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, num_beams=beams, use_cache=False, **options))


def test_embeddings_in_place_of_ids_are_refused():
    model = small()
    with pytest.raises(ValueError, match="keys made of token ids need input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64))


def test_a_cache_of_another_model_is_refused():
    model = small()
    other = small(key="token_id", gate="none")
    cache = DynamicCache(config=model.config)
    other(ids_of(1, 4), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="the cache holds 4 tokens whose ids are not known"):
        model(ids_of(1, 1), past_key_values=cache, use_cache=True)
