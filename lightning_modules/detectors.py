"""transformers' detectors by name, built around the image backbones, and what they say as boxes in pixels."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .vision.configuration import VisionConfig
from .vision.modeling import VisionBackbone
from .vision.presets import check_vision_fields, vision_config


@dataclass(frozen=True)
class DetectorKind:
    """A detector of transformers.

    Attributes:
        name: beginning of its classes' names, `RTDetr` for `RTDetrConfig` and `RTDetrForObjectDetection`.
        levels: number of maps that it reads unless the backbone says otherwise.
        sigmoid: whether classes are scored one by one; else by a softmax with `no object` as the last one.
        reads_mask: whether it knows of padding. Boxes are shares of the image then, else of the padded batch.
        stride_fields: whether its configuration lists channels and strides of the maps.
    """

    name: str
    levels: int
    sigmoid: bool
    reads_mask: bool
    stride_fields: bool = False

    def config_class(self) -> Any:
        """Its configuration."""
        return getattr(transformers, f"{self.name}Config")

    def model_class(self) -> Any:
        """Its model."""
        return getattr(transformers, f"{self.name}ForObjectDetection")


# RT-DETR arXiv 2304.08069 and 2407.17140, Deformable DETR 2010.04159, Conditional DETR 2108.06152, DETR 2005.12872
DETECTORS: dict[str, DetectorKind] = {
    "rt-detr": DetectorKind("RTDetr", levels=3, sigmoid=True, reads_mask=False, stride_fields=True),
    "rt-detr-v2": DetectorKind("RTDetrV2", levels=3, sigmoid=True, reads_mask=False, stride_fields=True),
    "deformable-detr": DetectorKind("DeformableDetr", levels=3, sigmoid=True, reads_mask=True),
    "conditional-detr": DetectorKind("ConditionalDetr", levels=1, sigmoid=True, reads_mask=True),
    "detr": DetectorKind("Detr", levels=1, sigmoid=False, reads_mask=True),
}


def detector_kind(name: str) -> DetectorKind:
    """The detector of a name.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, n=2, cutoff=0.4) or list(DETECTORS)
        raise ValueError(f"unknown detector {name!r}; nearest: {', '.join(near)}")
    return DETECTORS[name]


def backbone_config(kind: DetectorKind, fields: dict[str, Any]) -> VisionConfig:
    """The backbone's configuration; the last stages' maps unless `out_features` or `out_indices` says otherwise.

    Args:
        kind: the detector.
        fields: of a `VisionConfig`; a key `preset` names the preset that the others change.

    Raises:
        ValueError: an unknown preset or field.
    """
    fields = dict(fields)
    preset = fields.pop("preset", None)
    check_vision_fields(fields)
    config = VisionConfig(**fields) if preset is None else vision_config(preset, **fields)
    if not {"out_features", "out_indices"} & fields.keys():
        names = config.stage_names[1:][-kind.levels :]
        config.set_output_features_output_indices(out_features=names, out_indices=None)
    return config


def detector_config(name: str, backbone: VisionConfig, fields: dict[str, Any]) -> Any:
    """A detector's configuration around a backbone; channels, strides and number of levels are the backbone's.

    Args:
        name: of the detector.
        backbone: with `out_features`.
        fields: further fields of the configuration, `num_labels` and `id2label` among them.

    Raises:
        ValueError: an unknown name or field.
    """
    kind = detector_kind(name)
    config_class = kind.config_class()
    known = {*config_class.__dataclass_fields__, "num_labels", "id2label", "label2id"} - {"backbone_config", "backbone"}
    for field in fields:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1, cutoff=0.4)
            raise ValueError(
                f"{config_class.__name__} has no field {field!r}" + (f"; nearest: {near[0]}" if near else "")
            )
    stages = [int(stage.removeprefix("stage")) - 1 for stage in backbone.out_features]
    given: dict[str, Any] = {}
    if kind.stride_fields:
        width = fields.get("encoder_hidden_dim", fields.get("d_model", config_class.encoder_hidden_dim))
        given = {
            "encoder_in_channels": [(backbone.hidden_sizes or [])[stage] for stage in stages],
            "feat_strides": [backbone.patch_size << stage for stage in stages],
            "encode_proj_layers": [len(stages) - 1],
            "num_feature_levels": len(stages),
            "encoder_hidden_dim": width,
            "d_model": width,
            "decoder_in_channels": [width] * len(stages),
            # it would do nothing here: only 2-D batch norms are replaced, the backbones' are over tokens
            "freeze_backbone_batch_norms": False,
        }
    elif name == "deformable-detr":
        given = {"num_feature_levels": len(stages)}
    return config_class(**{**given, **fields, "backbone_config": backbone})


