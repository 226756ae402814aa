"""Configuration, presets and files: exact sizes, round trips, and what is refused in which words."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.lightning_modules.decoder import (
    PRESETS,
    DecoderConfig,
    DecoderForCausalLM,
    decoder_config,
    register_preset,
)
from tenfold.lightning_modules.language_model import num_parameters
from tenfold.lightning_modules.mole import MoLEForCausalLM
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

# methods/A.1 of the paper's sizes with 50 304 rows, norms and routers counted
EXACT_COUNTS = {
    "dense-160m": 162_220_800,
    "dense-410m": 405_062_656,
    "dense-1b": 1_011_419_136,
    "mole-160m-4e": 388_759_296,
    "mole-160m-16e": 1_068_347_136,
    "mole-410m-4e": 1_210_491_904,
    "mole-410m-16e": 3_626_705_920,
    "mole-1b-4e": 3_159_066_624,
}


def count_on_meta(preset: str) -> int:
    with torch.device("meta"):
        return num_parameters([DecoderForCausalLM(decoder_config(preset))])


@pytest.mark.parametrize("preset", EXACT_COUNTS)
def test_presets_have_the_published_sizes(preset: str) -> None:
    assert count_on_meta(preset) == EXACT_COUNTS[preset]


@pytest.mark.parametrize(
    ("preset", "num_layers", "d", "num_experts"),
    [
        ("moe-160m-10e", 12, 768, 10),
        ("moe-160m-34e", 12, 768, 34),
        ("moe-410m-10e", 24, 1024, 10),
        ("moe-410m-34e", 24, 1024, 34),
        ("moe-1b-10e", 16, 2048, 10),
    ],
)
def test_mixture_presets_have_the_size_of_the_closed_form(
    preset: str, num_layers: int, d: int, num_experts: int
) -> None:
    attention, norms, router, experts = 4 * d * d, 2 * d, num_experts * d, num_experts * 2 * d * (2 * d)
    assert count_on_meta(preset) == num_layers * (attention + norms + router + experts) + 2 * 50304 * d + d


@pytest.mark.parametrize(
    ("mixture", "lookup"),
    [
        ("moe-160m-10e", "mole-160m-4e"),
        ("moe-160m-34e", "mole-160m-16e"),
        ("moe-410m-10e", "mole-410m-4e"),
        ("moe-410m-34e", "mole-410m-16e"),
        ("moe-1b-10e", "mole-1b-4e"),
    ],
)
def test_paired_mixtures_are_as_large_as_mole(mixture: str, lookup: str) -> None:
    # they differ by routers and the norm of the experts alone
    assert count_on_meta(mixture) == pytest.approx(EXACT_COUNTS[lookup], rel=5e-4)


def test_every_preset_builds() -> None:
    for name in PRESETS:
        assert count_on_meta(name) > 0
    assert {"dense-tiny", "moe-tiny-10e", "mole-tiny-4e", "mole-tiny-16e"} <= set(PRESETS)


def test_tied_embeddings_are_one_parameter_before_and_after_saving(
    small_model: Callable[..., DecoderForCausalLM], token_ids: Callable[..., Tensor], tmp_path: Path
) -> None:
    tied, untied = small_model(tie_word_embeddings=True), small_model()
    assert num_parameters([untied]) - num_parameters([tied]) == 61 * 32
    tied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in tied.state_dict().items())
    # weights at other addresses may be summed in another order
    torch.testing.assert_close(loaded(token_ids(2, 7)).logits, tied(token_ids(2, 7)).logits)
    # a step on one is a step on the other
    loaded(token_ids(2, 7)).logits.sum().backward()
    torch.optim.SGD(loaded.parameters(), lr=0.1).step()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("slot", "fields"),
    [
        ("dense", {"gated_feed_forward": True, "hidden_act": "silu", "num_key_value_heads": 2, "mlp_bias": True}),
        ("dense", {"norm": "layernorm", "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 77.0}}),
        ("moe", {"feed_forward_options": {"num_experts": 6, "num_experts_per_token": 3}}),
        ("mole", {"feed_forward_options": {"num_experts": 2, "expert_intermediate_size": 12}}),
    ],
    ids=["gated", "layernorm", "moe", "mole"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_save_and_load(
    slot: str,
    fields: dict[str, Any],
    dtype: torch.dtype,
    small_model: Callable[..., DecoderForCausalLM],
    token_ids: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    model, ids = small_model(slot, dtype=dtype, eos_token_id=3, **fields), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DecoderConfig
    for name in model.config.to_dict().keys() - {"transformers_version", "architectures", "dtype", "_name_or_path"}:
        assert getattr(config, name) == getattr(model.config, name), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DecoderForCausalLM
    assert loaded.dtype == dtype
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_named_class_takes_its_own_configurations_only(small_config: Callable[..., DecoderConfig]) -> None:
    assert MoLEForCausalLM(small_config("mole")).model.layers[0].feed_forward.router.out_features == 3
    with pytest.raises(ValueError, match="needs feed_forward 'mole', the configuration has 'dense'"):
        MoLEForCausalLM(small_config())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"hidden_size": 30}, "hidden_size 30 is not a multiple of num_attention_heads 4; change one of them"),
    "groups": ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    "rotary-odd": (
        {"rope_parameters": {"partial_rotary_factor": 0.375}},
        "partial_rotary_factor 0.375 of head_dim 8 rotates 3.0 values; it must be an even whole number",
    ),
    "rotary-part": ({"rope_parameters": {"partial_rotary_factor": 0.3}}, "rotates 2.4 values; it must be"),
    "rope-type": ({"rope_parameters": {"rope_type": "yarm"}}, "unknown rope_type 'yarm'; nearest: yarn"),
    "activation": ({"hidden_act": "gelo"}, "unknown hidden_act 'gelo'; nearest: gelu"),
    "norm": ({"norm": "rmsnrm"}, "unknown norm 'rmsnrm'; nearest: rmsnorm"),
    "projection": ({"projection": "liner"}, "unknown projection 'liner'; nearest: linear"),
    "feed-forward": ({"feed_forward": "mola"}, "unknown feed-forward 'mola'; nearest: mole"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0 is not a whole number above 0"),
    "vocabulary": ({"vocab_size": -5}, "vocab_size -5 is not a whole number above 0"),
    "size-text": ({"hidden_size": "wide"}, "hidden_size 'wide' is not a whole number above 0"),
    "size-float": ({"intermediate_size": 48.0}, "intermediate_size 48.0 is not a whole number above 0"),
    "heads-zero": ({"num_attention_heads": 0}, "num_attention_heads 0 is not a whole number above 0"),
    "dropout": ({"attention_dropout": 1.0}, "attention_dropout 1.0 is not a probability from 0 to below 1"),
    "deviation": ({"initializer_range": -0.1}, "initializer_range -0.1 is not a number of at least 0"),
    "eps": ({"norm_eps": "tiny"}, "norm_eps 'tiny' is not a number of at least 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused_in_one_line(case: str, small_config: Callable[..., DecoderConfig]) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        small_config(**fields)
    assert "\n" not in str(caught.value)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"feed_forward": "mole", "feed_forward_options": {"num_expert": 3}},
        "feed-forward 'mole' takes no option 'num_expert'; nearest: num_experts",
    ),
    "unlike-any": ({"norm_options": {"zzz": 1}}, "norm 'rmsnorm' takes no option 'zzz'"),
    "the-decoder-s-own": ({"norm_options": {"size": 3}}, "norm 'rmsnorm' takes no option 'size'"),
    "projection": ({"projection_options": {"bias": True}}, "projection 'linear' takes no option 'bias'"),
    "no-experts": (
        {"feed_forward": "mole", "feed_forward_options": {"num_experts": 0}},
        "num_experts 0 is below 1; use feed_forward: dense",
    ),
    "evaluation": (
        {"feed_forward": "mole", "feed_forward_options": {"expert_evaluation": "fast"}},
        "expert_evaluation 'fast' is neither 'distinct' nor 'naive'",
    ),
    "top-k": (
        {"feed_forward": "moe", "feed_forward_options": {"num_experts": 3, "num_experts_per_token": 4}},
        "num_experts_per_token 4 is not between 1 and 3 experts",
    ),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_slot_options_are_refused_in_one_line(case: str, small_config: Callable[..., DecoderConfig]) -> None:
    fields, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        DecoderForCausalLM(small_config(**fields))


def test_unknown_presets_and_fields_are_refused_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match="unknown preset 'mole-160m-5e'; nearest: mole-160m-4e"):
        decoder_config("mole-160m-5e")
    with pytest.raises(ValueError, match="unknown field of the model 'hiden_size'; nearest: hidden_size"):
        decoder_config("dense-tiny", hiden_size=64)
    with pytest.raises(ValueError, match="preset 'dense-tiny' is registered twice"):
        register_preset("dense-tiny", hidden_size=8)
    assert decoder_config("dense-tiny", hidden_size=64).hidden_size == 64
    assert PRESETS["dense-tiny"]["hidden_size"] == 128
