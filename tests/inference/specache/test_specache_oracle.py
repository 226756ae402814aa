"""SpeCache against a literal float64 rendering of the paper's algorithms, token by token and head by head.

The reference shares no code with the project: its own transformer forward pass (Llama, from the weights), its own
quantiser loops, its own attention over a list of tokens.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from tenfold.inference.specache import SpeCache, decode_logits
from transformers import LlamaConfig, LlamaForCausalLM


class Norm64(torch.nn.Module):
    """The library's norm computes in float32 whatever it is given."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = torch.nn.Parameter(weight.double()), epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.weight


class Rotary64(torch.nn.Module):
    """So do its rotary angles."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.frequencies = theta ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            # attention that looks at few tokens, so that the choice of rows matters
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
            layer.self_attn.v_proj.weight *= 8
            layer.self_attn.o_proj.weight *= 8
            for name in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, name, Norm64(getattr(layer, name).weight, config.rms_norm_eps))
    model.model.norm = Norm64(model.model.norm.weight, config.rms_norm_eps)
    model.model.rotary_emb = Rotary64(12, config.rope_parameters["rope_theta"])
    return model


@dataclass
class Settings:
    bits: int = 2
    top_k: int = 5
    residual_length: int = 8
    group_size: int = 4
    mode: str = "speculative"
    select_residual: bool = False
    rule: str | None = None

    def options(self) -> dict:
        return dict(vars(self))


@dataclass
class LayerState:
    """Every committed token's exact key and value, (N, D) each, in order."""

    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)


