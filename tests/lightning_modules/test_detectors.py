"""Detectors by name around a small backbone: maps that fit, boxes in pixels as transformers gives them, bad input."""

from typing import Any

import pytest
import torch
from tenfold.lightning_modules.detectors import (
    DETECTORS,
    backbone_config,
    backbone_of,
    build_detector,
    detections,
    detector_config,
    detector_kind,
    in_padded_frame,
    load_backbone_weights,
)
from tenfold.lightning_modules.vision import VisionConfig, VisionForImageClassification

torch.set_num_threads(1)

BACKBONE: dict[str, Any] = {
    "architecture": "swin",
    "image_size": 64,
    "patch_size": 4,
    "hidden_sizes": [8, 16, 24],
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 2],
    "window_size": 4,
}
WIDTHS: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_labels": 3,
}


def small_detector(name: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = backbone_config(detector_kind(name), BACKBONE | fields)
    return build_detector(detector_config(name, config, WIDTHS)).eval()


@pytest.mark.parametrize("name", DETECTORS)
def test_it_reads_the_maps_and_says_boxes(name: str) -> None:
    model = small_detector(name)
    backbone, levels = backbone_of(model), DETECTORS[name].levels
    assert list(backbone.out_features) == ["stage1", "stage2", "stage3"][-levels:]
    assert detector_kind(name).model_class() is type(model)
    shapes = [tuple(part.shape[1:]) for part in backbone(torch.zeros(1, 3, 64, 64)).feature_maps]
    assert shapes == [(8, 16, 16), (16, 8, 8), (24, 4, 4)][-levels:]
    output = model(pixel_values=torch.rand(2, 3, 64, 64))
    assert output.logits.shape == (2, 5, 3 if DETECTORS[name].sigmoid else 4)
    assert output.pred_boxes.shape == (2, 5, 4)
    if DETECTORS[name].stride_fields:
        # where anchors lie follows from the strides
        assert model.config.feat_strides == [4, 8, 16]


@pytest.mark.parametrize(
    ("name", "processor"),
    [
        ("rt-detr", "RTDetrImageProcessorPil"),
        ("deformable-detr", "DeformableDetrImageProcessorPil"),
        ("conditional-detr", "ConditionalDetrImageProcessorPil"),
        ("detr", "DetrImageProcessorPil"),
    ],
)
def test_detections_are_those_of_transformers_processors(name: str, processor: str) -> None:
    import transformers

    if not hasattr(transformers, processor):
        pytest.skip(f"this transformers has no {processor}")
    kind = detector_kind(name)
    torch.manual_seed(1)
    classes = 3 if kind.sigmoid else 4
    logits, boxes = 3 * torch.randn(2, 7, classes), torch.rand(2, 7, 4) * 0.2 + 0.3
    sizes = torch.tensor([[40, 60], [90, 50]])
    output = type("Output", (), {"logits": logits, "pred_boxes": boxes})()
    theirs = getattr(transformers, processor)().post_process_object_detection(
        output, threshold=0.0, target_sizes=sizes, **({"top_k": 21} if "deformable" in name else {})
    )
    labels = [{"orig_size": size, "size": torch.tensor([32, 32])} for size in sizes]
    ours = detections(kind, logits, boxes, labels, padded=(32, 32), max_detections=21 if name != "rt-detr" else 7)
    for found, expected in zip(ours, theirs, strict=True):
        order, other = found["scores"].argsort(descending=True), expected["scores"].argsort(descending=True)
        for key in ("scores", "labels", "boxes"):
            torch.testing.assert_close(found[key][order].double(), expected[key][other].double())


def test_padding_changes_shares_and_comes_off_again() -> None:
    """An image of 24 x 40 in a batch of 32 x 64: its right lower corner is at 40 / 64 and 24 / 32."""
    label = {
        "boxes": torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.25, 0.75, 0.5, 0.5]]),
        "size": torch.tensor([24, 40]),
        "orig_size": torch.tensor([48, 80]),
    }
    (padded,) = in_padded_frame([label], (32, 64))
    expected = torch.tensor([[20 / 64, 12 / 32, 40 / 64, 24 / 32], [10 / 64, 18 / 32, 20 / 64, 12 / 32]])
    torch.testing.assert_close(padded["boxes"], expected)
    logits = torch.tensor([[[9.0, -9.0], [8.0, -9.0]]])
    (found,) = detections(
        detector_kind("rt-detr"), logits, padded["boxes"][None], [label], padded=(32, 64), max_detections=2
    )
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, 80, 48], [0, 24, 40, 48]]))
    (found,) = detections(
        detector_kind("deformable-detr"), logits, label["boxes"][None], [label], padded=(32, 64), max_detections=2
    )
    torch.testing.assert_close(found["boxes"], torch.tensor([[0.0, 0, 80, 48], [0, 24, 40, 48]]))


def test_a_classifier_lends_its_stages(tmp_path: Any) -> None:
    torch.manual_seed(3)
    classifier = VisionForImageClassification(VisionConfig(**BACKBONE, num_labels=10))
    classifier.save_pretrained(tmp_path)
    model = small_detector("rt-detr")
    load_backbone_weights(model, tmp_path)
    for name, value in classifier.stages.state_dict().items():
        assert torch.equal(backbone_of(model).stages.state_dict()[name], value), name
    other = small_detector("rt-detr", hidden_sizes=[8, 16, 32])
    with pytest.raises((ValueError, RuntimeError), match=r"same sizes|mismatch"):
        load_backbone_weights(other, tmp_path)


def test_norms_that_the_folder_lacks_start_fresh(tmp_path: Any) -> None:
    """Statistics too: what a classifier lends has no norms of maps."""
    fields = {**BACKBONE, "norm": "prepbn", "norm_options": {"old_norm": None}}
    VisionForImageClassification(VisionConfig(**fields)).save_pretrained(tmp_path)
    model = small_detector("rt-detr", norm="prepbn", norm_options={"old_norm": None})
    norms = backbone_of(model).norms
    with torch.no_grad():
        for value in norms.state_dict().values():
            value.fill_(7)
    load_backbone_weights(model, tmp_path)
    for name, value in norms.state_dict().items():
        fresh = 1.0 if name.endswith(("bn.weight", "running_var", "eta")) else 0.0
        assert value.unique().tolist() == [fresh], name


def test_bad_names_and_fields() -> None:
    with pytest.raises(ValueError, match="unknown detector 'rtdetr'; nearest: rt-detr"):
        detector_kind("rtdetr")
    kind = detector_kind("detr")
    with pytest.raises(ValueError, match="VisionConfig has no field 'widow_size'; nearest: window_size"):
        backbone_config(kind, {"widow_size": 7})
    config = backbone_config(kind, BACKBONE)
    with pytest.raises(ValueError, match="DetrConfig has no field 'num_query'; nearest: num_queries"):
        detector_config("detr", config, {"num_query": 5})
    with pytest.raises(ValueError, match="backbone_config"):
        detector_config("detr", config, {"backbone_config": config})
    with pytest.raises(ValueError, match="not built around a VisionBackbone"):
        backbone_of(torch.nn.Linear(2, 2))
