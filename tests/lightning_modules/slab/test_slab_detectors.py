"""PRepBN inside detectors: its batch norms stay and train, and the fused detector computes the same."""

from pathlib import Path
from typing import Any

import pytest
import tenfold.lightning_modules  # noqa: F401 (registers the backbone)
import torch
from tenfold.lightning_modules.detectors import (
    DETECTORS,
    backbone_config,
    backbone_of,
    build_detector,
    detector_config,
    detector_kind,
)
from tenfold.lightning_modules.slab import (
    ChannelAffine,
    ProgressiveNorm,
    fused_detector,
    replace_norms,
    statistics_norms,
)
from torch import nn
from transformers import AutoModelForObjectDetection

torch.set_num_threads(1)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "swin": {"window_size": 4},
    "pvt": {"reduction_ratios": [2, 2, 1], "pooling": "mean", "positions": "interpolated"},
    "cswin": {"stripe_widths": [1, 2, 4]},
}


def detector(name: str, architecture: str = "swin", *, norm: str = "prepbn", **options: Any) -> Any:
    """A small one with no weight or statistic at its trivial value, lambda at 0, in evaluation."""
    torch.manual_seed(0)
    fields = {
        "architecture": architecture,
        "image_size": 64,
        "patch_size": 4,
        "hidden_sizes": [8, 16, 24],
        "depths": [1, 2, 1],
        "num_heads": [2, 2, 2],
        "norm": norm,
        **ARCHITECTURES[architecture],
        **options,
    }
    widths = {
        "d_model": 32,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "num_queries": 6,
        "num_labels": 3,
    }
    model = build_detector(detector_config(name, backbone_config(detector_kind(name), fields), widths))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if isinstance(part, ProgressiveNorm):
                part.set_blend(0.0)
                part.drop_old_norm()
    return model.eval()


def compare(model: Any, other: Any, x: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        one, two, away = model(pixel_values=x), other(pixel_values=x), model(pixel_values=x.flip(-1))
    for key in ("logits", "pred_boxes"):
        # what the detector says depends on the picture
        assert (one[key] - away[key]).abs().max() > 1e-2
        torch.testing.assert_close(one[key], two[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [*((name, "swin") for name in DETECTORS), ("rt-detr", "pvt"), ("deformable-detr", "cswin")],
)
def test_fused_equals_unfused(name: str, architecture: str) -> None:
    model = detector(name, architecture)
    fused = fused_detector(model)
    assert statistics_norms(backbone_of(fused)) == []
    affine = [part for part in backbone_of(fused).norms.values() if isinstance(part, ChannelAffine)]
    assert len(affine) == DETECTORS[name].levels
    assert isinstance(backbone_of(model).stages[0].blocks[0].norm1, ProgressiveNorm)
    x = torch.randn(2, 3, 64, 96)
    compare(model, fused, x, 1e-5)
    compare(model.double(), fused_detector(model), x.double(), 1e-12)


@pytest.mark.parametrize("name", ["detr", "deformable-detr"])
def test_odd_sizes(name: str) -> None:
    model = detector(name).double()
    compare(model, fused_detector(model), torch.randn(1, 3, 53, 71, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("name", ["rt-detr", "detr"])
def test_folders_load_again(name: str, tmp_path: Path) -> None:
    model = detector(name)
    fused = fused_detector(model)
    model.save_pretrained(tmp_path / "plain")
    fused.save_pretrained(tmp_path / "fused")
    x = torch.randn(1, 3, 64, 64)
    for one, folder in ((model, "plain"), (fused, "fused")):
        again, report = AutoModelForObjectDetection.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert type(again) is type(model)
        compare(one, again.eval(), x, 0.0)
    assert not [name for name in fused.state_dict() if "running" in name and ".backbone." in name]


@pytest.mark.parametrize("name", DETECTORS)
def test_batch_norms_are_not_frozen(name: str) -> None:
    """transformers replaces or freezes the batch norms of a backbone; the statistics and scales of these move."""
    model = detector(name, drop_path_rate=0.0).train()
    norms = [part for part in model.modules() if isinstance(part, ProgressiveNorm)]
    assert len(norms) == 1 + 2 * 4 + 2 + DETECTORS[name].levels
    before = [norm.new_norm.bn.running_mean.clone() for norm in norms]  # type: ignore[union-attr]
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.5, 0.3, 0.2]])}] * 2
    output = model(pixel_values=torch.randn(2, 3, 64, 64), labels=labels)
    output.loss.backward()
    for norm, mean in zip(norms, before, strict=True):
        bn: Any = norm.new_norm.bn
        assert not torch.equal(bn.running_mean, mean)
        assert bn.weight.grad.abs().max() > 0
        assert norm.new_norm.eta.grad.abs().max() > 0


def test_replaced_norms_have_a_plan_too() -> None:
    model = detector("rt-detr", norm="layernorm")
    replace_norms(backbone_of(model), initial="vision")
    for part in model.modules():
        if isinstance(part, ProgressiveNorm):
            part.new_norm.bn.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
            part.set_blend(0.0)
    compare(model, fused_detector(model), torch.randn(1, 3, 64, 64), 1e-5)


def test_refused() -> None:
    model = detector("detr", norm="prepbn")
    norm = backbone_of(model).stages[0].blocks[0].norm1
    norm.old_norm = nn.LayerNorm(8)
    norm.set_blend(0.5)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 is still in the blend, lambda 0\.5"):
        fused_detector(model)
    with pytest.raises(ValueError, match="not built around a VisionBackbone"):
        fused_detector(type("Other", (nn.Module,), {"config": None})())
