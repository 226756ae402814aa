"""The whole training form against the paper's formulas, outputs and gradients; what is computed once per token id."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from torch import Tensor

Model = Callable[..., DecoderForCausalLM]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"norm": "layernorm", "mlp_bias": True, "rope_parameters": {"partial_rotary_factor": 0.5}}, id="layernorm"
        ),
        pytest.param(
            {"feed_forward_options": {"num_experts": 1 + 4, "expert_evaluation": "naive"}, "norm_eps": 0.03}, id="naive"
        ),
        # the embedding's gradient then sums the residual path, the experts and the output layer
        pytest.param({"tie_word_embeddings": True}, id="tied"),
    ],
)
def test_model_equals_the_formulas(
    fields: dict[str, Any],
    small_model: Model,
    token_ids: Callable[..., Tensor],
    assert_equals_reference: Callable[..., None],
) -> None:
    assert_equals_reference(small_model("mole", **fields), token_ids(2, 11))


def test_a_single_expert_has_gate_one(small_model: Model, token_ids: Callable[..., Tensor]) -> None:
    model, ids = small_model("mole", feed_forward_options={"num_experts": 1}), token_ids(1, 7)
    layer = model.model.layers[0].feed_forward
    embeddings, u = model.get_input_embeddings()(ids), torch.randn(1, 7, 32, dtype=torch.float64)
    tokens = model.model.token_context(ids, embeddings, None)
    expected = layer.shared(u) + layer.lookup(embeddings[0])[:, 0]
    torch.testing.assert_close(layer(u, tokens), expected, rtol=0, atol=1e-12)


def test_experts_run_once_per_distinct_id_and_the_sort_once_per_pass(
    small_model: Model, token_ids: Callable[..., Tensor]
) -> None:
    model, ids = small_model("mole").train(), token_ids(3, 14)
    rows: list[int] = []
    for layer in model.model.layers:
        layer.feed_forward.lookup.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    tokens = model.model(ids).tokens
    assert rows == [len(ids.unique())] * 2
    assert len(ids.unique()) < ids.numel()
    assert tokens.segments is tokens.segments
    assert tokens.segments.order.numel() == ids.numel()


def test_changing_the_hidden_state_changes_gates_and_shared_path_alone(
    small_model: Model, token_ids: Callable[..., Tensor]
) -> None:
    model, ids = small_model("mole"), token_ids(1, 9)
    layer = model.model.layers[1].feed_forward
    tokens = model.model.token_context(ids, model.get_input_embeddings()(ids), None)
    seen: dict[str, list[Tensor]] = {"v": [], "g": [], "shared": []}
    layer.lookup.register_forward_hook(lambda _, __, out: seen["v"].append(out))
    layer.router.register_forward_hook(lambda _, __, out: seen["g"].append(out))
    layer.shared.register_forward_hook(lambda _, __, out: seen["shared"].append(out))
    u = torch.randn(1, 9, 32, dtype=torch.float64)
    for shift in (0.0, 0.5):
        layer(u + shift, tokens)
    assert torch.equal(*seen["v"])
    assert not torch.equal(*seen["g"])
    assert not torch.equal(*seen["shared"])


def test_loss_has_no_auxiliary_term(small_model: Model, token_ids: Callable[..., Tensor]) -> None:
    output = small_model("mole").train()(token_ids(2, 8), labels=token_ids(2, 8))
    assert output.auxiliary_losses is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(dtype: torch.dtype, small_model: Model, token_ids: Callable[..., Tensor]) -> None:
    model, ids = small_model("mole", dtype=torch.float32, initializer_range=0.1), token_ids(2, 10)
    expected = model(ids).logits
    found = model.to(dtype)(ids).logits
    assert found.dtype == dtype
    # unit roundoff 2^-8 and 2^-11; a dozen roundings follow each other
    bound = 12 * torch.finfo(dtype).eps / 2
    assert (found.float() - expected).norm() < bound * expected.norm()
