"""Where SpeCache must equal something else exactly: plain attention, KIVI, itself with another guess."""

import pytest
import torch
from tenfold.inference.specache import SpeCache, SpeCacheSession, decode_logits, specache_generate
from tenfold.kernels.low_bit_kv import pack, unpack
from transformers import DynamicCache

SMALL = {"residual_length": 16, "group_size": 8}


def greedy_pairs(model, ids: torch.Tensor, num_steps: int, cache: SpeCache) -> list[torch.Tensor]:
    """Row-0 and row-1 logits of every two-token step under greedy decoding."""
    session, logits = SpeCacheSession(model, cache), []
    mask = torch.ones_like(ids)
    token = session.prefill(ids, capacity=ids.shape[1] + num_steps, attention_mask=mask).argmax(-1)
    forward = session._forward

    def recorded(*args):
        logits.append(forward(*args))
        return logits[-1]

    session._forward = recorded
    with session.decoding():
        for _ in range(num_steps):
            ids = torch.cat([ids, token[:, None]], dim=1)
            token = session.step(ids, lambda _ids, scores, _guess: scores.argmax(-1)).argmax(-1)
    return logits


def full_precision_pairs(model, ids: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """The same passes over a plain cache, the second token cropped away after each."""
    cache, logits = DynamicCache(config=model.config), []
    token = model(ids, past_key_values=cache).logits[:, -1].argmax(-1)
    logits.append(model(token[:, None], past_key_values=cache).logits)
    cache.crop(-1)
    guess = logits[-1][:, -1].argmax(-1)
    for _ in range(num_steps):
        logits.append(model(torch.stack([token, guess], 1), past_key_values=cache).logits)
        cache.crop(-1)
        token, guess = logits[-1][:, 0].argmax(-1), logits[-1][:, 1].argmax(-1)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@torch.no_grad()
def test_with_every_row_exact_a_step_is_plain_attention_bit_for_bit(tiny_llama, prompt, bits, dtype) -> None:
    model, ids = tiny_llama(dtype=dtype), prompt()
    cache = SpeCache(model.config, bits=bits, top_k=512, attention="dense", **SMALL)
    ours, plain = greedy_pairs(model, ids, 30, cache), full_precision_pairs(model, ids, 30)
    # row 0 is the output; the guesses of row 1 chain on the pre-decode, which sees low bits
    for mine, theirs in zip(ours[1:], plain[1:], strict=True):
        assert torch.equal(mine[:, 0], theirs[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lossless",
    [
        pytest.param({"residual_length": 512, "group_size": 8, "bits": 1}, id="nothing-leaves-the-residual"),
        # a group of one value is its own zero: the copy loses nothing, for any number of rows
        pytest.param({"residual_length": 16, "group_size": 1, "bits": 2}, id="lossless-copy"),
    ],
)
@pytest.mark.parametrize("top_k", [0, 3])
@torch.no_grad()
def test_with_a_lossless_copy_every_pass_is_plain_and_every_guess_right(
    tiny_llama, prompt, top_k, lossless, dtype
) -> None:
    model, ids = tiny_llama(dtype=dtype), prompt()
    cache = SpeCache(model.config, top_k=top_k, attention="dense", **lossless)
    ours, plain = greedy_pairs(model, ids, 30, cache), full_precision_pairs(model, ids, 30)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain, strict=True))
    guesses = torch.stack([logits[:, -1].argmax(-1) for logits in ours[:-1]])
    tokens = torch.stack([logits[:, 0].argmax(-1) for logits in ours[1:]])
    if dtype == torch.float32:
        assert torch.equal(guesses, tokens)


@pytest.mark.parametrize("options", [{"top_k": 512}, {"residual_length": 512, "group_size": 8}])
@torch.no_grad()
def test_the_packed_path_is_plain_attention_to_rounding(tiny_llama, prompt, options) -> None:
    model, ids = tiny_llama(), prompt()
    cache = SpeCache(model.config, **{**SMALL, **options})
    ours, plain = greedy_pairs(model, ids, 30, cache), full_precision_pairs(model, ids, 30)
    for mine, theirs in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine[:, 0], theirs[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["speculative", "exact_fetch"])
def test_full_budget_gives_the_tokens_of_generate(tiny_llama, prompt, mode) -> None:
    model, ids = tiny_llama(seed=4), prompt()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    cache = SpeCache(model.config, top_k=512, mode=mode, **SMALL)
    ours = model.generate(ids, past_key_values=cache, custom_generate=specache_generate, **options)
    assert torch.equal(ours, model.generate(ids, **options))


