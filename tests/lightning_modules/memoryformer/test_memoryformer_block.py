"""The whole decoder against the method's equations written out in float64; counts, audit, cache, refusals."""

import math

import pytest
import torch
from tenfold.lightning_modules import DecoderConfig, DecoderForCausalLM, MemoryLayer
from tenfold.lightning_modules.decoder import decoder_config
from tenfold.lightning_modules.memoryformer import sizes
from tenfold.lightning_modules.memoryformer.presets import BLOCKS, LEARNING_RATES, MEMORY_SIZES
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache

FIELDS = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "projection_options": {"num_bits": 4},
    "feed_forward_options": {"num_bits": 5, "extra_bits": 2},
    "rope_parameters": {"partial_rotary_factor": 0.5},
}


def small(seed=0, dtype=torch.float64, **fields):
    torch.manual_seed(seed)
    model = DecoderForCausalLM(decoder_config("memoryformer-tiny", **(FIELDS | fields))).to(dtype).eval()
    with torch.no_grad():
        # far from the small values of training's start, so that every part counts
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def memory(x, weights, prefix, tau, weighting):
    """(T, d) through one memory layer, by a one-hot matrix over sign patterns."""
    table, bias = weights[f"{prefix}.table"], weights[f"{prefix}.bias"]
    total = bias.expand(len(x), -1)
    for k, z in enumerate(x.split(tau, dim=1)):
        short = tau - z.shape[1]
        codes = [int("".join("1" if v >= 0 else "0" for v in row) + "1" * short, 2) for row in z.tolist()]
        one_hot = F.one_hot(torch.tensor(codes), 2**tau).to(x.dtype)
        p = (1 / (1 + torch.exp(-2 * z.abs()))).prod(1)
        weight = p * z.abs().sum(1) if weighting == "l1" else p
        total = total + weight[:, None] * (one_hot @ table[k * 2**tau : (k + 1) * 2**tau])
    return total


def rotate(x, config):
    """Rotary positions on the first part of a head, (T, head_dim)."""
    rotated = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    frequency = 10000.0 ** (-torch.arange(0, rotated, 2).double() / rotated)
    # the model keeps its frequencies, and so the angles, in float32
    angle = (torch.arange(len(x)).float()[:, None] * frequency.float()).repeat(1, 2)
    first, rest = x[:, :rotated], x[:, rotated:]
    turned = torch.cat([-first[:, rotated // 2 :], first[:, : rotated // 2]], 1)
    return torch.cat([first * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype), rest], 1)


def reference_logits(model, ids):
    config, weights = model.config, dict(model.named_parameters())
    d, width, weighting = config.hidden_size, config.head_dim, config.options("projection").get("weighting", "paper")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

    results = []
    for sequence in ids:
        x = weights["model.embed_tokens.weight"][sequence]
        for layer in range(config.num_hidden_layers):
            name = f"model.layers.{layer}"
            n = norm(x, f"{name}.attention_norm")
            qkv = memory(n, weights, f"{name}.attention.qkv_proj.memory", 4, weighting)
            q, k, v = qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
            heads = []
            for head in range(config.num_attention_heads):
                part = slice(head * width, (head + 1) * width)
                scores = rotate(q[:, part], config) @ rotate(k[:, part], config).T / math.sqrt(width)
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
                heads.append(scores.softmax(1) @ v[:, part])
            a = x + torch.cat(heads, 1)
            b = norm(a, f"{name}.feed_forward_norm")
            inner = norm(memory(b, weights, f"{name}.feed_forward.first", 5, weighting), f"{name}.feed_forward.norm")
            x = a + memory(inner, weights, f"{name}.feed_forward.second", 7, weighting)
        results.append(norm(x, "model.norm") @ weights["lm_head.weight"].T)
    return torch.stack(results)


@pytest.mark.parametrize("weighting", ["l1", "paper"])
def test_the_model_is_its_equations_in_outputs_and_gradients(weighting):
    options = {"weighting": weighting}
    model = small(
        projection_options={"num_bits": 4, **options},
        feed_forward_options={"num_bits": 5, "extra_bits": 2, **options},
    )
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(1))
    found, expected = model(ids).logits, reference_logits(model, ids)
    # the angles' cosines are float32 on both sides
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    names, parameters = zip(*model.named_parameters(), strict=True)
    direction = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad(found, parameters, direction)
    for name, one, other in zip(names, ours, torch.autograd.grad(expected, parameters, direction), strict=True):
        assert one.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item(), msg=name)


def test_no_linear_but_the_head_and_one_hash_for_query_key_and_value():
    model = small()
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    assert not any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    for layer in model.model.layers:
        attention = [module for module in layer.attention.modules() if isinstance(module, MemoryLayer)]
        assert len(attention) == 1
        assert attention[0].out_features == 3 * model.config.hidden_size
        assert not any("o_proj" in name for name, _ in layer.attention.named_modules())
        assert sum(isinstance(module, MemoryLayer) for module in layer.feed_forward.modules()) == 2
    matrices = [name for name, p in model.named_parameters() if p.dim() == 2 and not name.endswith("memory.table")]
    assert {name.rpartition(".")[0].split(".")[-1] for name in matrices} == {
        "embed_tokens",
        "lm_head",
        "first",
        "second",
    }


