"""Fused equals unfused: one layer against the formula, decoders and Llamas whole, folders, refusals."""

import copy

import pytest
import torch
from tenfold.experiments.cli import main
from tenfold.lightning_modules import NormSite, ProgressiveNorm, RepBatchNorm, fuse_norms, replace_norms
from tenfold.lightning_modules.decoder import decoder_config
from tenfold.lightning_modules.slab import ChannelAffine, fused_model, register_plan, statistics_norms
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


def fill(model, seed=0, *, finish=True):
    """No norm at its start: scales of both signs, shifts and statistics away from 0 and 1; lambda at 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, RepBatchNorm):
            for tensor in (module.bn.weight, module.bn.bias, module.eta, module.bn.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            module.bn.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.3)
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    for module in model.modules():
        if finish and isinstance(module, ProgressiveNorm):
            module.set_blend(0.0)
    return model.eval()


def formula(norm, x):
    """RepBN in evaluation, as it is written in the paper."""
    bn = norm.bn
    return bn.weight * (x - bn.running_mean) / (bn.running_var + bn.eps).sqrt() + bn.bias + norm.eta * x


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class Block(nn.Module):
    """A norm between what may feed it and what may read it."""

    def __init__(self, before, after, *, norm=None, pooled=False):
        super().__init__()
        self.before, self.norm, self.after, self.pooled = before, norm or RepBatchNorm(6), after, pooled

    def forward(self, x):
        x = self.before(x)
        if x.dim() == 4:
            x = x.permute(0, 2, 3, 1)
        x = self.norm(x)
        if self.pooled:
            x = x.mean(dim=1)
        if isinstance(self.after, nn.Conv2d):
            x = x.permute(0, 3, 1, 2)
        return self.after(x)


CASES = {
    # qkv, fc1; patch merging has no bias; the last norm before the head
    "linear": (Block(nn.Identity(), nn.Linear(6, 5)), "after", (2, 7, 6)),
    "linear without bias": (Block(nn.Identity(), nn.Linear(6, 5, bias=False)), "after", (2, 7, 6)),
    "head across mean pooling": (Block(nn.Identity(), nn.Linear(6, 5), pooled=True), "after", (2, 7, 6)),
    # PVT's spatial reduction
    "convolution that reads": (Block(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 2, stride=2)), "after", (2, 3, 6, 6)),
    "grouped convolution": (Block(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 2, groups=2, bias=False)), "after", (2, 3, 5, 5)),
    # patch embedding, with the term that the released code forgets
    "patch embedding": (Block(nn.Conv2d(3, 6, 2, stride=2), nn.Tanh()), "before", (2, 3, 6, 6)),
    "padded convolution that feeds": (Block(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh()), "before", (2, 3, 5, 5)),
    "linear that feeds": (Block(nn.Linear(4, 6, bias=False), nn.Tanh()), "before", (2, 7, 4)),
    "nobody": (Block(nn.Identity(), nn.Tanh()), None, (2, 7, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=list(CASES))
def test_one_norm_and_its_neighbour(case, dtype):
    template, target, shape = CASES[case]
    torch.manual_seed(0)
    model = fill(copy.deepcopy(template).double()).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    by_hand = copy.deepcopy(model).double()
    by_hand.norm.forward = lambda y: formula(by_hand.norm, y)
    expected = by_hand(x.double())
    site = NormSite("norm", **({} if target is None else {"producer": target} if target == "before" else
                               {"consumers": (target,)}))  # fmt: skip
    fuse_norms(model, sites=[site])
    torch.testing.assert_close(model(x).double(), expected, rtol=0, atol=TOLERANCE[dtype])
    assert statistics_norms(model) == []
    assert isinstance(model.norm, ChannelAffine if target is None else nn.Identity)
    assert {p.dtype for p in model.parameters()} <= {dtype}


def test_several_consumers_all_take_the_norm():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RepBatchNorm(6)
            self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4, bias=False)

        def forward(self, x):
            y = self.norm(x)
            return self.q(y) * self.k(y)

    model = fill(Many().double())
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = model.q(formula(model.norm, x)) * model.k(formula(model.norm, x))
    fuse_norms(model, sites=[NormSite("norm", consumers=("q", "k"))])
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_bfloat16_is_rounded_once():
    model = fill(Block(nn.Identity(), nn.Linear(6, 5)).double()).bfloat16()
    exact = copy.deepcopy(model).double()
    fuse_norms(model, sites=[NormSite("norm", consumers=("after",))])
    fuse_norms(exact, sites=[NormSite("norm", consumers=("after",))])
    assert torch.equal(model.after.weight, exact.after.weight.bfloat16())
    assert torch.equal(model.after.bias, exact.after.bias.bfloat16())


class Merging(nn.Module):
    """A user's own block."""

    def __init__(self):
        super().__init__()
        self.norm, self.reduction = RepBatchNorm(6), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.reduction(self.norm(x))


