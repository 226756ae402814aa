"""Checkpoints to code: a short real training run, and synthetic ones of any shape."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch


class Run(NamedTuple):
    """Checkpoints of a run, in order, and the gradient that came next after each."""

    checkpoints: list[dict[str, Any]]
    gradients: list[dict[str, torch.Tensor]]


def _train(beta2: float, num_saves: int, steps_between: int) -> Run:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, beta2), weight_decay=0.1)
    text = torch.frombuffer(
        bytearray((torch.__doc__ or "").encode() * 4 + Run.__doc__.encode() * 20), dtype=torch.uint8
    )
    text = text.long() % 96
    generator = torch.Generator().manual_seed(1)
    checkpoints, gradients = [], []
    for step in range(num_saves * steps_between + 1):
        starts = torch.randint(0, len(text) - 33, (8,), generator=generator)
        batch = torch.stack([text[start : start + 32] for start in starts])
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        if step and step % steps_between == 0:
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            state = {"state_dict": model.state_dict(), "optimizer_states": [optimiser.state_dict()], "epoch": 0}
            checkpoints.append(copy.deepcopy(state | {"global_step": step, "hyper_parameters": {"width": 64}}))
        optimiser.step()
    return Run(checkpoints, gradients)


@pytest.fixture(scope="session")
def training_run() -> Run:
    """Twelve saves of a tiny language model, ten steps apart, AdamW with beta2 = 0.95."""
    return _train(0.95, 12, 10)


@pytest.fixture(scope="session")
def slow_average_run() -> Run:
    """Four saves, beta2 = 0.999."""
    return _train(0.999, 4, 10)


@pytest.fixture
def make_checkpoint() -> Callable[..., dict[str, Any]]:
    """A checkpoint with the given weights and an Adam state for each that `trained` names (all by default)."""

    def make(
        weights: dict[str, torch.Tensor], *, trained: list[str] | None = None, seed: int = 0, step: int = 100
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        names = list(weights) if trained is None else trained
        state = {}
        for number, name in enumerate(names):
            noise = torch.randn(weights[name].shape, generator=generator)
            scale = torch.rand(weights[name].shape, generator=generator) + 0.5
            state[number] = {
                "step": torch.tensor(float(step)),
                "exp_avg": (1e-4 * noise * scale).to(weights[name].dtype),
                "exp_avg_sq": (1e-7 * scale**2).to(weights[name].dtype),
            }
        group = {"params": list(range(len(names))), "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
        return {
            "state_dict": {name: weight.clone() for name, weight in weights.items()},
            "optimizer_states": [{"state": state, "param_groups": [group]}],
            "epoch": 1,
            "global_step": step,
        }

    return make


@pytest.fixture
def move() -> Callable[..., dict[str, Any]]:
    """The same checkpoint some steps later: floating-point weights moved at random."""

    def moved(checkpoint: dict[str, Any], *, seed: int, size: float = 1e-3) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        after = copy.deepcopy(checkpoint)
        for weight in after["state_dict"].values():
            if weight.is_floating_point():
                weight += (size * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        after["global_step"] += 10
        return after

    return moved
