"""The sparse mixture against a loop over tokens, and its losses against their closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from tenfold.lightning_modules.decoder.feed_forward import load_balance_loss, router_z_loss
from torch import Tensor

Model = Callable[..., DecoderForCausalLM]


@pytest.mark.parametrize(("num_experts", "top_k"), [(5, 2), (4, 1), (3, 3), (7, 4)])
def test_mixture_equals_a_loop_over_tokens(
    num_experts: int,
    top_k: int,
    small_model: Model,
    token_ids: Callable[..., Tensor],
    assert_equals_reference: Callable[..., None],
) -> None:
    options = {"num_experts": num_experts, "num_experts_per_token": top_k}
    if top_k == 1:
        # with one expert its renormalised weight is 1, and the router has no gradient
        options["num_experts_per_token"] = 2
    assert_equals_reference(small_model("moe", feed_forward_options=options), token_ids(2, 11))


def test_one_expert_per_token_has_weight_one(small_model: Model) -> None:
    layer = small_model("moe", feed_forward_options={"num_experts": 4, "num_experts_per_token": 1}).model.layers[0]
    mixture, x = layer.feed_forward, torch.randn(1, 6, 32, dtype=torch.float64)
    best = mixture.router(x[0]).argmax(-1)
    found = mixture(x, Context())[0]
    for t in range(6):
        hidden = torch.nn.functional.gelu(mixture.experts.up[best[t]] @ x[0, t])
        torch.testing.assert_close(found[t], mixture.experts.down[best[t]] @ hidden, rtol=0, atol=1e-12)


class Context:
    """Collects what a layer adds."""

    def __init__(self, attention_mask: Tensor | None = None) -> None:
        self.attention_mask = attention_mask
        self.losses: dict[str, Tensor] = {}

    def add_loss(self, name: str, value: Tensor) -> None:
        self.losses[name] = value


def closed_forms(logits: Tensor, top_k: int) -> tuple[float, float]:
    """z-loss and load-balance loss in plain Python over the rows of `logits`."""
    num_tokens, num_experts = logits.shape
    z_loss, shares, means = 0.0, [0.0] * num_experts, [0.0] * num_experts
    for row in logits.tolist():
        partition = sum(math.exp(value) for value in row)
        z_loss += math.log(partition) ** 2 / num_tokens
        for j in sorted(range(num_experts), key=lambda j: -row[j])[:top_k]:
            shares[j] += 1 / (num_tokens * top_k)
        for j, value in enumerate(row):
            means[j] += math.exp(value) / partition / num_tokens
    return z_loss, num_experts * sum(f * p for f, p in zip(shares, means, strict=True))


@pytest.mark.parametrize("padded", [False, True])
def test_auxiliary_losses_equal_their_closed_forms(padded: bool, small_model: Model) -> None:
    options: dict[str, Any] = {"num_experts": 5, "z_loss_weight": 0.7, "load_balance_loss_weight": 0.3}
    mixture = small_model("moe", feed_forward_options=options).model.layers[0].feed_forward
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
    tokens = Context(mask if padded else None)
    mixture.train()(x, tokens)
    logits = (x @ mixture.router.weight.T)[mask.bool()]
    z_loss, balance = closed_forms(logits.detach(), top_k=2)
    assert tokens.losses["z_loss"].item() == pytest.approx(0.7 * z_loss, rel=1e-12)
    assert tokens.losses["load_balance_loss"].item() == pytest.approx(0.3 * balance, rel=1e-12)
    silent = Context()
    mixture.eval()(x, silent)
    assert not silent.losses


def test_balanced_router_has_load_balance_loss_one_and_a_collapsed_one_more() -> None:
    num_experts = 6
    balanced = torch.full((12, num_experts), 1 / num_experts, dtype=torch.float64)
    chosen = torch.arange(24).view(12, 2) % num_experts
    assert load_balance_loss(balanced, chosen).item() == pytest.approx(1, abs=1e-12)
    collapsed = torch.eye(num_experts, dtype=torch.float64)[torch.zeros(12, dtype=torch.long)]
    assert load_balance_loss(collapsed, torch.zeros(12, 1, dtype=torch.long)).item() == pytest.approx(num_experts)
    assert router_z_loss(torch.zeros(3, num_experts, dtype=torch.float64)).item() == pytest.approx(math.log(6) ** 2)


def test_losses_are_summed_over_layers_and_added_to_the_training_loss_alone(
    small_model: Model, token_ids: Callable[..., Tensor]
) -> None:
    model, ids = small_model("moe"), token_ids(2, 9)
    inputs: list[Tensor] = []
    handles = [
        layer.feed_forward.register_forward_hook(lambda _, args, __: inputs.append(args[0].detach()))
        for layer in model.model.layers
    ]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    plain = model(ids, attention_mask=mask, labels=ids)
    assert plain.auxiliary_losses is None
    inputs.clear()
    output = model.train()(ids, attention_mask=mask, labels=ids)
    for handle in handles:
        handle.remove()
    expected = [0.0, 0.0]
    for layer, x in zip(model.model.layers, inputs, strict=True):
        z_loss, balance = closed_forms((x @ layer.feed_forward.router.weight.T)[mask.bool()].detach(), top_k=2)
        expected[0] += 0.001 * z_loss
        expected[1] += 0.01 * balance
    assert set(output.auxiliary_losses) == {"z_loss", "load_balance_loss"}
    assert output.auxiliary_losses["z_loss"].item() == pytest.approx(expected[0], rel=1e-10)
    assert output.auxiliary_losses["load_balance_loss"].item() == pytest.approx(expected[1], rel=1e-10)
    assert output.loss.item() == pytest.approx(plain.loss.item() + sum(expected), rel=1e-6)


def test_unused_experts_get_a_gradient_of_zero(small_model: Model, token_ids: Callable[..., Tensor]) -> None:
    # data parallel training waits for every parameter's gradient
    options = {"num_experts": 40, "num_experts_per_token": 2}
    model, ids = small_model("moe", feed_forward_options=options).train(), token_ids(1, 6)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
    used = model.model.layers[0].feed_forward.experts.up.grad.flatten(1).abs().amax(1) > 0
    assert 2 <= used.sum() <= 12


def test_expert_gradients_do_not_grow_with_the_square_of_the_experts(small_model: Model) -> None:
    mixture = small_model("moe", feed_forward_options={"num_experts": 16}).model.layers[0].feed_forward
    out = mixture(torch.randn(1, 8, 32, dtype=torch.float64), Context())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out.sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    stack = mixture.experts.up.nbytes + mixture.experts.down.nbytes
    # each stack's gradient once, and its parts before they are joined
    assert stack <= allocated < 4 * stack