def test_a_registered_plan_finds_blocks_inside_a_model():
    class Registered(Merging):
        pass

    register_plan(Registered)(lambda block: [NormSite("norm", consumers=("reduction",))])
    model = fill(nn.ModuleDict({"stages": nn.ModuleList([Registered(), Registered()])}).double())
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = [block(x) for block in model["stages"]]
    plan = fuse_norms(model)
    assert [site.norm for site in plan] == ["stages.0.norm", "stages.1.norm"]
    for block, value in zip(model["stages"], expected, strict=True):
        torch.testing.assert_close(block(x), value, rtol=0, atol=1e-12)


DECODERS = {
    "prepbn": {"norm": "prepbn"},
    "repbn": {"norm": "repbn"},
    "batchnorm": {"norm": "batchnorm"},
    "gated": {"norm": "prepbn", "gated_feed_forward": True, "hidden_act": "silu", "num_key_value_heads": 2},
    "biased": {"norm": "prepbn", "attention_bias": True, "mlp_bias": True},
    "tied": {"norm": "prepbn", "tie_word_embeddings": True},
    "tied, untied for it": {"norm": "prepbn", "tie_word_embeddings": True},
    "experts": {"norm": "prepbn", "feed_forward": "moe", "feed_forward_options": {"num_experts": 3}},
    "after layernorm": {"norm": "prepbn", "norm_options": {"old_norm": "layernorm", "initial": "vision"}},
}


