"""Small models, and a decoder written out by hand in float64 that they are compared with."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenfold.lightning_modules  # noqa: F401 (registers the models)
import torch
from tenfold.lightning_modules.decoder import DecoderConfig, DecoderForCausalLM
from torch import Tensor
from torch.nn import functional as F

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
SLOTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"feed_forward": "moe", "feed_forward_options": {"num_experts": 5}},
    "mole": {
        "feed_forward": "mole",
        "feed_forward_options": {"num_experts": 3, "expert_intermediate_size": 20},
    },
}


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """The models are so small that a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_config() -> Callable[..., DecoderConfig]:
    """`small_config("mole", norm="layernorm")`: a small configuration, by the name of its feed-forward."""

    def build(slot: str = "dense", **fields: Any) -> DecoderConfig:
        return DecoderConfig(**(SMALL | SLOTS[slot] | fields))

    return build


@pytest.fixture
def small_model(small_config: Callable[..., DecoderConfig]) -> Callable[..., DecoderForCausalLM]:
    """`small_model("moe", dtype=torch.float32)`: a model with no weight at its trivial value, in eval mode."""

    def build(
        slot: str = "dense", *, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any
    ) -> DecoderForCausalLM:
        torch.manual_seed(seed)
        model = DecoderForCausalLM(small_config(slot, **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    # norms start at 1 and biases at 0, which would hide a norm or bias that is left out
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model.to(dtype).eval()

    return build


@pytest.fixture
def token_ids() -> Callable[..., Tensor]:
    """`token_ids(2, 11)`: ids (B, T) with repetitions."""

    def draw(*shape: int, vocab_size: int = SMALL["vocab_size"], seed: int = 7) -> Tensor:  # type: ignore[assignment]
        ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
        ids[:, shape[1] // 2] = ids[:, 0]
        return ids

    return draw


def _norm(x: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    if f"{name}.bias" in weights:
        x = x - x.mean(-1, keepdim=True)
    x = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]
    return x + weights[f"{name}.bias"] if f"{name}.bias" in weights else x


def _linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _rotate(x: Tensor, positions: Tensor, config: DecoderConfig) -> Tensor:
    """Multiply the pairs (i, i + r/2) of the first r values of every head with exp(i * position * theta^(-2i/r))."""
    rotated = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    # angles in float32, as transformers computes them whatever the model's dtype
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, rotated, 2).float() / rotated)
    angles = positions.float()[:, None] * frequencies  # (T, r/2)
    turn = torch.complex(angles.cos().double(), angles.sin().double())
    pairs = torch.complex(x[..., : rotated // 2].contiguous(), x[..., rotated // 2 : rotated].contiguous()) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., rotated:]], dim=-1)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def _dense(u: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return _linear(_gelu(_linear(u, weights, f"{name}.up")), weights, f"{name}.down")


def _moe(u: Tensor, weights: dict[str, Tensor], name: str, top_k: int) -> Tensor:
    out = torch.zeros_like(u)
    for t, token in enumerate(u):
        logits = weights[f"{name}.router.weight"] @ token
        best = sorted(range(len(logits)), key=lambda j: -logits[j].item())[:top_k]
        total = sum(logits[j].exp() for j in best)
        for j in best:
            value = weights[f"{name}.experts.down"][j] @ _gelu(weights[f"{name}.experts.up"][j] @ token)
            out[t] = out[t] + logits[j].exp() / total * value
    return out


def _mole(u: Tensor, e: Tensor, weights: dict[str, Tensor], name: str, eps: float) -> Tensor:
    """The formulas of arXiv 2503.15798 for every token and expert on its own."""
    out = []
    for token, embedding in zip(u, e, strict=True):
        scores = (weights[f"{name}.router.weight"] @ token).exp()
        m = _norm(embedding, weights, f"{name}.lookup.norm", eps)
        y = _dense(token, weights, f"{name}.shared")
        for j, score in enumerate(scores):
            value = weights[f"{name}.lookup.experts.down"][j] @ _gelu(weights[f"{name}.lookup.experts.up"][j] @ m)
            y = y + score / scores.sum() * value
        out.append(y)
    return torch.stack(out)


def reference_logits(model: DecoderForCausalLM, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of an ungated model, float64, one sequence, head and (for experts) token at a time."""
    config = model.config
    weights = dict(model.named_parameters())
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    logits = []
    for sequence in ids:
        length = len(sequence)
        e = weights["model.embed_tokens.weight"][sequence]
        x = e
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            u = _norm(x, weights, f"{prefix}.attention_norm", config.norm_eps)
            q, k, v = (_linear(u, weights, f"{prefix}.attention.{name}_proj") for name in "qkv")
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                q_h = _rotate(q[:, head * width : (head + 1) * width], torch.arange(length), config)
                k_h = _rotate(k[:, group * width : (group + 1) * width], torch.arange(length), config)
                scores = q_h @ k_h.T / math.sqrt(width)
                scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
                mixed.append(scores.softmax(-1) @ v[:, group * width : (group + 1) * width])
            a = x + _linear(torch.cat(mixed, -1), weights, f"{prefix}.attention.o_proj")
            u = _norm(a, weights, f"{prefix}.feed_forward_norm", config.norm_eps)
            name = f"{prefix}.feed_forward"
            if config.feed_forward == "dense":
                x = a + _dense(u, weights, name)
            elif config.feed_forward == "moe":
                x = a + _moe(u, weights, name, config.options("feed_forward").get("num_experts_per_token", 2))
            else:
                x = a + _mole(u, e, weights, name, config.norm_eps)
        x = _norm(x, weights, "model.norm", config.norm_eps)
        head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        logits.append(F.linear(x, head))
    return torch.stack(logits)


@pytest.fixture
def assert_equals_reference() -> Callable[[DecoderForCausalLM, Tensor], None]:
    """Logits and the gradients of all parameters equal those of `reference_logits` to 1e-10."""

    def compare(model: DecoderForCausalLM, ids: Tensor) -> None:
        expected = reference_logits(model, ids)
        found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
        names, parameters = zip(*model.named_parameters(), strict=True)
        ours = torch.autograd.grad(found, parameters, direction)
        theirs = torch.autograd.grad(expected, parameters, direction)
        for name, one, other in zip(names, ours, theirs, strict=True):
            assert one.abs().max() > 0, name
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")

    return compare
