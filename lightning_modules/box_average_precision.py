"""COCO's average precision of boxes by torchmetrics, without torchvision."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torchmetrics.detection import mean_ap
from torchmetrics.detection.mean_ap import MeanAveragePrecision


class BoxAveragePrecision(MeanAveragePrecision):
    """`torchmetrics.detection.MeanAveragePrecision` for boxes given as corners, pycocotools behind it.

    torchmetrics (1.9) asks for torchvision although for boxes it takes nothing from it but a change of format, which is
    done here. States, their gathering over processes and the evaluation are torchmetrics' own.

    Args:
        **options: as for torchmetrics, without `iou_type`, `box_format` and `average`.

    Raises:
        ValueError: pycocotools is not installed.
    """

    def __init__(self, **options: Any) -> None:
        with patch.object(mean_ap, "_TORCHVISION_AVAILABLE", True):
            try:
                super().__init__(box_format="xyxy", iou_type="bbox", **options)
            except ModuleNotFoundError as error:
                raise ValueError("average precision needs: pip install 'tenfold[detection]'") from error
        self.warn_on_many_detections = False

    def update(self, preds: list[dict[str, Tensor]], target: list[dict[str, Tensor]]) -> None:
        """Add images.

        Args:
            preds: for each image `boxes` (n, 4), `scores` (n,) and `labels` (n,).
            target: for each image `boxes` (n, 4), `labels` (n,), and where known `iscrowd` (n,) and `area` (n,).

        Raises:
            ValueError: lists of different lengths.
        """
        if len(preds) != len(target):
            raise ValueError(f"{len(preds)} images with detections, {len(target)} with boxes; give both for each image")
        for item in preds:
            self.detection_box.append(_left_top_size(item["boxes"]))
            self.detection_labels.append(item["labels"])
            self.detection_scores.append(item["scores"])
        for item in target:
            none = torch.zeros_like(item["labels"])
            self.groundtruth_box.append(_left_top_size(item["boxes"]))
            self.groundtruth_labels.append(item["labels"])
            self.groundtruth_crowds.append(item.get("iscrowd", none))
            self.groundtruth_area.append(item.get("area", none))


def _left_top_size(boxes: Tensor) -> Tensor:
    """Corners (n, 4) to left, top, width, height."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=-1)