def decoder(small_model, name, dtype=torch.float64, **fields):
    return fill(small_model(dtype=torch.float64, **DECODERS[name], **fields)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", DECODERS)
def test_a_fused_decoder_equals_it_and_loads_as_a_plain_folder(name, dtype, small_model, token_ids, tmp_path):
    model, ids = decoder(small_model, name, dtype), token_ids(2, 11)
    # the untrained networks' logits are of the order of 10
    options = {"untie_head": True} if name == "tied, untied for it" else {}
    fused_model(model, **options).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert statistics_norms(loaded) == []
    expected = model(ids).logits
    error = (loaded(ids).logits - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype]
    affine = {n.rpartition(".")[2] for n, part in loaded.named_modules() if isinstance(part, ChannelAffine)}
    assert affine == {"tied": {"norm"}, "experts": {"feed_forward_norm"}}.get(name, set())
    cached = loaded.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_fused_parameter_count_is_the_closed_form(small_model):
    model = decoder(small_model, "gated")
    fused = fused_model(model)
    d, hidden, vocabulary, layers, kv = 32, 48, 61, 2, 16
    weights = 2 * vocabulary * d + layers * (2 * d * d + 2 * kv * d + 3 * d * hidden)
    biases = layers * (d + 2 * kv + 2 * hidden) + vocabulary
    assert sum(p.numel() for p in fused.parameters()) == weights + biases
    assert fused.config.biased_layers == [
        "model.layers.*.attention.q_proj", "model.layers.*.attention.k_proj", "model.layers.*.attention.v_proj",
        "model.layers.*.feed_forward.gate", "model.layers.*.feed_forward.up", "lm_head",
    ]  # fmt: skip


LLAMA = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(("tied", "exclude"), [(False, []), (True, []), (False, ["model.norm"])], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_fused_llama_equals_it_and_loads_as_a_plain_folder(tied, exclude, dtype, token_ids, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)).double()
    replace_norms(model, exclude=exclude)
    model, ids = fill(model).to(dtype), token_ids(2, 11)
    fused_model(model).save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    # what was excluded was not asked to go
    assert statistics_norms(loaded) == exclude
    expected = model(ids).logits
    assert (loaded(ids).logits - expected).abs().max() / expected.abs().max() < TOLERANCE[dtype]
    assert isinstance(loaded.model.norm, ChannelAffine) == tied


def test_export_writes_the_folder_and_says_what_it_did(small_model, tiny_tokenizer, token_ids, tmp_path, capsys):
    model, ids = decoder(small_model, "tied", torch.float64, vocab_size=320), token_ids(2, 9)
    for norm in model.modules():
        if isinstance(norm, ProgressiveNorm):
            norm.drop_old_norm()
    model.save_pretrained(tmp_path / "trained")
    arguments = ["export", "--model", str(tmp_path / "trained"), "--form", "fused"]
    arguments += ["--tokenizer", str(tiny_tokenizer.folder)]
    assert main([*arguments, "--output", str(tmp_path / "fused")]) == 0
    said = capsys.readouterr().out
    assert "4 of 5 norms folded into linear layers; as an affine: model.norm" in said
    assert main([*arguments, "--untie-head", "--output", str(tmp_path / "untied")]) == 0
    assert "5 of 5 norms folded into linear layers\n" in capsys.readouterr().out
    expected = model(ids).logits
    for name in ("fused", "untied"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert (loaded(ids).logits - expected).abs().max() / expected.abs().max() < 1e-12
    for extra, message in (
        (["--form", "plain", "--untie-head"], "--untie-head is for --form fused"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 is not for --form fused"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "new"), *extra]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_in_the_blend_is_refused_and_unchanged(small_model, tiny_tokenizer, tmp_path, capsys):
    model = fill(small_model(norm="prepbn", vocab_size=320), finish=False)
    model.model.layers[1].attention_norm.set_blend(0.25)
    for norm in model.modules():
        if isinstance(norm, ProgressiveNorm) and norm is not model.model.layers[1].attention_norm:
            norm.set_blend(0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = r"model.layers.1.attention_norm is still in the blend, lambda 0.25: .* train until the schedule ends"
    with pytest.raises(ValueError, match=message):
        fuse_norms(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    model.save_pretrained(tmp_path / "trained")
    output = tmp_path / "fused"
    arguments = ["--model", str(tmp_path / "trained"), "--form", "fused", "--output", str(output)]
    assert main(["export", *arguments, "--tokenizer", str(tiny_tokenizer.folder)]) == 2
    assert "is still in the blend, lambda 0.25" in capsys.readouterr().err
    assert not output.exists()


def test_refusals(small_model):
    with pytest.raises(ValueError, match=r"no consumer is known for the norm 1.norm; say who reads it, sites=.*keep="):
        fuse_norms(nn.Sequential(nn.Linear(2, 6), Merging()))
    with pytest.raises(ValueError, match="Linear has no norm that can be fused"):
        fuse_norms(nn.Linear(2, 2))
    read = NormSite("norm", consumers=("reduction",))
    for change, site, message in (
        (None, NormSite("norm", consumers=("fc1",)), "norm is planned to go into fc1, which the model does not have"),
        (nn.GELU(), read, "reduction, which reads norm, is a GELU, no plain linear layer"),
        (nn.Linear(5, 3), read, "norm has 6 channels, reduction 5; the plan names the wrong layer"),
        (nn.Conv2d(6, 3, 3, padding=1), read, r"reduction pads, .* keep=\['norm'\]"),
        (nn.Conv2d(6, 3, 3, padding="same"), read, "reduction pads"),
        (None, NormSite("other", consumers=("reduction",)), "other is no norm that can be fused; there are norm"),
    ):
        model = Merging()
        if change is not None:
            model.reduction = change
        with pytest.raises(ValueError, match=message):
            fuse_norms(model, sites=[site])
    model = Merging()
    model.tied = nn.Linear(6, 3)
    model.tied.weight = model.reduction.weight
    with pytest.raises(ValueError, match="the weight of reduction is shared with another layer"):
        fuse_norms(model, sites=[read])
    model = Merging()
    model.second = RepBatchNorm(6)
    with pytest.raises(ValueError, match="reduction would take over both norm and second"):
        fuse_norms(model, sites=[read, NormSite("second", consumers=("reduction",))])
    model = nn.Sequential(norm := fill(ProgressiveNorm(nn.LayerNorm(4), RepBatchNorm(4))), nn.Linear(4, 4), norm)
    with pytest.raises(ValueError, match="0 and 2 are one norm"):
        fuse_norms(model, keep=["0"])
    with pytest.raises(ValueError, match="into its consumers or into its producer, not both"):
        NormSite("norm", consumers=("a",), producer="b")
    with pytest.raises(ValueError, match="this is a Merging; fuse_norms fuses any model in place"):
        fused_model(Merging())


def test_the_350m_preset_has_the_parameters_of_the_paper():
    from tenfold.lightning_modules.decoder import DecoderForCausalLM

    d, hidden, vocabulary, layers = 1024, 4096, 32000, 18
    plain = 2 * vocabulary * d + layers * (4 * d * d + 3 * d * hidden) + (2 * layers + 1) * d
    assert plain == 367_563_776
    # each blend adds scale, shift and eta
    for name, expected in (("llama-350m", plain), ("slab-350m", plain + (2 * layers + 1) * (2 * d + 1))):
        with torch.device("meta"):
            model = DecoderForCausalLM(decoder_config(name))
        assert sum(p.numel() for p in model.parameters()) == expected
        assert model.config.num_attention_heads == 8
        assert {norm.bn.eps for norm in model.modules() if isinstance(norm, RepBatchNorm)} <= {1e-6}
