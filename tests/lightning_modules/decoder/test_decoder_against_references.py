"""The decoder's numbers: against transformers' Llama, and against a decoder written out by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LLAMA_NAMES = {
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.": "mlp.",
    "attention.": "self_attn.",
    ".gate.": ".gate_proj.",
    ".up.": ".up_proj.",
    ".down.": ".down_proj.",
}


def llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        name = name.replace(ours, theirs)
    return name


class DoubleRMSNorm(nn.Module):
    """Llama's norm computes in float32 whatever the model's dtype; this is the formula in the dtype of its input."""

    def __init__(self, norm: LlamaRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def llama_with_weights_of(model: DecoderForCausalLM) -> LlamaForCausalLM:
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "attention_bias", "mlp_bias",
        "tie_word_embeddings",
    )  # fmt: skip
    config = model.config
    rope = {name: value for name, value in config.rope_parameters.items() if name != "partial_rotary_factor"}
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in names}, rms_norm_eps=config.norm_eps, rope_parameters=rope
        )
    ).to(torch.float64)
    llama.load_state_dict({llama_name(name): value for name, value in model.state_dict().items()}, strict=True)
    for module in list(llama.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, DoubleRMSNorm(child))
    return llama.eval()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="multi-head"),
        pytest.param({"num_key_value_heads": 2}, id="grouped-query"),
        pytest.param({"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}, id="multi-query-bias"),
        pytest.param({"head_dim": 10, "rope_parameters": {"rope_theta": 500.0}}, id="own-head-dim-theta"),
        pytest.param({"rope_parameters": {"rope_type": "linear", "factor": 3.0}}, id="scaled-positions"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
def test_gated_silu_form_equals_llama(
    fields: dict[str, Any], small_model: Callable[..., DecoderForCausalLM], token_ids: Callable[..., Tensor]
) -> None:
    model = small_model(hidden_act="silu", gated_feed_forward=True, **fields)
    llama = llama_with_weights_of(model)
    ids = token_ids(3, 13)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    found = model(ids, attention_mask=mask, output_hidden_states=True)
    expected = llama(ids, attention_mask=mask, output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-10)
    direction = torch.randn_like(found.logits) * mask.unsqueeze(-1)
    found.logits.backward(direction)
    expected.logits.backward(direction)
    gradients = {name: parameter.grad for name, parameter in llama.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[llama_name(name)], rtol=1e-10, atol=1e-10)


def test_loss_is_the_mean_over_the_predicted_tokens_of_the_shifted_labels(
    small_model: Callable[..., DecoderForCausalLM], token_ids: Callable[..., Tensor]
) -> None:
    model, ids = small_model(), token_ids(2, 9)
    labels = ids.clone()
    labels[0, 3:6] = -100
    output = model(ids, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    terms = [-log_probabilities[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 9) if labels[b, t] != -100]
    # transformers computes the loss in float32
    torch.testing.assert_close(output.loss.double(), torch.stack(terms).mean(), rtol=1e-6, atol=0)
    assert len(terms) == 13


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="rmsnorm-full-rotary"),
        pytest.param({"norm": "layernorm"}, id="layernorm"),
        pytest.param({"norm": "layernorm", "attention_bias": True, "mlp_bias": True}, id="layernorm-bias"),
        pytest.param(
            {"head_dim": 16, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 300.0}},
            id="quarter-rotary",
        ),
        pytest.param(
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "num_key_value_heads": 2}, id="half-rotary-gqa"
        ),
        pytest.param({"tie_word_embeddings": True, "norm_eps": 0.1}, id="tied-large-eps"),
    ],
)
def test_decoder_equals_the_hand_written_one(
    fields: dict[str, Any],
    small_model: Callable[..., DecoderForCausalLM],
    token_ids: Callable[..., Tensor],
    assert_equals_reference: Callable[..., None],
) -> None:
    assert_equals_reference(small_model(**fields), token_ids(2, 11))


def test_initialisation_has_the_configured_deviation_and_norms_of_one(
    small_config: Callable[..., Any],
) -> None:
    for slot in ("dense", "moe", "mole"):
        model = DecoderForCausalLM(small_config(slot, hidden_size=64, initializer_range=0.07, attention_bias=True))
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                expected = 0.0 if name.endswith("bias") else 1.0
                assert (parameter == expected).all(), name
            else:
                # 0.07 within five standard errors of a sample deviation
                tolerance = 5 * 0.07 / (2 * parameter.numel()) ** 0.5
                assert abs(parameter.std().item() - 0.07) < tolerance, name
                assert abs(parameter.mean().item()) < 5 * 0.07 / parameter.numel() ** 0.5, name


def test_casting_the_model_leaves_the_rotary_frequencies_exact(small_config: Callable[..., Any]) -> None:
    model = DecoderForCausalLM(small_config())
    expected = 1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model.to(dtype)
        assert model.lm_head.weight.dtype == dtype
        assert torch.equal(model.model.rotary.inv_freq, expected)
