"""The study of detectors: equal sizes and data, fused scores, kept runs; on discs and squares."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tenfold.experiments.bench import slab_detection
from tenfold.experiments.bench.registry import BENCHES, Settings
from tenfold.experiments.slab import detection
from tenfold.experiments.slab.scene_picture import draw_scenes


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> detection.Study:
    pytest.importorskip("sklearn")
    for name, colour in {"disc": (255, 40, 40), "square": (40, 40, 255)}.items():
        (tmp_path / "stamps" / name).mkdir(parents=True)
        for number in range(30):
            stamp = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
            shape = ImageDraw.Draw(stamp)
            (shape.ellipse if name == "disc" else shape.rectangle)((0, 0, 15, 15), fill=(*colour, 255))
            stamp.save(tmp_path / "stamps" / name / f"{number}.png")
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(slab_detection, "FOLDER", tmp_path / "runs")
    small = replace(detection.QUICK, stamps=str(tmp_path / "stamps"), classes=("disc", "square"), size=64)
    monkeypatch.setattr(slab_detection, "QUICK", small)
    torch.set_num_threads(1)
    return small


def test_all_seeds_see_the_same_scenes_in_another_order(study: detection.Study) -> None:
    one, other = (detection.data_of(study, seed) for seed in (0, 1))
    for data in (one, other):
        data.prepare_data()
        data.setup("fit")
    assert one._splits["train"].digest() == other._splits["train"].digest()
    ids = [[int(label["image_id"]) for b in data.train_dataloader() for label in b["labels"]] for data in (one, other)]
    assert sorted(ids[0]) == sorted(ids[1])
    assert ids[0] != ids[1]


def test_rows_and_kept_runs(study: detection.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(slab_detection.run(Settings(quick=True)))
    scores = {(row.case.split()[2], row.metric): row for row in rows if row.metric.startswith("map")}
    assert {name for name, _ in scores} == {"layernorm", "prepbn", "prepbn-fused"}
    for (name, metric), row in scores.items():
        assert 0 <= row.value <= 1
        assert (row.peer, row.peer_value) == (
            (None, None) if name == "layernorm" else ("layernorm", scores["layernorm", metric].value)
        )
    assert scores["prepbn-fused", "map"].value == pytest.approx(scores["prepbn", "map"].value, abs=1e-3)
    differences = {row.metric: row.value for row in rows if row.metric.startswith("max_")}
    assert set(differences) == {"max_logit_difference", "max_box_difference"}
    assert max(differences.values()) < 1e-3
    parameters = {name: int(row.case.split("parameters=")[1].split()[0]) for (name, _), row in scores.items()}
    assert parameters["prepbn-fused"] < parameters["prepbn"]

    def again(*args: Any) -> Any:
        raise AssertionError("trained a second time")

    monkeypatch.setattr(detection, "result_of", again)
    assert list(slab_detection.run(Settings(quick=True))) == rows
    assert "slab-detection" in BENCHES


def test_the_picture_shows_boxes_in_one_colour_per_class(study: detection.Study, tmp_path: Path) -> None:
    data = detection.data_of(study, 0)
    data.prepare_data()
    data.setup("test")
    scenes = data._splits["test"]
    draw_scenes(data.folder(), tmp_path / "scenes.png", rows=2, columns=3)
    picture = np.asarray(Image.open(tmp_path / "scenes.png"))
    assert picture.shape == (128, 192, 3)
    for number in range(6):
        tile = picture[number // 3 * 64 :, number % 3 * 64 :][:64, :64]
        left, top, right, bottom = scenes.annotations[number].boxes[-1].astype(int)
        colour = [(255, 0, 0), (0, 255, 0)][scenes.annotations[number].labels[-1]]
        for corner in ((top, left), (top, right - 1), (bottom - 1, left), (bottom - 1, right - 1)):
            assert tuple(tile[corner]) == colour


def test_the_two_detectors_differ_in_the_norms_of_the_backbone_alone(study: detection.Study) -> None:
    shapes = []
    for variant in detection.VARIANTS:
        module = detection.module_of(study, variant)
        module.hparams["num_labels"] = 2
        module.configure_model()
        shapes.append({name: value.shape for name, value in module.model.named_parameters() if "norm" not in name})
    assert shapes[0] == shapes[1]