class LiteralSpeCache:
    """Algorithms 1 to 3 of the paper for one sequence."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings) -> None:
        self.config, self.settings = model.config, settings
        self.w = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        self.layers = [LayerState() for _ in range(model.config.num_hidden_layers)]
        # the rows fetched for the next step: per layer and head a set of positions
        self.fetched: list[list[set[int]]] | None = None
        self.guess: int | None = None

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.w[name]

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = position * theta ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    def quantise(self, group: np.ndarray) -> np.ndarray:
        bits, low, high = self.settings.bits, group.min(), group.max()
        rule = self.settings.rule or ("centred" if bits == 1 else "kivi")
        if rule == "centred":
            part = (high - low) / 2**bits
            levels = low + part * (np.arange(2**bits) + 0.5)
        else:
            levels = np.linspace(low, high, 2**bits)
        return levels[np.abs(group[:, None] - levels).argmin(1)]

    def low_bit(self, state: LayerState) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values (T, N, D) as the device sees them: the residual exact, everything older in low bits."""
        settings = self.settings
        keys, values = np.stack(state.keys), np.stack(state.values)
        length, g = len(keys), settings.group_size
        keys, values = keys.copy(), values.copy()
        for head in range(keys.shape[1]):
            for start in range(0, length // settings.residual_length * settings.residual_length, g):
                for channel in range(keys.shape[2]):
                    keys[start : start + g, head, channel] = self.quantise(keys[start : start + g, head, channel])
            for token in range(max(length - settings.residual_length, 0)):
                for start in range(0, keys.shape[2], g):
                    values[token, head, start : start + g] = self.quantise(values[token, head, start : start + g])
        return keys, values

    def run(self, tokens: list[int], first: int, phase: str) -> np.ndarray:
        """One forward pass over the tokens from position `first` on; logits (Q, V)."""
        config, settings = self.config, self.settings
        heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
        x = self.w["model.embed_tokens.weight"][tokens]
        chosen: list[list[set[int]]] = []
        for index, state in enumerate(self.layers):
            p = f"model.layers.{index}."
            h = self.norm(x, p + "input_layernorm.weight")
            q, k, v = (h @ self.w[p + f"self_attn.{n}_proj.weight"].T for n in "qkv")
            q = q.reshape(len(tokens), heads * groups, -1)
            k, v = k.reshape(len(tokens), heads, -1), v.reshape(len(tokens), heads, -1)
            q = np.stack([self.rotate(row, first + i) for i, row in enumerate(q)])
            k = np.stack([self.rotate(row, first + i) for i, row in enumerate(k)])
            exact = np.stack(state.keys) if state.keys else None
            past = (np.zeros((0, *k.shape[1:])),) * 2 if phase == "prefill" else self.low_bit(state)
            out = np.zeros((len(tokens), heads * groups, k.shape[2]))
            layer_choice = []
            for n in range(heads):
                rows: set[int] = set()
                if phase == "step" and settings.mode == "speculative":
                    rows = self.fetched[index][n]
                if phase == "step" and settings.mode == "exact_fetch":
                    seen = self.weights(q, n, groups, past[0][:, n], k[:, n], [])
                    limit = len(state.keys)
                    if not settings.select_residual:
                        limit = limit // settings.residual_length * settings.residual_length
                    rows = self.best(np.mean([w[0] for w in seen], 0)[:limit])
                mixed_k, mixed_v = past[0][:, n].copy(), past[1][:, n].copy()
                for row in rows:
                    mixed_k[row], mixed_v[row] = exact[row, n], state.values[row][n]
                weights = self.weights(q, n, groups, mixed_k, k[:, n], [])
                for g in range(groups):
                    out[:, n * groups + g] = weights[g] @ np.concatenate([mixed_v, v[:, n]])
                # the last token chooses for the step to come, when the first one will be stored
                after = len(past[0]) + (1 if phase == "step" else 0)
                if not settings.select_residual:
                    after = after // settings.residual_length * settings.residual_length
                layer_choice.append(self.best(np.mean([w[-1] for w in weights], 0)[:after]))
            chosen.append(layer_choice)
            x = x + out.reshape(len(tokens), -1) @ self.w[p + "self_attn.o_proj.weight"].T
            h = self.norm(x, p + "post_attention_layernorm.weight")
            gate, up = (h @ self.w[p + f"mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[p + "mlp.down_proj.weight"].T
            for i in range(len(tokens) if phase == "prefill" else int(phase == "step")):
                state.keys.append(k[i])
                state.values.append(v[i])
        if phase != "prefill":
            self.fetched = chosen
        return self.norm(x, "model.norm.weight") @ self.w["lm_head.weight"].T

    def weights(self, q, n: int, groups: int, past: np.ndarray, own: np.ndarray, _: list) -> list[np.ndarray]:
        """Softmax weights (Q, past + own) of each query head of the group."""
        found = []
        for g in range(groups):
            table = np.zeros((len(q), len(past) + len(own)))
            for i in range(len(q)):
                keys = np.concatenate([past, own[: i + 1]])
                scores = np.array([q[i, n * groups + g] @ key for key in keys]) / math.sqrt(own.shape[1])
                scores = np.exp(scores - scores.max())
                table[i, : len(keys)] = scores / scores.sum()
            found.append(table)
        return found

    def best(self, weights: np.ndarray) -> set[int]:
        order = sorted(range(len(weights)), key=lambda position: -weights[position])
        return set(order[: self.settings.top_k])

    def prefill(self, prompt: list[int]) -> np.ndarray:
        return self.run(prompt, 0, "prefill")[-1]

    def step(self, token: int) -> np.ndarray:
        position = len(self.layers[0].keys)
        if self.settings.mode != "speculative":
            return self.run([token], position, "step")[0]
        if self.guess is None:
            self.guess = int(self.run([token], position, "pre_decode")[0].argmax())
        logits = self.run([token, self.guess], position, "step")
        self.guess = int(logits[1].argmax())
        return logits[0]


def literal_logits(model: LlamaForCausalLM, settings: Settings, prompt: list[int], forced: list[int]) -> np.ndarray:
    reference = LiteralSpeCache(model, settings)
    return np.stack([reference.prefill(prompt)] + [reference.step(token) for token in forced[:-1]])


def tokens(count: int, seed: int) -> list[int]:
    return torch.randint(1, 61, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


CASES = {
    "2-bit": Settings(),
    "1-bit": Settings(bits=1),
    "4-bit": Settings(bits=4),
    "1-bit-kivi-levels": Settings(bits=1, rule="kivi"),
    "residual-may-win": Settings(select_residual=True),
    "exact-fetch": Settings(mode="exact_fetch"),
    "low-bit-only": Settings(mode="low_bit_only"),
    "ragged-channel-groups": Settings(group_size=8),
    "residual-of-many-groups": Settings(residual_length=16, group_size=4),
    "no-rows": Settings(top_k=0),
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_logits_and_chosen_rows_are_the_papers(model: LlamaForCausalLM, settings: Settings) -> None:
    prompt, forced = tokens(21, 1), tokens(14, 2)
    reference = LiteralSpeCache(model, settings)
    expected = [reference.prefill(prompt)] + [reference.step(token) for token in forced[:-1]]
    for attention in ("packed", "dense"):
        cache = SpeCache(model.config, attention=attention, **settings.options())
        found = decode_logits(model, torch.tensor([prompt]), torch.tensor([forced]), cache=cache)
        torch.testing.assert_close(found[0], torch.from_numpy(np.stack(expected)), rtol=1e-9, atol=1e-9)
        if settings.mode == "speculative" and settings.top_k:
            for layer, choice in zip(cache.layers, reference.fetched, strict=True):
                assert [set(row[row >= 0].tolist()) for row in layer.store.indices[0]] == choice
        # what is stored is exact, in order, and only what was given
        for index, state in enumerate(reference.layers):
            keys, values = cache.full_precision(index)
            torch.testing.assert_close(keys[0].transpose(0, 1), torch.from_numpy(np.stack(state.keys)))
            torch.testing.assert_close(values[0].transpose(0, 1), torch.from_numpy(np.stack(state.values)))


@pytest.mark.parametrize("mode", ["speculative", "exact_fetch", "low_bit_only"])
def test_sequences_padded_on_the_left_equal_each_alone(model: LlamaForCausalLM, mode: str) -> None:
    # lengths on both sides of a block of the residual, one shorter than it
    settings = Settings(mode=mode)
    prompts, forced = [tokens(23, 5), tokens(16, 6), tokens(5, 7)], [tokens(12, 8), tokens(12, 9), tokens(12, 10)]
    ids = torch.tensor([[0] * (23 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (23 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = [literal_logits(model, settings, *pair) for pair in zip(prompts, forced, strict=True)]
    for attention in ("packed", "dense"):
        cache = SpeCache(model.config, attention=attention, **settings.options())
        found = decode_logits(model, ids, torch.tensor(forced), cache=cache, attention_mask=mask)
        torch.testing.assert_close(found, torch.from_numpy(np.stack(expected)), rtol=1e-9, atol=1e-9)
        assert cache.lengths == tuple(len(prompt) + 11 for prompt in prompts)


def test_no_row_of_padding_is_ever_chosen(model: LlamaForCausalLM) -> None:
    prompts = [tokens(30, 5), tokens(9, 6)]
    ids = torch.tensor([[0] * (30 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (30 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    cache = SpeCache(model.config, top_k=64, residual_length=4, group_size=4)
    decode_logits(model, ids, torch.tensor([tokens(4, 1), tokens(4, 2)]), cache=cache, attention_mask=mask)
    for layer in cache.layers:
        for sequence, length in enumerate(cache.lengths):
            for head in layer.store.indices[sequence]:
                assert sorted(head[head >= 0].tolist()) == list(range(length // 4 * 4))
