"""SLAB in image backbones: fusion, linear attention in its four forms, and what is refused."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from tenfold.lightning_modules import NormSite, VisionBackbone, VisionConfig, VisionForImageClassification, fuse_norms
from tenfold.lightning_modules.slab import (
    RepBatchNorm,
    SimplifiedLinearAttention,
    fused_classifier,
    statistics_norms,
)
from tenfold.lightning_modules.slab.vision import ReducedLinearAttention, StripeLinearAttention
from tenfold.lightning_modules.vision.slots import AttentionPlace
from torch import nn
from transformers import AutoModelForImageClassification

torch.set_num_threads(1)

STAGES = {
    "image_size": 32,
    "patch_size": 4,
    "hidden_sizes": [8, 16],
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "reduction_ratios": [2, 1],
    "stripe_widths": [2, 2],
}
DEIT = {"hidden_sizes": [12], "depths": [2], "num_heads": [3], "image_size": 32, "patch_size": 8}
SMALL = {"deit": DEIT, **{name: {"architecture": name, **STAGES} for name in ("swin", "pvt", "cswin")}}


def trained(kind: type[nn.Module], config: VisionConfig) -> nn.Module:
    """Random weights and statistics, lambda 0; every part of the affine is away from its start."""
    torch.manual_seed(0)
    model = kind(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
        for module in model.modules():
            if isinstance(module, RepBatchNorm):
                module.bn.running_mean.normal_()
                module.bn.running_var.uniform_(0.5, 2)
            if hasattr(module, "set_blend"):
                module.set_blend(0.0)
    return model.eval()


def options(name: str, attention: str) -> dict[str, object]:
    fields: dict[str, object] = {**SMALL[name], "positions": "interpolated", "num_labels": 5}
    if attention == "linear":
        fields["attention"] = "simplified_linear" if name in ("deit", "pvt") else ["simplified_linear", "softmax"]
        fields["pooling"] = "mean"
    return fields


@pytest.mark.parametrize("size", [(32, 32), (40, 56)], ids=["trained-size", "padded"])
@pytest.mark.parametrize(("name", "attention"), list(itertools.product(SMALL, ["softmax", "linear"])))
def test_fused_equals_unfused(name: str, attention: str, size: tuple[int, int]) -> None:
    model = trained(VisionForImageClassification, VisionConfig(**options(name, attention), norm="prepbn"))
    fused = copy.deepcopy(model)
    plan = fuse_norms(fused)
    assert all(site.outcome != "affine" for site in plan)
    assert statistics_norms(model)
    assert statistics_norms(fused) == []
    x = torch.randn(3, 3, *size, dtype=torch.float64)
    expected = model(x).logits
    error = (fused(x).logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-12
    single = copy.deepcopy(model).float()
    fuse_norms(single)
    error = (single(x.float()).logits - model.float()(x.float()).logits).abs().max() / expected.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_fused_classifier_is_a_plain_folder(name: str, tmp_path: Path) -> None:
    model = trained(VisionForImageClassification, VisionConfig(**options(name, "softmax"), norm="prepbn"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused_classifier(model).save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert statistics_norms(again) == []
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("norm", ["repbn", "batchnorm"])
def test_other_fixed_norms_fuse_too(norm: str) -> None:
    model = trained(VisionForImageClassification, VisionConfig(**options("swin", "softmax"), norm=norm))
    fused = copy.deepcopy(model)
    fuse_norms(fused)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x).logits, model(x).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["swin", "pvt", "cswin"])
def test_fused_backbone_keeps_affines_on_its_maps(name: str) -> None:
    config = VisionConfig(**options(name, "softmax"), norm="prepbn", out_features=["stage1", "stage2"])
    model = trained(VisionBackbone, config)
    fused = copy.deepcopy(model)
    plan = fuse_norms(fused)
    assert [site.norm for site in plan if site.outcome == "affine"] == ["norms.stage1", "norms.stage2"]
    assert statistics_norms(fused) == []
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    for mine, theirs in zip(fused(x).feature_maps, model(x).feature_maps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_model_in_the_blend_is_not_fused() -> None:
    model = trained(VisionForImageClassification, VisionConfig(**options("pvt", "linear"), norm="prepbn"))
    model.norm.set_blend(0.25)
    with pytest.raises(ValueError, match=r"norm is still in the blend, lambda 0\.25"):
        fuse_norms(model)


def test_a_norm_without_a_plan_is_named() -> None:
    model = nn.Sequential(RepBatchNorm(4), nn.Linear(4, 2)).eval()
    with pytest.raises(ValueError, match=r"no consumer is known for the norm 0; .*keep=\['0'\]"):
        fuse_norms(model)
    fuse_norms(model, sites=[NormSite("0", consumers=("1",))])
    assert statistics_norms(model) == []


def explicit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Weights as a matrix: (N, C), (M, C), (M, C) to (N, C)."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        weights = q.relu() @ k.relu().T
        out.append(weights @ v / (weights.sum(1, keepdim=True) + 1e-6))
    return torch.cat(out, -1)


def local(module: SimplifiedLinearAttention, value: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The depthwise convolution of (N, C) values, head by head and place by place."""
    rows, columns = grid
    width, reach = module.head_dim, module.depthwise.kernel_size[0] // 2
    out = torch.zeros_like(value)
    for head in range(module.num_heads):
        part = value[:, head * width : (head + 1) * width].unflatten(0, grid)
        for row, column in itertools.product(range(rows), range(columns)):
            total = module.depthwise.bias.clone()
            for down, right in itertools.product(range(-reach, reach + 1), repeat=2):
                if 0 <= row + down < rows and 0 <= column + right < columns:
                    weight = module.depthwise.weight[:, 0, down + reach, right + reach]
                    total = total + weight * part[row + down, column + right]
            out[row * columns + column, head * width : (head + 1) * width] = total
    return out


