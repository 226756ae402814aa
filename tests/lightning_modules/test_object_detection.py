"""The detection module: what is logged, optimiser groups, PRepBN to a fused detector, frozen norms, bad input."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageDraw
from tenfold.callbacks import BatchNormRecalibration, PRepBNSchedule
from tenfold.datamodules import StampScenesDataModule
from tenfold.lightning_modules import ObjectDetectionModule, fused_detector
from tenfold.lightning_modules.detectors import backbone_of
from tenfold.lightning_modules.vision import VisionConfig, VisionForImageClassification

torch.set_num_threads(1)

BACKBONE: dict[str, Any] = {
    "architecture": "swin",
    "patch_size": 8,
    "hidden_sizes": [16, 24],
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2"],
}
OPTIONS: dict[str, Any] = {
    "d_model": 32,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 6,
    "num_denoising": 4,
}
DETR_OPTIONS = {name: value for name, value in OPTIONS.items() if name != "num_denoising"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright discs and squares as stamps, noise as a photograph."""
    root = tmp_path_factory.mktemp("sources")
    for name, colour in {"disc": (255, 40, 40), "square": (40, 40, 255)}.items():
        (root / "stamps" / name).mkdir(parents=True)
        for number in range(30):
            stamp = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
            shape = ImageDraw.Draw(stamp)
            (shape.ellipse if name == "disc" else shape.rectangle)((0, 0, 15, 15), fill=(*colour, 255))
            stamp.save(root / "stamps" / name / f"{number}.png")
    (root / "photographs").mkdir()
    pixels = np.random.default_rng(0).integers(60, 160, (64, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "photographs" / "noise.png")
    return root


def scenes(sources: Path, **options: Any) -> StampScenesDataModule:
    defaults: dict[str, Any] = {
        "photographs": str(sources / "photographs"),
        "folder": str(sources / "scenes"),
        "scene_size": 64,
        "scenes": (64, 10, 6),
        "stamps": (1, 2),
        "batch_size": 8,
        "eval_batch_size": 4,
    }
    return StampScenesDataModule(str(sources / "stamps"), **(defaults | options))


def module(**options: Any) -> ObjectDetectionModule:
    backbone = {**BACKBONE, "norm": options.pop("norm", "layernorm"), **options.pop("backbone", {})}
    defaults: dict[str, Any] = {"options": OPTIONS, "learning_rate": 2e-3, "backbone_learning_rate_ratio": 0.5}
    return ObjectDetectionModule(options.pop("detector", "rt-detr"), backbone=backbone, **(defaults | options))


def trainer(**options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(**(defaults | options))


def test_prepbn_from_training_to_the_fused_detector(sources: Path, tmp_path: Path) -> None:
    pl.seed_everything(0)
    data, model = scenes(sources), module(norm="prepbn")
    saving = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [PRepBNSchedule(), BatchNormRecalibration(passes=1, average="cumulative"), saving]
    run = trainer(max_epochs=5, callbacks=callbacks, enable_checkpointing=True, check_val_every_n_epoch=5)
    losses: list[float] = []
    step = model.training_step

    def noting(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        losses.append(float(loss.detach()))
        return loss

    model.training_step = noting  # type: ignore[method-assign]
    run.fit(model, data)
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    metrics = run.callback_metrics
    assert {"train/loss", "train/loss_vfl", "train/loss_bbox", "train/loss_giou"} <= metrics.keys()
    assert not [name for name in metrics if "aux" in name or "_dn_" in name]
    assert {"val/loss", "val/map", "val/map_50", "val/map_small", "val/mar_100"} <= metrics.keys()
    assert 0 <= metrics["val/map"] <= metrics["val/map_50"] <= 1
    assert not [name for name, _ in model.named_parameters() if "old_norm" in name]
    del model.training_step
    again = ObjectDetectionModule.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        output = model.eval()(batch)
        assert torch.equal(again(batch).logits, output.logits)
        fused = fused_detector(model.model)(pixel_values=batch["pixel_values"])
    torch.testing.assert_close(fused.logits, output.logits, rtol=1e-4, atol=1e-4)
    assert model.model.config.id2label == {0: "disc", 1: "square"}


class Oracle(torch.nn.Module):
    """Says exactly the boxes that it is handed as labels."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, labels: Any, **inputs: Any) -> Any:
        output = self.inner(labels=labels, **inputs)
        output.logits, output.pred_boxes = output.logits * 0 - 9, output.pred_boxes * 0 + 0.01
        for number, label in enumerate(labels):
            for query, (name, box) in enumerate(zip(label["class_labels"], label["boxes"], strict=True)):
                output.logits[number, query, name], output.pred_boxes[number, query] = 9.0, box
        return output


@pytest.mark.parametrize("detector", ["rt-detr", "deformable-detr"])
def test_true_boxes_have_a_precision_of_one(detector: str, sources: Path) -> None:
    """Whatever the resizing and padding in between, with a detector that knows of padding and with one that doesn't."""
    data = scenes(sources, size=48, size_divisor=64)
    model = module(detector=detector, options=OPTIONS if detector == "rt-detr" else DETR_OPTIONS, num_labels=2)
    model.configure_model()
    inner = model.model
    # which detector it is follows from the class
    model.model = type(type(inner).__name__, (Oracle,), {})(inner)
    found = trainer().test(model, data, verbose=False)[0]
    assert found["test/map"] == pytest.approx(1.0)
    assert found["test/map_small"] == pytest.approx(1.0)


def test_optimiser_groups(sources: Path) -> None:
    model = module(weight_decay=0.1, options=DETR_OPTIONS, detector="detr", norm="prepbn")
    run = trainer(max_steps=2, limit_val_batches=0, callbacks=[PRepBNSchedule(decay_steps=1)])
    run.fit(model, scenes(sources))
    groups = run.optimizers[0].param_groups
    own = {id(parameter) for parameter in backbone_of(model.model).parameters()}
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = place[id(parameter)]
        assert group["initial_lr"] == pytest.approx(1e-3 if id(parameter) in own else 2e-3), name
        plain = parameter.dim() < 2 or name.endswith("relative_positions")
        assert group["weight_decay"] == (0.0 if plain else 0.1), name


def test_frozen_statistics_stay_and_scales_train(sources: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {name: value for name, value in BACKBONE.items() if name != "out_features"}
    fields |= {"image_size": 64, "norm": "prepbn", "norm_options": {"old_norm": None}}
    classifier = VisionForImageClassification(VisionConfig(**fields, num_labels=5))
    for name, buffer in classifier.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    classifier.save_pretrained(tmp_path)
    model = module(
        norm="prepbn",
        backbone={"norm_options": {"old_norm": None}},
        pretrained_backbone=str(tmp_path),
        freeze_batch_norms=True,
    )
    run = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1)
    run.fit(model, scenes(sources))
    before, after = classifier.state_dict(), backbone_of(model.model).state_dict()
    statistics = [name for name in after if "running" in name and name.startswith("stages")]
    assert len(statistics) == 2 * 6
    for name in statistics:
        assert torch.equal(after[name], before[name]), name
    scales = [name for name in after if name.endswith("bn.weight") and name.startswith("stages")]
    assert all(not torch.equal(after[name], before[name]) for name in scales)
    # the detector's own batch norms are not frozen
    other = [name for name, buffer in model.named_buffers() if "encoder_input_proj" in name and "running_mean" in name]
    assert other
    assert all(model.get_buffer(name).abs().max() > 0 for name in other)


def test_refused(sources: Path) -> None:
    with pytest.raises(ValueError, match="unknown detector 'yolo'"):
        module(detector="yolo")
    with pytest.raises(ValueError, match="nothing says the number of classes"):
        module().configure_model()
    with pytest.raises(ValueError, match="the model has 1 classes, the data 2"):
        trainer(max_steps=1).fit(module(num_labels=1), scenes(sources))
    frozen = module(norm="prepbn", freeze_batch_norms=True)
    with pytest.raises(ValueError, match="norms still in the blend"):
        trainer(max_steps=2, callbacks=[PRepBNSchedule(decay_steps=1)]).fit(frozen, scenes(sources))
    frozen = module(norm="repbn", freeze_batch_norms=True)
    with pytest.raises(ValueError, match="BatchNormRecalibration would replace"):
        trainer(max_steps=1, callbacks=[BatchNormRecalibration()]).fit(frozen, scenes(sources))
    broken = module(num_labels=2)
    broken.configure_model()
    with torch.no_grad():
        next(broken.model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="the training diverged; lower the learning rate"):
        trainer().test(broken, scenes(sources), verbose=False)