def test_tables_are_the_only_two_dimensional_products_of_a_pass():
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = small(dtype=torch.float32), torch.zeros(1, 8, dtype=torch.int64)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    config = model.config
    head = 8 * config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * sizes.attention_multiply_adds(config.hidden_size, 8)
    # the position angles, and the codes' powers of two, are products too: fewer than one percent of a dense block
    total = counter.get_total_flops() // 2
    assert head + attention <= total < head + attention + 0.01 * 2 * sizes.dense_multiply_adds(config.hidden_size, 8)


@pytest.mark.parametrize(
    ("name", "parameters", "tables", "table_bytes"),
    [
        ("tiny", 466_784_512, 69_206_016, 138_412_032),
        ("small", 1_945_939_200, 155_713_536, 311_427_072),
        ("base", 6_747_090_944, 276_824_064, 553_648_128),
    ],
)
def test_presets_have_the_papers_sizes(name, parameters, tables, table_bytes):
    with torch.device("meta"):
        model = DecoderForCausalLM(decoder_config(f"memoryformer-{name}"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    # the same by hand: tables and biases, LayerNorms, embedding and head
    d, layers = MEMORY_SIZES[name]["hidden_size"], MEMORY_SIZES[name]["num_hidden_layers"]
    inner = 10 * d // 8
    by_hand = layers * (264 * d * d + (3 * d + inner + d) + 2 * (2 * d) + 2 * inner) + 2 * d + 2 * 50304 * d
    assert parameters == by_hand
    own = sum(p.numel() for n, p in model.model.layers[0].named_parameters() if n.endswith("table"))
    assert own == BLOCKS[name].table_values == tables
    assert 2 * own == table_bytes
    assert {"tiny": 3e-3, "small": 1.8e-3, "base": 9e-4}[name] == pytest.approx(3 * LEARNING_RATES[name])


def test_a_preset_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(sizes, "available_bytes", lambda device="cpu": 20 * 10**9)
    weights = 4 * (24 * 276_824_064 + 2 * 50304 * 1024)
    with pytest.raises(ValueError, match=rf"takes {weights:,} bytes \(27\.0 GB\), cpu has 20,000,000,000 left"):
        DecoderForCausalLM(decoder_config("memoryformer-base"))


def test_initial_values_are_the_released_ones():
    torch.manual_seed(0)
    model = DecoderForCausalLM(decoder_config("memoryformer-tiny", hidden_size=64, num_hidden_layers=1, vocab_size=99))
    layer = model.model.layers[0]
    assert layer.attention.qkv_proj.memory.table.std().item() == pytest.approx(math.sqrt(2 / (5 * 64)), rel=0.01)
    for part in (layer.feed_forward.first, layer.feed_forward.second):
        assert part.table.std().item() == pytest.approx(0.02, rel=0.01)
        assert 0 < part.bias.std().item() < 0.0015


@pytest.mark.parametrize("steps", [[1] * 9, [4, 1, 4]], ids=["token-by-token", "chunks"])
def test_cached_steps_give_the_logits_of_one_pass(steps):
    model = small()
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    cache, parts = DynamicCache(config=model.config), []
    for part in ids.split(steps, dim=1):
        parts.append(model(part, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, rtol=0, atol=1e-9)


def test_fewer_key_value_heads_and_checkpointing_and_a_saved_folder(tmp_path):
    model = small(num_attention_heads=6, num_key_value_heads=2, rope_parameters={"partial_rotary_factor": 1.0})
    assert model.model.layers[0].attention.qkv_proj.widths == (36, 12, 12)
    ids = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(1))
    model.train()
    expected = torch.autograd.grad(model(ids, labels=ids).loss, tuple(model.parameters()))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = torch.autograd.grad(model(ids, labels=ids, use_cache=False).loss, tuple(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    model.eval().save_pretrained(tmp_path)
    again = DecoderForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_models_without_tables_keep_their_names():
    model = DecoderForCausalLM(DecoderConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    names = [name for name in model.state_dict() if ".attention." in name]
    assert names == [f"model.layers.0.attention.{letter}_proj.weight" for letter in "qkvo"]


class TestBadInput:
    def test_heads_that_do_not_make_the_width(self):
        with pytest.raises(
            ValueError, match="has no output projection, so num_attention_heads x head_dim = 24 must be"
        ):
            small(num_attention_heads=2, head_dim=12)

    def test_bits_of_the_second_layer(self):
        with pytest.raises(ValueError, match="num_bits 14 and extra_bits 3 make 17 bits in the second layer"):
            small(feed_forward_options={"num_bits": 14, "extra_bits": 3})

    def test_bits_that_do_not_divide(self):
        with pytest.raises(ValueError, match="5 bits do not divide a width of 36"):
            small(projection_options={"num_bits": 5, "remainder": "refuse"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"key": "simhash"}, "key 'simhash' is not one of"),
            ({"num_rows": 5}, "key 'sign_lsh' takes no num_rows"),
            ({"key": "token_id", "num_bits": 8}, "key 'token_id' takes no num_bits"),
            ({"key": "token_id", "num_rows": 8}, "leave num_rows 8 out"),
            ({"key": "ngram_hash"}, "needs num_rows above 0"),
            ({"numbits": 8}, "takes no option 'numbits'; nearest: num_bits"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            small(feed_forward_options=options)

    def test_an_unknown_projection_names_the_known(self):
        with pytest.raises(ValueError, match="unknown projection 'memori'"):
            DecoderConfig(projection="memori")