@torch.no_grad()
def test_the_output_does_not_see_the_guess_only_the_rows_it_chose(tiny_llama, prompt) -> None:
    model, ids, given = tiny_llama(), prompt(), prompt(length=9, seed=8)
    guesses = list(prompt(batch=8, length=2, seed=9))
    outputs = []
    for last in (guesses[-1], (guesses[-1] + 7) % 80 + 1):
        cache = SpeCache(model.config, top_k=4, **SMALL)
        outputs.append(decode_logits(model, ids, given, cache=cache, guesses=[*guesses[:-1], last]))
    # the last guess goes along in the last step: the rows it was given are fixed by then
    assert torch.equal(outputs[0], outputs[1])
    cache = SpeCache(model.config, top_k=4, **SMALL)
    changed = decode_logits(model, ids, given, cache=cache, guesses=[(guesses[0] + 7) % 80 + 1, *guesses[1:]])
    # an earlier one matters, through the rows of the next step
    assert not torch.equal(outputs[0], changed)
    assert torch.equal(outputs[0][:, :2], changed[:, :2])


@pytest.mark.parametrize("bits", [1, 2])
def test_without_rows_both_forms_are_kivi(tiny_llama, prompt, bits) -> None:
    model, ids, given = tiny_llama(), prompt(), prompt(length=25, seed=3)
    logits = []
    for options in ({"top_k": 0}, {"mode": "low_bit_only"}):
        cache = SpeCache(model.config, bits=bits, rule="kivi", **SMALL, **options)
        logits.append(decode_logits(model, ids, given, cache=cache))
        assert cache.statistics.bytes_to_device == 0
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_the_low_bit_copy_is_kivis_over_the_stored_originals(tiny_llama, prompt) -> None:
    # after many steps, tokens packed one by one and block by block equal tokens packed all at once
    model, ids, given = tiny_llama(), prompt(length=41), prompt(length=60, seed=3)
    cache = SpeCache(model.config, bits=2, mode="low_bit_only", **SMALL)
    decode_logits(model, ids, given, cache=cache)
    length, residual = cache.lengths[0], SMALL["residual_length"]
    assert length == 100
    for index, layer in enumerate(cache.layers):
        keys, values = cache.full_precision(index)
        num_keys, num_values = length // residual * residual, length - residual
        whole = pack(keys[:, :, :num_keys], bits=2, group_size=8, per="channel")
        assert torch.equal(unpack(layer.store.keys.first(num_keys)), unpack(whole))
        whole = pack(values[:, :, :num_values], bits=2, group_size=8, per="token")
        assert torch.equal(unpack(layer.store.values.first(num_values)), unpack(whole))
        recent = torch.arange(length - residual, length)
        assert torch.equal(layer.store.residual_values[:, :, recent % residual], values[:, :, recent])


@torch.no_grad()
def test_only_output_tokens_are_stored_and_forward_passes_are_counted(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt(length=33)
    cache = SpeCache(model.config, top_k=4, **SMALL)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(
        ids, max_new_tokens=20, do_sample=False, past_key_values=cache, custom_generate=specache_generate
    )
    handle.remove()
    # a prefill, one pre-decode, and a step for every token but the last, which is an output only
    assert len(passes) == cache.statistics.forwards == 1 + 1 + 19
    assert cache.get_seq_length() == 33 + 19
    assert cache.lengths == (52, 52)
    # the first layer's keys depend on tokens and positions alone: a guess in the store would show
    plain = DynamicCache(config=model.config)
    model(out[:, :-1], past_key_values=plain)
    keys, values = cache.full_precision(0)
    torch.testing.assert_close(keys, plain.layers[0].keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values, plain.layers[0].values, rtol=1e-5, atol=1e-5)


def test_a_single_new_token_needs_no_pre_decode(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    cache = SpeCache(model.config, **SMALL)
    out = model.generate(ids, max_new_tokens=1, past_key_values=cache, custom_generate=specache_generate)
    assert out.shape[1] == 71
    assert cache.statistics.forwards == 1


@torch.no_grad()
def test_chosen_rows_are_the_brute_force_top_k_of_the_mean_over_query_heads(tiny_llama, prompt) -> None:
    from tenfold.inference.specache.attention import LayerAttention

    model, ids = tiny_llama(), prompt(length=50)
    for select_residual, limit in ((False, 48), (True, 50)):
        cache = SpeCache(model.config, top_k=7, select_residual=select_residual, **SMALL)
        seen = []
        choose = LayerAttention.choose

        def spy(self, weights, query, *, before_commit, choose=choose, seen=seen):
            seen.append((weights.clone(), choose(self, weights, query, before_commit=before_commit)))
            return seen[-1][1]

        LayerAttention.choose = spy
        try:
            greedy_pairs(model, ids, 1, cache)
        finally:
            LayerAttention.choose = choose
        weights, indices = seen[0]  # pre-decode, first layer, one query
        assert weights.shape == (2, 2, 2, 51)
        for sequence in range(2):
            for head in range(2):
                mean = [sum(weights[sequence, head, g, t].item() for g in range(2)) / 2 for t in range(limit)]
                best = sorted(range(limit), key=lambda t, mean=mean: -mean[t])[:7]
                assert sorted(indices[sequence, head].tolist()) == sorted(best)