def build_detector(config: Any) -> Any:
    """A detector of a configuration with fresh weights."""
    name = type(config).__name__.removesuffix("Config")
    kind = next(kind for kind in DETECTORS.values() if kind.name == name)
    return kind.model_class()(config)


def backbone_of(detector: nn.Module) -> VisionBackbone:
    """The backbone inside a detector.

    Raises:
        ValueError: there is none of ours.
    """
    for part in detector.modules():
        if isinstance(part, VisionBackbone):
            return part
    raise ValueError(f"{type(detector).__name__} is not built around a VisionBackbone")


def load_backbone_weights(detector: nn.Module, folder: str | Path) -> None:
    """Take the stages' weights from the folder of a classifier or backbone; norms of the maps may be missing there.

    Raises:
        ValueError: the folder's stages are others.
    """
    backbone = backbone_of(detector)
    loaded: Any = VisionBackbone.from_pretrained(
        folder, config=backbone.config, dtype=torch.float32, output_loading_info=True
    )
    source, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("norms."))
    other = [*missing, *(str(key) for key in report["mismatched_keys"])]
    if other:
        raise ValueError(f"{folder} is not of the same sizes as the detector's backbone: {other[0]} does not fit")
    backbone.load_state_dict(source.state_dict())


def in_padded_frame(labels: list[dict[str, Tensor]], padded: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Labels whose boxes are shares of the padded batch in place of the image.

    Args:
        labels: with `boxes` (n, 4) and `size`, height and width of the image in pixels.
        padded: height and width of the batch in pixels.
    """
    return [{**label, "boxes": label["boxes"] * _shares(label, padded).to(label["boxes"])} for label in labels]


def _shares(label: dict[str, Tensor], padded: tuple[int, int]) -> Tensor:
    """Width, height, width, height of the image over the batch's."""
    height, width = (label["size"].double() / torch.tensor(padded, device=label["size"].device)).unbind()
    return torch.stack([width, height, width, height])


@torch.no_grad()
def detections(
    kind: DetectorKind, logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], *, padded: tuple[int, int],
    max_detections: int = 100,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """What a detector says: for each image `scores` (n,), `labels` (n,) and `boxes` (n, 4) as corners in pixels.

    With a softmax one class per query, the most likely that is an object; with sigmoids the best pairs of query and
    class. Boxes are in the image before resizing.

    Args:
        kind: of the detector.
        logits: (B, Q, classes), with a softmax one more.
        boxes: (B, Q, 4) centre, width and height in shares.
        labels: of the images, with `size` and `orig_size`.
        padded: height and width of the batch in pixels.
        max_detections: most detections in an image.
    """
    found = []
    for scores_of, boxes_of, label in zip(logits.float(), boxes.float(), labels, strict=True):
        if kind.sigmoid:
            scores, places = scores_of.sigmoid().flatten().topk(min(max_detections, scores_of.numel()))
            queries, classes = places // scores_of.shape[-1], places % scores_of.shape[-1]
        else:
            best, classes = scores_of.softmax(-1)[:, :-1].max(-1)
            scores, queries = best.topk(min(max_detections, len(best)))
            classes = classes[queries]
        chosen = boxes_of[queries]
        if not kind.reads_mask:
            chosen = chosen / _shares(label, padded).to(chosen)
        corners = torch.cat([chosen[:, :2] - chosen[:, 2:] / 2, chosen[:, :2] + chosen[:, 2:] / 2], dim=-1)
        height, width = label["orig_size"].to(corners).unbind()
        scale = torch.stack([width, height, width, height])
        found.append({"scores": scores, "labels": classes, "boxes": (corners * scale).clamp_min(0).minimum(scale)})
    return found