@pytest.mark.parametrize("ratio", [1, 2])
def test_reduced_linear_attention_against_a_matrix(ratio: int) -> None:
    torch.manual_seed(0)
    place = AttentionPlace(pattern="reduced", dim=6, num_heads=2, grid=(4, 6), size=ratio)
    layer = ReducedLinearAttention(VisionConfig(**SMALL["pvt"]), place, kernel_size=3).double()
    nn.init.normal_(layer.positions)
    x = torch.randn(2, 24, 6, dtype=torch.float64)
    source = x[0]
    if ratio > 1:
        patches = x[0].unflatten(0, (2, 2, 3, 2)).permute(0, 2, 4, 1, 3).reshape(6, -1)  # (M, C 2 2)
        source = layer.norm(patches @ layer.reduction.weight.flatten(1).T + layer.reduction.bias)
    key, value = layer.key_value(source).chunk(2, dim=-1)
    out = explicit(layer.query(x[0]), key + layer.positions[0], value, 2)
    if ratio > 1:
        # linear along the tokens, ends repeated, as align_corners=False
        at = ((torch.arange(24, dtype=torch.float64) + 0.5) / 4 - 0.5).clamp(0, 5)
        low = at.floor().long()
        share = (at - low)[:, None]
        value = value[low] * (1 - share) + value[(low + 1).clamp(max=5)] * share
    expected = layer.projection(out + local(layer, value, (4, 6)))
    torch.testing.assert_close(layer(x, (4, 6))[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grid", [(4, 6), (5, 6)], ids=["whole", "padded"])
def test_stripe_linear_attention_against_a_matrix(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    place = AttentionPlace(pattern="stripe", dim=8, num_heads=4, grid=(4, 6), size=2)
    layer = StripeLinearAttention(place, positions="interpolated", kernel_size=3).double()
    for mixer in layer.mixers:
        nn.init.normal_(mixer.positions)
    x = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64)
    query, key, value = (part.unflatten(0, grid) for part in layer.qkv(x)[0].chunk(3, dim=-1))
    out = torch.zeros(*grid, 8, dtype=torch.float64)
    for branch, mixer in enumerate(layer.mixers):
        window = layer.windows(grid)[branch]
        table = mixer._positions_for(window)[0].unflatten(0, window)
        half = slice(4 * branch, 4 * branch + 4)
        for top, left in itertools.product(range(0, grid[0], window[0]), range(0, grid[1], window[1])):
            inside = (slice(top, top + window[0]), slice(left, left + window[1]), half)
            q, k, v = query[inside], key[inside], value[inside]
            shape = q.shape[:2]
            k = k + table[: shape[0], : shape[1]]
            mixed = explicit(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), 2)
            mixed = mixed + local(mixer, v.flatten(0, 1), tuple(shape))
            conv = layer.local[branch](v.permute(2, 0, 1)[None])[0].permute(1, 2, 0).flatten(0, 1)
            out[inside] = (mixed + conv).unflatten(0, shape)
    expected = layer.projection(out.flatten(0, 1))
    torch.testing.assert_close(layer(x, grid)[0], expected, rtol=1e-10, atol=1e-10)


def test_fixed_tables_of_linear_attention_refuse_other_sizes() -> None:
    for name in ("swin", "cswin"):
        config = VisionConfig(**{**options(name, "linear"), "positions": "fixed"}, norm="prepbn")
        model = VisionForImageClassification(config).eval()
        with pytest.raises(ValueError, match="positions: interpolated"):
            model(torch.randn(1, 3, 64, 48))


def test_linear_attention_refuses_a_class_token() -> None:
    with pytest.raises(ValueError, match="the class token does not; set pooling: mean"):
        VisionForImageClassification(VisionConfig(**SMALL["deit"], attention="simplified_linear"))
