"""Simplified linear attention written out per head and token; the causal form in language models."""

import math

import pytest
import torch
from tenfold.lightning_modules import SimplifiedLinearAttention
from tenfold.lightning_modules.slab import causal_attention
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

EPS = 1e-6


def attention(grid=(4, 4), **options):
    torch.manual_seed(0)
    module = SimplifiedLinearAttention(12, num_heads=3, grid=grid, **options).double()
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return module


def by_hand(module, x, grid, positions=None):
    """One image, head and token at a time; the convolution by its sum."""
    p = dict(module.named_parameters())
    rows, columns = grid
    width, size = 4, module.depthwise.kernel_size[0]
    out = []
    for image in x:
        projected = image @ p["qkv.weight"].T + p.get("qkv.bias", 0)
        q, k, v = projected[:, :12], projected[:, 12:24], projected[:, 24:]
        k = k + (p["positions"][0] if positions is None else positions)
        heads = []
        for head in range(3):
            part = slice(head * width, (head + 1) * width)
            qh, kh, vh = q[:, part].clamp_min(0), k[:, part].clamp_min(0), v[:, part]
            weights = qh @ kh.T
            mixed = (weights @ vh) / (weights.sum(1, keepdim=True) + EPS)
            image_v = vh.reshape(rows, columns, width)
            padded = F.pad(image_v, (0, 0, size // 2, size // 2, size // 2, size // 2))
            local = sum(
                padded[i : i + rows, j : j + columns] * p["depthwise.weight"][:, 0, i, j]
                for i in range(size)
                for j in range(size)
            )
            heads.append(mixed + (local + p["depthwise.bias"]).reshape(-1, width))
        out.append(torch.cat(heads, 1) @ p["projection.weight"].T + p["projection.bias"])
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False, "kernel_size": 3}], ids=["5 x 5", "3 x 3 without bias"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (1, 3)], ids=str)
def test_outputs_and_gradients_equal_the_formula(grid, options):
    module = attention(grid, **options)
    x = torch.randn(2, math.prod(grid), 12, dtype=torch.float64, requires_grad=True)
    found, expected = module(x), by_hand(module, x, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(found)
    inputs = (x, *module.parameters())
    for one, other in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_an_interpolated_table_serves_other_grids():
    module = attention((4, 4), positions="interpolated")
    x = torch.randn(1, 15, 12, dtype=torch.float64)
    table = module.positions.detach().view(4, 4, 12).permute(2, 0, 1)[None]
    resized = F.interpolate(table, size=(3, 5), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(module(x, (3, 5)), by_hand(module, x, (3, 5), resized), rtol=0, atol=1e-10)
    # a square needs no telling, and the trained grid no interpolation
    assert module(torch.randn(1, 25, 12, dtype=torch.float64)).shape == (1, 25, 12)
    x = torch.randn(1, 16, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), by_hand(module, x, (4, 4)), rtol=0, atol=1e-10)


def test_values_of_a_reduced_map_are_stretched_for_the_convolution():
    module = attention((4, 4))
    query = torch.randn(2, 3, 16, 4, dtype=torch.float64)
    key, value = (torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(2))
    weights = query.clamp_min(0) @ key.clamp_min(0).transpose(-1, -2)
    expected = weights @ value / (weights.sum(-1, keepdim=True) + EPS)
    for image in range(2):
        for head in range(3):
            # linear in the token's place, centres aligned as torch does by default
            place = ((torch.arange(16) + 0.5) / 4 - 0.5).clamp(0, 3).double()
            low = place.floor().long().clamp_max(2)
            share = (place - low)[:, None]
            long = (1 - share) * value[image, head, low] + share * value[image, head, low + 1]
            expected[image, head] += module.depthwise(long.T.reshape(1, 4, 4, 4))[0].flatten(1).T
    torch.testing.assert_close(module.attend(query, key, value, (4, 4)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_convolution_reads_tokens_as_they_lie(batch):
    module, seen = attention((4, 5)), []
    module.depthwise.register_forward_hook(lambda layer, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        module.float()(torch.randn(batch, 20, 12))
    assert [tuple(image.shape) for image in seen] == [(3 * batch, 4, 4, 5)] * 2
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_stays_finite_where_sums_of_keys_overflow(dtype):
    module = attention((32, 32), positions="fixed").float()
    x = torch.full((1, 1024, 12), 60.0)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.isfinite(module(x)).all()


def test_a_token_whose_query_is_nothing_gets_its_neighbours_alone():
    module = attention((3, 3))
    query = torch.randn(1, 3, 9, 4, dtype=torch.float64)
    key, value = torch.randn_like(query), torch.randn_like(query)
    query[0, :, 4] = -1.0
    local = module.depthwise(value.transpose(-1, -2).reshape(3, 4, 3, 3)).flatten(2).transpose(1, 2)
    assert torch.equal(module.attend(query, key, value, (3, 3))[0, :, 4], local[:, 4])


def test_refusals():
    fixed, free = attention(), attention(positions="interpolated")
    x = torch.randn(1, 15, 12, dtype=torch.float64)
    for module, arguments, message in (
        (fixed, (x,), r"15 tokens are neither the trained grid \(4, 4\) nor a square; pass grid=.* positions: interp"),
        (free, (x,), r"15 tokens are neither the trained grid \(4, 4\) nor a square; pass grid=\(rows, columns\)$"),
        (fixed, (x, (3, 5)), r"the fixed table of positions is for 4 x 4 tokens \(16\), got 3 x 5 \(15\); resize"),
        (free, (x, (4, 4)), "a grid of 4 x 4 has 16 tokens, the input 15"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments)
    for options, message in (
        ({"num_heads": 5}, "dim 12 is not a multiple of num_heads 5"),
        ({"num_heads": 3, "kernel_size": 4}, "kernel_size 4 is even"),
        ({"num_heads": 3, "positions": "learned"}, "positions 'learned' is not one of fixed, interpolated"),
    ):
        with pytest.raises(ValueError, match=message):
            SimplifiedLinearAttention(12, **options)


def pairs_by_hand(module, query, key, value, attention_mask, **kwargs):
    """Quadratic causal attention with ReLU weights, for the interface."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    weights = query.clamp_min(0) @ key.clamp_min(0).transpose(-1, -2)
    n, m = weights.shape[-2:]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    weights = weights * seen
    return (weights @ value / (weights.sum(-1, keepdim=True) + EPS)).transpose(1, 2), None


def models(small_model):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    ))  # fmt: skip
    return {"decoder": small_model(norm="prepbn", num_key_value_heads=2), "llama": llama.double().eval()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["decoder", "llama"])
def test_language_models_equal_the_quadratic_form(name, padded, small_model, token_ids, monkeypatch):
    model, ids = models(small_model)[name], token_ids(2, 70)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :20] = 0
    model.set_attn_implementation("relu_linear")
    found = model(ids, attention_mask=mask).logits
    weight = model.get_input_embeddings().weight
    direction = torch.randn_like(found) * mask.unsqueeze(-1)
    gradient = torch.autograd.grad(found, weight, direction)[0]
    functions = causal_attention.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions._global_mapping, "relu_linear", pairs_by_hand)
    expected = model(ids, attention_mask=mask).logits
    kept = mask.bool()
    torch.testing.assert_close(found[kept], expected[kept], rtol=0, atol=1e-9)
    wanted = torch.autograd.grad(expected, weight, direction)[0]
    # transformers' RMSNorm works in float32, and normalisers near eps magnify what is left
    assert (gradient - wanted).norm() / wanted.norm() < {"decoder": 1e-8, "llama": 1e-6}[name]


def test_it_decodes_with_a_cache_and_looks_at_no_later_token(small_model, token_ids):
    model, ids = models(small_model)["decoder"], token_ids(1, 12)
    model.set_attn_implementation("relu_linear")
    whole = model(ids).logits
    changed = ids.clone()
    changed[0, 8:] = 3
    torch.testing.assert_close(model(changed).logits[:, :8], whole[:, :8], rtol=0, atol=1e-12)
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-10)


def test_what_it_cannot_do_is_refused(small_model, token_ids):
    x = torch.randn(1, 2, 4, 8)
    module = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"attention_dropout 0.1 cannot be had with relu_linear; set it to 0"):
        causal_attention.relu_linear_attention(module, x, x, x, None, dropout=0.1)
    with pytest.raises(ValueError, match=r"takes a mask of padding \(B, M\), got \(1, 1, 4, 4\)"):
        causal_attention.relu_linear_attention(module, x, x, x, torch.zeros(1, 1, 4, 4))
    module.is_causal = False
    with pytest.raises(ValueError, match="relu_linear is causal, Identity is not"):
        causal_attention.relu_linear_attention(module, x, x, x, None)
