"""`generate` through a SpeCache: greedy, sampling, stopping, streaming, chunks, turns, models, and what is refused."""

import pytest
import torch
import transformers
from tenfold.inference.specache import SpeCache, decode_logits, generate_with_specache, specache_generate
from transformers import AutoModelForCausalLM, DynamicCache, StoppingCriteria, StoppingCriteriaList

SMALL = {"residual_length": 16, "group_size": 8}
FULL = {"top_k": 512, **SMALL}
LOSSY = {"top_k": 3, "bits": 1, **SMALL}


def generate(model, ids, options, **kwargs):
    cache = SpeCache(model.config, **options)
    return model.generate(ids, past_key_values=cache, custom_generate=specache_generate, **kwargs), cache


@pytest.mark.parametrize("sampling", [{"temperature": 0.9, "top_k": 20}, {"top_p": 0.8, "repetition_penalty": 1.3}])
def test_a_seeded_run_with_full_budget_samples_the_same_tokens_as_generate(tiny_llama, prompt, sampling) -> None:
    model, ids = tiny_llama(), prompt()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": True, **sampling}
    torch.manual_seed(5)
    plain = model.generate(ids, **options)
    torch.manual_seed(5)
    ours, _ = generate(model, ids, FULL, **options)
    assert torch.equal(ours, plain)
    torch.manual_seed(6)
    assert not torch.equal(generate(model, ids, FULL, **options)[0], ours)


