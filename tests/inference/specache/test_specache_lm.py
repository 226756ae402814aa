"""lm-eval through a cache: generations, and likelihoods that are refused or decoded token by token."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from tenfold.inference.evals.model_lm import TransformersLM
from tenfold.inference.specache import SpeCacheLM
from transformers import LlamaConfig, LlamaForCausalLM

SMALL = {"residual_length": 16, "group_size": 8}
CONTEXTS = [
    "the river flows under the old stone bridge and the market is open in winter",
    "a letter",
    "copper and silver from the island were sold at the harbour near the museum",
]


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def generation(context: str, **options) -> Instance:
    arguments = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False, **options}
    return Instance("generate_until", {}, (context, arguments), 0, metadata=("task", 0, 1))


def likelihood(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0, metadata=("task", 0, 1))


@pytest.mark.parametrize("cache", ["specache", "exact-fetch"])
def test_generations_with_full_budget_are_the_plain_models_batch_by_batch(model, tiny_tokenizer, cache) -> None:
    requests = [generation(context) for context in CONTEXTS]
    plain = TransformersLM(model, tiny_tokenizer.tokenizer, batch_size=2, progress="off")
    options = {"top_k": 256, **SMALL}
    ours = SpeCacheLM(model, tiny_tokenizer.tokenizer, cache=cache, cache_options=options, batch_size=2, progress="off")
    assert ours.generate_until(requests) == plain.generate_until(requests)
    facts = ours.run_facts()["cache"]
    assert (facts["name"], facts["likelihood"]) == (cache, "refuse")
    assert facts["steps"] > 0
    assert facts["bytes_to_device"] > 0
    assert facts["batches"] == 2
    assert facts["device_bytes"] > 0 < facts["host_bytes"] == facts["full_cache_bytes"]
    assert ours.get_model_info()["cache"] == cache


def test_a_lossy_cache_answers_otherwise_and_each_batch_has_a_new_one(model, tiny_tokenizer) -> None:
    requests = [generation(" ".join(CONTEXTS * 2), max_gen_toks=40), generation(CONTEXTS[0], max_gen_toks=40)]
    plain = TransformersLM(model, tiny_tokenizer.tokenizer, progress="off").generate_until(requests)
    options = {"bits": 1, **SMALL}
    lossy = SpeCacheLM(model, tiny_tokenizer.tokenizer, cache="kivi", cache_options=options, progress="off")
    found = lossy.generate_until(requests)
    assert found[0] != plain[0]
    assert lossy.generate_until(requests) == found


def test_likelihoods_are_refused_as_they_would_not_read_the_cache(model, tiny_tokenizer) -> None:
    lm = SpeCacheLM(model, tiny_tokenizer.tokenizer, cache_options=SMALL, progress="off")
    with pytest.raises(ValueError, match=r"scores log-likelihoods, .* without reading the specache cache"):
        lm.loglikelihood([likelihood("the river", " flows")])
    with pytest.raises(ValueError, match="without reading the specache cache"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("the river flows",), 0)])
    full = SpeCacheLM(model, tiny_tokenizer.tokenizer, cache="full", progress="off")
    plain = TransformersLM(model, tiny_tokenizer.tokenizer, progress="off")
    request = [likelihood("the river", " flows under")]
    assert full.loglikelihood(request) == plain.loglikelihood(request)


def test_decoded_likelihoods_are_those_of_a_forward_pass_when_nothing_is_lost(model, tiny_tokenizer) -> None:
    pairs = [
        likelihood(CONTEXTS[0], " near the river and the bridge"),
        likelihood(CONTEXTS[1], " from the harbour"),
        likelihood("", "the museum is open"),
    ]
    rolling = [Instance("loglikelihood_rolling", {}, (" ".join(CONTEXTS),), 0)]
    plain = TransformersLM(model, tiny_tokenizer.tokenizer, progress="off")
    ours = SpeCacheLM(
        model,
        tiny_tokenizer.tokenizer,
        cache_options={"top_k": 256, **SMALL},
        likelihood="decode",
        progress="off",
    )
    for mine, theirs in zip(ours.loglikelihood(pairs), plain.loglikelihood(pairs), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3)
        assert mine[1] == theirs[1]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(plain.loglikelihood_rolling(rolling), abs=2e-2)
    lossy = SpeCacheLM(
        model,
        tiny_tokenizer.tokenizer,
        cache="kivi",
        cache_options={"bits": 1, **SMALL},
        likelihood="decode",
        progress="off",
    )
    assert abs(lossy.loglikelihood(pairs)[0][0] - plain.loglikelihood(pairs)[0][0]) > 1e-3


def test_wrong_options_are_told_before_any_request(model, tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="unknown cache 'paged'"):
        SpeCacheLM(model, tiny_tokenizer.tokenizer, cache="paged")
    with pytest.raises(ValueError, match="likelihood is 'yes'; use 'refuse' or 'decode'"):
        SpeCacheLM(model, tiny_tokenizer.tokenizer, likelihood="yes")
    lm = SpeCacheLM(model, tiny_tokenizer.tokenizer, cache_options=SMALL, likelihood="decode", max_length=4)
    with pytest.raises(ValueError, match="max_length 4 is too small: a continuation of"):
        lm.loglikelihood([likelihood("the", " river flows under the old stone bridge")])
