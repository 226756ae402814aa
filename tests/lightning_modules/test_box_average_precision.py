"""Average precision against a table counted by hand, and against pycocotools on files."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.lightning_modules.box_average_precision import BoxAveragePrecision
from torch import Tensor

coco = pytest.importorskip("pycocotools.coco")
cocoeval = pytest.importorskip("pycocotools.cocoeval")


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def test_counted_by_hand() -> None:
    """Two things; the best detection finds one, the second nothing, the third the other with an overlap of 0.64."""
    metric = BoxAveragePrecision()
    found = {
        "boxes": boxes([0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 28, 28]),
        "scores": torch.tensor([0.9, 0.8, 0.7]),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    true = {"boxes": boxes([0, 0, 10, 10], [20, 20, 30, 30]), "labels": torch.zeros(2, dtype=torch.long)}
    metric.update([found], [true])
    values = metric.compute()
    # precision 1 up to recall 1/2 (51 of 101 places), 2/3 up to 1 where the second counts: thresholds 0.50, 0.55, 0.60
    whole, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert float(values["map_50"]) == pytest.approx(whole, abs=1e-6)
    assert float(values["map"]) == pytest.approx((3 * whole + 7 * half) / 10, abs=1e-6)
    assert float(values["map_75"]) == pytest.approx(half, abs=1e-6)
    assert float(values["map_large"]) == -1


def test_equals_pycocotools_on_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, annotations, results = [], [], []
    metric = BoxAveragePrecision()
    for image in range(1, 13):
        images.append({"id": image, "height": 200, "width": 300})
        corner, size = rng.uniform(0, 120, (5, 2)), rng.uniform(8, 140, (5, 2))
        true = np.concatenate([corner, corner + size], 1).astype(np.float32)
        labels, crowds = rng.integers(0, 3, 5), (rng.random(5) < 0.15).astype(int)
        areas = (size.prod(1) * rng.uniform(0.3, 1, 5)).astype(np.float32)
        noise = rng.normal(0, 6, (8, 4)).astype(np.float32)
        guessed = (true[rng.integers(0, 5, 8)] + noise).astype(np.float32)
        guessed[:, 2:] = np.maximum(guessed[:, 2:], guessed[:, :2] + 1)
        classes, scores = rng.integers(0, 3, 8), rng.random(8).astype(np.float32)
        for box, label, crowd, area in zip(true, labels, crowds, areas, strict=True):
            record: dict[str, Any] = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label)}
            record |= {"bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]}
            annotations.append(record | {"iscrowd": int(crowd), "area": float(area)})
        for box, label, score in zip(guessed, classes, scores, strict=True):
            bbox = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            record = {"image_id": image, "category_id": int(label), "bbox": bbox, "score": float(score)}
            results.append(record)
        metric.update(
            [{"boxes": torch.tensor(guessed), "scores": torch.tensor(scores), "labels": torch.tensor(classes)}],
            [
                {
                    "boxes": torch.tensor(true),
                    "labels": torch.tensor(labels),
                    "iscrowd": torch.tensor(crowds),
                    "area": torch.tensor(areas),
                }
            ],
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": n, "name": str(n)} for n in range(3)],
    }
    (tmp_path / "true.json").write_text(json.dumps(content))
    (tmp_path / "found.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO(str(tmp_path / "true.json"))
        evaluation = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = metric.compute()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    ours = [float(values[name]) for name in names]
    assert all(0 < value < 1 for value in ours)
    np.testing.assert_allclose(ours, evaluation.stats[:6], atol=1e-6)


def test_lists_of_one_length() -> None:
    with pytest.raises(ValueError, match="1 images with detections, 0 with boxes"):
        BoxAveragePrecision().update([{"boxes": boxes(), "scores": boxes()[:, 0], "labels": boxes()[:, 0].long()}], [])
