"""The average of weights across the end of a blend, before recalibration, and over a restart."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tenfold.callbacks import BatchNormRecalibration, PRepBNSchedule, WeightEMA
from tenfold.datamodules import ImageDataModule
from tenfold.lightning_modules import ImageClassificationModule

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "patch_size": 4,
    "hidden_sizes": [8],
    "depths": [1],
    "num_heads": [2],
    "pooling": "mean",
    "norm": "prepbn",
}


class Recorder(pl.Callback):
    """Copies of the weights after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def fit(
    callbacks: list[pl.Callback], ckpt_path: Path | None = None
) -> tuple[ImageClassificationModule, ImageDataModule]:
    pl.seed_everything(0)
    data = ImageDataModule(
        "packaged:digits",
        image_size=8,
        num_channels=1,
        batch_size=200,
        val_fraction=0.0,
        augment=False,
        mixup=0.0,
        cutmix=0.0,
        crop_ratio=1.0,
    )
    model = ImageClassificationModule(SMALL, learning_rate=0.05, warmup_ratio=0.0, total_steps=6)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=6,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, data


def averaged(steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """By name; the first update is a copy."""
    average = dict(steps[0])
    for step in steps[1:]:
        average = {name: decay * average[name] + (1 - decay) * value for name, value in step.items()}
    return average


def test_average_goes_on_when_the_old_norms_leave() -> None:
    recorder = Recorder()
    model, _ = fit([PRepBNSchedule(decay_steps=3), recorder, WeightEMA(decay=0.7)])
    assert len(recorder.steps[0]) > len(recorder.steps[-1])
    expected = averaged(recorder.steps, 0.7)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].detach(), value)
    assert not torch.equal(found["model.head.weight"], recorder.steps[-1]["model.head.weight"])


def test_recalibration_measures_the_average() -> None:
    recorder = Recorder()
    recalibration = BatchNormRecalibration(passes=1, average="cumulative")
    model, data = fit([PRepBNSchedule(decay_steps=3), recorder, WeightEMA(decay=0.7), recalibration])
    expected = averaged(recorder.steps, 0.7)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name])
    dataset = data._dataset("train")
    assert dataset is not None
    x = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    with torch.no_grad():
        tokens, _ = model.model.stages[0].embedding(x)
    found = model.model.stages[0].blocks[0].norm1.new_norm.bn
    torch.testing.assert_close(found.running_mean, tokens.mean((0, 1)), rtol=0.02, atol=0.02)
    assert found.num_batches_tracked == 8


def test_lambda_is_not_averaged(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    fit([PRepBNSchedule(decay_steps=4), WeightEMA(decay=0.7), saving])
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    blends = [float(value) for name, value in state.items() if name.endswith(".blend")]
    assert blends == [0.5] * 3


@pytest.mark.parametrize("stop", [2, 5], ids=["in-the-blend", "after-it"])
def test_restart_goes_on_with_the_average(stop: int, tmp_path: Path) -> None:
    def callbacks(folder: str) -> list[pl.Callback]:
        saving = ModelCheckpoint(tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return [PRepBNSchedule(decay_steps=3), WeightEMA(decay=0.7), saving]

    whole, _ = fit(callbacks("whole"))
    again, _ = fit(callbacks("again"), ckpt_path=tmp_path / "whole" / f"step={stop}.ckpt")
    for (name, first), (_, second) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(second, first, msg=name)


def test_wrong_order_and_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="listed before WeightEMA"):
        fit([PRepBNSchedule(decay_steps=3), BatchNormRecalibration(), WeightEMA()])
    with pytest.raises(ValueError, match=r"decay 1\.0 is not from 0 up to 1"):
        WeightEMA(decay=1.0)
