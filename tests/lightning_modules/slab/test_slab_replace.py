"""replace_norms on other people's models; the decoder's slot; padding; folders of the training form."""

import copy

import pytest
import torch
from tenfold.lightning_modules import PRepBNLlamaForCausalLM, ProgressiveNorm, RepBatchNorm, replace_norms
from tenfold.lightning_modules.decoder import DecoderForCausalLM
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).double()


def blends(model):
    return [part for part in model.modules() if isinstance(part, ProgressiveNorm)]


def test_a_llama_trains_as_before_until_lambda_moves(token_ids):
    plain, model, ids = llama().train(), llama().train(), token_ids(2, 9)
    names = replace_norms(model)
    assert len(names) == len(blends(model)) == 5
    assert type(model) is PRepBNLlamaForCausalLM
    one, other = plain(ids, labels=ids).loss, model(ids, labels=ids).loss
    assert torch.equal(one, other)
    one.backward()
    other.backward()
    assert torch.equal(plain.model.embed_tokens.weight.grad, model.model.embed_tokens.weight.grad)
    for norm in blends(model):
        assert (norm.new_norm.bn.eps, norm.new_norm.eta.item(), norm.new_norm.bn.weight[0].item()) == (1e-6, 0.0, 0.0)
        assert norm.blend.dtype == torch.float32
        assert norm.new_norm.bn.weight.dtype == torch.float64
        norm.set_blend(0.5)
    # language start: the new branch is exactly zero, so the blend is half the old norm
    hidden = torch.randn(2, 3, 32, dtype=torch.float64)
    assert torch.equal(model.model.norm(hidden), 0.5 * plain.model.norm(hidden))


@pytest.mark.parametrize("dropped", [False, True])
def test_the_training_form_of_a_llama_saves_and_loads(dropped, token_ids, tmp_path):
    model, ids = llama(), token_ids(2, 9)
    replace_norms(model, exclude=["*.0.input_layernorm"], momentum=0.3)
    for index, norm in enumerate(blends(model)):
        norm.new_norm.bn.weight.data.uniform_(-1, 1)
        norm.new_norm.bn.running_mean.uniform_(-1, 1)
        norm.set_blend(0.0 if dropped else 0.25, warming=not dropped and index == 0)
        if dropped:
            norm.drop_old_norm()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    assert [norm.blend_state() for norm in blends(loaded)] == [norm.blend_state() for norm in blends(model)]
    assert {norm.new_norm.bn.momentum for norm in blends(loaded)} == {0.3}
    assert [norm.old_norm is None for norm in blends(loaded)] == [dropped] * 4
    model.train()
    loaded.train()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_layernorms_of_torch_start_as_in_vision_and_exclusions_hold():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, dropout=0.0)
    model = nn.Sequential(layer, nn.LayerNorm(8, eps=1e-6), nn.GroupNorm(2, 8), nn.LayerNorm((4, 8)))
    before = copy.deepcopy(model)
    names = replace_norms(model, exclude=["0.norm2"])
    assert sorted(names) == ["0.norm1", "1"]
    assert isinstance(model[0].norm2, nn.LayerNorm)
    new = model[1].new_norm
    assert (new.bn.eps, new.eta.item(), new.bn.weight[0].item()) == (1e-5, 1.0, 1.0)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(model[:2](x), before[:2](x))
    # the second time there is nothing left: the old norm inside a blend is no candidate
    with pytest.raises(
        ValueError, match=r"Sequential has no LayerNorm or RMSNorm .* outside `exclude`; there is nothing"
    ):
        replace_norms(model, exclude=["0.norm2"])


def test_a_norm_in_two_places_stays_one():
    norm = nn.RMSNorm(4)
    model = nn.ModuleDict({"a": nn.Sequential(norm), "b": nn.Sequential(norm)})
    replace_norms(model)
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], ProgressiveNorm)


def test_refusals(small_model):
    with pytest.raises(ValueError, match=r"exclude: no norm is called 'model.nrom'; nearest: model.norm"):
        replace_norms(llama(), exclude=["model.nrom"])
    with pytest.raises(
        ValueError, match="Linear has no LayerNorm or RMSNorm over its last dimension; there is nothing"
    ):
        replace_norms(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="norm 'prepbn' takes no option 'momentun'; nearest: momentum"):
        small_model(norm="prepbn", norm_options={"momentun": 0.2})
    with pytest.raises(ValueError, match="old_norm 'batchnorm' is not one of rmsnorm, layernorm, null"):
        small_model(norm="prepbn", norm_options={"old_norm": "batchnorm"})


@pytest.mark.parametrize("kind", ["decoder", "llama"])
def test_padding_is_no_part_of_the_statistics(kind, small_model, token_ids):
    model = small_model(norm="prepbn") if kind == "decoder" else llama()
    if kind == "llama":
        replace_norms(model)
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    first = next(name for name, part in model.named_modules() if isinstance(part, ProgressiveNorm) and "layers" in name)
    embeddings = model.get_input_embeddings()(ids).detach()
    model.train()
    model(ids, attention_mask=mask)
    found = model.get_submodule(first).new_norm.bn
    kept = embeddings[mask.bool()]
    torch.testing.assert_close(found.running_mean, 0.1 * kept.mean(0))
    torch.testing.assert_close(found.running_var, 0.9 + 0.1 * kept.var(0))
    # a batch without padding, and none given
    for given in (torch.ones_like(ids), None):
        model(ids, attention_mask=given)
        assert all(norm.new_norm.token_mask is None for norm in blends(model))


def test_the_decoder_says_in_its_folder_that_the_old_norms_are_gone(small_model, token_ids, tmp_path):
    model, ids = small_model(norm="prepbn", norm_options={"momentum": 0.2}), token_ids(2, 9)
    for norm in blends(model):
        norm.set_blend(0.0)
        norm.drop_old_norm()
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info.values())
    assert loaded.config.norm_options == {"momentum": 0.2, "old_norm": None}
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_decoder_trains_in_the_blend_with_and_without_recomputation(recompute, small_model, token_ids):
    model, ids = small_model(norm="prepbn", norm_options={"initial": "vision"}), token_ids(2, 9)
    for norm in blends(model):
        norm.set_blend(0.5)
    plain = copy.deepcopy(model).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    for one in (plain, model):
        one(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    for name, parameter in plain.named_parameters():
        other = dict(model.named_parameters())[name].grad
        torch.testing.assert_close(parameter.grad, other, rtol=1e-10, atol=1e-12, msg=name)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_the_controls_are_what_they_are_called(small_config):
    for name, values, trained in (
        ("batchnorm", (1, 0, 0), False),
        ("repbn", (1, 0, 1), True),
        ("prepbn", (0, 0, 0), True),
    ):
        model = DecoderForCausalLM(small_config(norm=name))
        norms = [part for part in model.modules() if isinstance(part, RepBatchNorm)]
        assert len(norms) == 5
        for norm in norms:
            for value, expected in zip((norm.bn.weight, norm.bn.bias, norm.eta), values, strict=True):
                assert (value == expected).all()
            assert norm.eta.requires_grad == trained
