"""Published sizes by name."""

import difflib
from typing import Any

from .configuration import VisionConfig


def _deit(size: int, heads: int) -> dict[str, Any]:
    return {"architecture": "deit", "hidden_sizes": [size], "depths": [12], "num_heads": [heads]}


def _hierarchical(architecture: str, size: int, depths: list[int], heads: list[int], **fields: Any) -> dict[str, Any]:
    sizes = [size << stage for stage in range(4)]
    return {
        "architecture": architecture,
        "patch_size": 4,
        "hidden_sizes": sizes,
        "depths": depths,
        "num_heads": heads,
        "norm_eps": 1e-5,
        **fields,
    }


def _pvt(depths: list[int]) -> dict[str, Any]:
    return {
        "architecture": "pvt",
        "patch_size": 4,
        "hidden_sizes": [64, 128, 320, 512],
        "depths": depths,
        "num_heads": [1, 2, 5, 8],
        "mlp_ratios": [8.0, 8.0, 4.0, 4.0],
        "reduction_ratios": [8, 4, 2, 1],
    }


# DeiT arXiv 2012.12877, Swin 2103.14030, PVT 2102.12122, CSwin 2107.00652
PRESETS: dict[str, dict[str, Any]] = {
    "deit-t": _deit(192, 3),
    "deit-s": _deit(384, 6),
    "deit-b": _deit(768, 12),
    "swin-t": _hierarchical("swin", 96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin-s": _hierarchical("swin", 96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin-b": _hierarchical("swin", 128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "pvt-t": _pvt([2, 2, 2, 2]),
    "pvt-s": _pvt([3, 4, 6, 3]),
    "pvt-m": _pvt([3, 4, 18, 3]),
    "cswin-t": _hierarchical("cswin", 64, [1, 2, 21, 1], [2, 4, 8, 16], stripe_widths=[1, 2, 7, 7]),
}


def vision_config(preset: str, **changes: Any) -> VisionConfig:
    """The configuration of a published size, with 1,000 classes at 224 pixels, and what is changed in it.

    >>> vision_config("swin-t", norm="layernorm", num_labels=10).depths
    [2, 2, 6, 2]

    Raises:
        ValueError: an unknown name, or an unknown field.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=3, cutoff=0.4) or sorted(PRESETS)
        raise ValueError(f"unknown vision preset {preset!r}; nearest: {', '.join(near)}")
    fields = {"num_labels": 1000, **PRESETS[preset], **changes}
    check_vision_fields(fields)
    return VisionConfig(**fields)


def check_vision_fields(fields: dict[str, Any]) -> None:
    """Refuse names that no field has."""
    known = {*VisionConfig.__dataclass_fields__, "num_labels", "out_features", "out_indices", "id2label", "label2id"}
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            raise ValueError(f"VisionConfig has no field {name!r}" + (f"; nearest: {near[0]}" if near else ""))