def test_lossy_sampling_repeats_with_its_seeds_and_guesses_have_their_own(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": True}

    def run(seed: int, **changes):
        torch.manual_seed(seed)
        out, cache = generate(model, ids, {**LOSSY, **changes}, **options)
        return out, torch.get_rng_state(), cache

    first, state, _ = run(7)
    again, _, _ = run(7)
    other_guesses, other_state, _ = run(7, speculation_seed=1)
    assert torch.equal(first, again)
    # other guesses fetch other rows, but take nothing from the generator of the outputs
    assert not torch.equal(first, other_guesses)
    assert torch.equal(state, other_state)
    # guesses drawn by the same rule are right less often than greedy ones can be in greedy decoding
    assert run(7, speculation="greedy")[2].statistics.speculated == 2 * 29


def test_scores_logits_and_dictionaries_are_those_of_generate(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    plain = model.generate(ids, **options)
    ours, cache = generate(model, ids, FULL, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert ours.past_key_values is cache
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(ours[name]), torch.stack(plain[name]), rtol=1e-4, atol=1e-4)


def test_finished_sequences_are_padded_and_all_finished_stops(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt(batch=3)
    free = model.generate(ids, max_new_tokens=30, do_sample=False, attention_mask=torch.ones_like(ids))
    # each sequence's own tokens: one ends early, one later, one may never
    stops = [int(free[0, 70 + 4]), int(free[1, 70 + 9])]
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 30,
        "do_sample": False,
        "eos_token_id": stops,
        "pad_token_id": 0,
    }
    plain = model.generate(ids, **options)
    assert torch.equal(generate(model, ids, FULL, **options)[0], plain)
    one, cache = generate(model, ids[:1], FULL, **{**options, "attention_mask": torch.ones_like(ids[:1])})
    assert one.shape[1] < 100
    assert int(one[0, -1]) in stops
    assert cache.get_seq_length() == one.shape[1] - 1


def test_the_librarys_stopping_criteria_and_several_return_sequences_work(tiny_llama, prompt) -> None:
    class AfterTen(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 80)

    model, ids = tiny_llama(), prompt(batch=1)
    torch.manual_seed(0)
    out, cache = generate(
        model,
        ids,
        LOSSY,
        max_new_tokens=40,
        do_sample=True,
        num_return_sequences=3,
        stopping_criteria=StoppingCriteriaList([AfterTen()]),
    )
    assert out.shape == (3, 80)
    assert cache.lengths == (79, 79, 79)


def test_one_call_does_both_and_streams(tiny_llama, prompt) -> None:
    class Collect:
        def __init__(self) -> None:
            self.received, self.ended = [], False

        def put(self, value: torch.Tensor) -> None:
            self.received.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model, ids = tiny_llama(), prompt(batch=1)
    streamer = Collect()
    out = generate_with_specache(
        model, ids, specache=FULL, attention_mask=torch.ones_like(ids), max_new_tokens=8, streamer=streamer
    )
    assert torch.equal(out, generate(model, ids, FULL, max_new_tokens=8)[0])
    assert streamer.ended
    assert streamer.received[0] == ids[0].tolist()
    assert [token for put in streamer.received[1:] for token in put] == out[0, 70:].tolist()
    with pytest.raises(ValueError, match="cache and specache were both given"):
        generate_with_specache(model, ids, cache=SpeCache(model.config), specache={"bits": 1})


@pytest.mark.parametrize("padding", [0, 17])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_a_prompt_in_chunks_gives_the_same_cache(tiny_llama, prompt, chunk, padding) -> None:
    model, ids = tiny_llama(), prompt()
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    _, one = generate(model, ids, LOSSY, **options)
    _, many = generate(model, ids, LOSSY, prefill_chunk_size=chunk, **options)
    assert many.statistics.prefills == -(-70 // chunk)
    assert many.lengths == one.lengths
    for layer in range(2):
        for sequence, pad in enumerate((0, padding)):
            for a, b in zip(one.full_precision(layer), many.full_precision(layer), strict=True):
                torch.testing.assert_close(a[sequence, :, pad:70], b[sequence, :, pad:70], rtol=1e-4, atol=1e-4)
    plain = model.generate(ids, **options)
    assert torch.equal(generate(model, ids, FULL, prefill_chunk_size=chunk, **options)[0], plain)


def test_a_second_turn_reads_the_first_in_full_precision(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt(length=40)
    options = {"max_new_tokens": 10, "do_sample": False}
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    first, cache = generate(model, ids, FULL, attention_mask=mask, **options)
    longer = torch.cat([first, prompt(length=15, seed=9)], dim=1)
    mask = torch.cat([mask, torch.ones(2, 25, dtype=torch.long)], dim=1)
    ours = model.generate(
        longer, attention_mask=mask, past_key_values=cache, custom_generate=specache_generate, **options
    )
    assert torch.equal(ours, model.generate(longer, attention_mask=mask, **options))
    # only what was new went through the model: the last output of turn one and 15 tokens
    assert cache.statistics.prefills == 2
    assert cache.lengths == (74 - 6, 74)
    assert cache.capacity == 74
    cache.reset()
    assert (cache.device_bytes, cache.host_bytes, cache.get_seq_length()) == (0, 0, 0)
    again = model.generate(ids, past_key_values=cache, custom_generate=specache_generate, **options)
    assert again.shape == (2, 50)


def decoders() -> dict:
    common = {
        "vocab_size": 83,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # scores large enough for a soft cap, a wrong mask or a wrong position to show
        "initializer_range": 0.15,
    }
    grouped = {**common, "num_key_value_heads": 2}
    return {
        "llama-mha": transformers.LlamaConfig(**common),
        "llama-mqa": transformers.LlamaConfig(**common, num_key_value_heads=1),
        "qwen2": transformers.Qwen2Config(**grouped),
        "qwen3": transformers.Qwen3Config(**grouped, head_dim=24),
        "mistral": transformers.MistralConfig(**grouped, sliding_window=None),
        "gemma": transformers.GemmaConfig(**grouped, head_dim=20),
        # soft-capped scores, eager attention in the prefill
        "gemma2": transformers.Gemma2Config(
            **grouped,
            head_dim=16,
            layer_types=["full_attention"] * 2,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=8,
        ),
        "gpt-neox": transformers.GPTNeoXConfig(**common),
        "phi": transformers.PhiConfig(**common),
        "olmo2": transformers.Olmo2Config(**grouped),
    }


@pytest.mark.parametrize("name", decoders())
def test_decoders_of_many_kinds_give_their_own_tokens(name: str, prompt) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(decoders()[name]).eval()
    check_decoder(model, prompt())


def test_our_decoder_gives_its_own_tokens(prompt) -> None:
    from tenfold.lightning_modules.decoder.configuration import DecoderConfig
    from tenfold.lightning_modules.decoder.modeling import DecoderForCausalLM

    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=83,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    check_decoder(DecoderForCausalLM(config).eval(), prompt())


@torch.no_grad()
def check_decoder(model, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    options = {
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    implementation = model.config._attn_implementation
    plain = model.generate(ids, **options)
    for attention in ("packed", "dense"):
        ours, cache = generate(model, ids, {**FULL, "attention": attention}, **options)
        assert torch.equal(ours, plain)
        assert cache.lengths == (82, 93)
    assert model.config._attn_implementation == implementation
    # and where rows are lost, both forms of attention lose the same
    given = plain[:, 70:90]
    logits = [
        decode_logits(model, ids, given, cache=SpeCache(model.config, attention=form, **LOSSY), attention_mask=mask)
        for form in ("packed", "dense")
    ]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


def window_of(config_class, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    return config_class(**{**sizes, **changes})


UNSUPPORTED = {
    "mistral": (window_of(transformers.MistralConfig, sliding_window=16), "layer 0 of this mistral model is sliding"),
    "gemma2": (window_of(transformers.Gemma2Config), "layer 0 of this gemma2 model is sliding_attention"),
    "gemma3": (window_of(transformers.Gemma3TextConfig), "layer 0 of this gemma3_text model is sliding_attention"),
    "qwen2": (
        window_of(transformers.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=2),
        "layer 2 of this qwen2 model is sliding_attention",
    ),
    "mamba": (transformers.MambaConfig(num_hidden_layers=2, hidden_size=32), "mamba.*full attention in all layers"),
    "jamba": (window_of(transformers.JambaConfig), "layer 0 of this jamba model is"),
    "qwen3-next": (window_of(transformers.Qwen3NextConfig), "layer 0 of this qwen3_next model is linear_attention"),
    "deepseek": (window_of(transformers.DeepseekV3Config), "layer 0 of this deepseek_v3 model has latent attention"),
    "t5": (transformers.T5Config(num_layers=1, d_model=16), "t5 is an encoder-decoder"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_models_with_other_layers_are_refused_by_the_layers_name(name: str) -> None:
    config, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=message):
        SpeCache(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3; the device copy can have 1, 2 or 4 bits"),
        ({"top_k": -1}, "top_k is -1; it must be 0 or more"),
        ({"top_k": 513}, "top_k is 513, larger than the model's context of 512 tokens"),
        ({"residual_length": 48, "group_size": 32}, "residual_length 48 is not a positive multiple of group_size 32"),
        ({"residual_length": 0}, "residual_length 0 is not a positive multiple of group_size 64"),
        ({"group_size": 0}, "group_size is 0; it must be at least 1"),
        ({"mode": "fast"}, "mode is 'fast'; use one of 'speculative', 'exact_fetch', 'low_bit_only'"),
        ({"rule": "mid"}, "rule is 'mid'; use one of 'kivi', 'centred'"),
        ({"host_limit_bytes": -5}, "host_limit_bytes is -5; it must be 0 or more"),
    ],
)
def test_settings_out_of_range_are_named(tiny_llama, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpeCache(tiny_llama().config, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams is 3: SpeCache does not support beam search"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
    ],
)
def test_modes_of_generation_that_do_not_fit_are_refused(tiny_llama, prompt, options: dict, message: str) -> None:
    model = tiny_llama(attn_implementation="eager")
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=message):
        generate(model, prompt(), FULL, max_new_tokens=4, **options)
    # told before anything was computed
    assert passes == []


def test_prompts_that_do_not_fit_are_refused(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    right, inside, nothing = (torch.ones_like(ids) for _ in range(3))
    right[1, -3:], inside[0, 5], nothing[1] = 0, 0, 0
    for mask, message in (
        (right, "sequence 1 of the batch is padded on the right or inside"),
        (inside, "sequence 0 of the batch is padded on the right or inside"),
        (nothing, "sequence 1 of the batch is padding only"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, FULL, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(ValueError, match="the prompt has 600 tokens, the model's maximum is 512: shorten it"):
        generate(model, prompt(length=600), FULL, max_new_tokens=4)
    cache = SpeCache(model.config, **FULL)
    model.generate(ids, max_new_tokens=4, past_key_values=cache, custom_generate=specache_generate)
    with pytest.raises(ValueError, match="the cache holds 2 sequences, this batch has 1"):
        model.generate(
            prompt(batch=1, length=90), max_new_tokens=4, past_key_values=cache, custom_generate=specache_generate
        )
    with pytest.raises(ValueError, match="the prompt has 60 tokens, 73 of them are in the cache: nothing is new"):
        model.generate(prompt(length=60), max_new_tokens=4, past_key_values=cache, custom_generate=specache_generate)


def test_the_cache_is_of_no_use_without_its_loop_and_the_loop_without_the_cache(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    with pytest.raises(ValueError, match="custom_generate=specache_generate"):
        model.generate(ids, max_new_tokens=4, past_key_values=SpeCache(model.config))
    with pytest.raises(ValueError, match=r"needs past_key_values=SpeCache\(model.config\), got DynamicCache"):
        model.generate(ids, max_new_tokens=4, past_key_values=DynamicCache(), custom_generate=specache_generate)
    with pytest.raises(ValueError, match="the cache was made for 3 layers, the model has 2"):
        generate_with_specache(model, ids, cache=SpeCache(tiny_llama(num_hidden_layers=3).config), max_new_tokens=2)
    model.set_attn_implementation("specache")
    with pytest.raises(ValueError, match="works only inside specache_generate"):
        model(ids)


def test_what_would_move_or_remove_tokens_is_refused(tiny_llama, prompt) -> None:
    cache = SpeCache(tiny_llama().config)
    for call, message in (
        (lambda: cache.crop(-1), "cannot remove tokens"),
        (lambda: cache.reorder_cache(torch.tensor([0])), "does not support beam search"),
        (lambda: cache.batch_repeat_interleave(2), "cannot repeat sequences"),
        (lambda: cache.batch_select_indices(torch.tensor([0])), "cannot drop sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_after_an_error_in_the_model_attention_is_put_back_and_nothing_was_stored(tiny_llama, prompt) -> None:
    model, ids = tiny_llama(), prompt()
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("lost power")

    handle = model.model.layers[1].register_forward_hook(fail)
    cache = SpeCache(model.config, **SMALL)
    with pytest.raises(RuntimeError, match="lost power"):
        model.generate(ids, max_new_tokens=9, past_key_values=cache, custom_generate=specache_generate)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    # prefill, pre-decode and one step went through; the second step did not
    assert cache.get_seq_length() == 71
