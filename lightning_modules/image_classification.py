"""Training of an image classifier: cross-entropy with soft labels, accuracy, optimiser and schedule. Wiring only."""

import json
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import SumMetric
from transformers import AutoModelForImageClassification

from .scheduled_adamw import cosine_with_linear_warmup, scheduled_adamw
from .vision.configuration import VisionConfig
from .vision.modeling import TABLES, VisionForImageClassification
from .vision.presets import check_vision_fields, vision_config


class ImageClassificationModule(LightningModule):
    """Trains an image classifier (recipe of SLAB's vision models, after DeiT's and Swin's).

    A batch holds `pixel_values` (B, C, H, W) and `labels`: (B,) classes, or (B, classes) shares of mixed images.
    Logged: `train/loss`, `train/learning_rate`; `val/loss` (without smoothing) and `val/accuracy` (share of images,
    0 to 1), and the same under `test/`.

    Args:
        model: name of a preset (`deit-t`, `swin-t`, ...), or the fields of a `VisionConfig`; a key `preset` among them
            names the preset that the other fields change. Classes, image size and channels are the data module's where
            nothing here says them.
        pretrained: a model folder to start from, in place of `model`.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay on matrices; vectors (norms, biases), tables of positions and class tokens
            have none.
        betas: Adam's betas.
        eps: Adam's epsilon.
        label_smoothing: share of the labels that is spread over all classes.
        warmup_ratio: share of all steps (0 to 1) over which the learning rate rises.
        first_learning_rate_ratio: first learning rate as a share of the peak (0 to 1).
        min_learning_rate_ratio: last learning rate as a share of the peak (0 to 1).
        total_steps: length of the schedule in optimiser steps; the trainer's own estimate by default.
        compile: compile the network in place.

    Raises:
        ValueError: an unknown preset or field; fewer outputs than the data have classes; a diverged loss.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "deit-t",
        *,
        pretrained: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        label_smoothing: float = 0.1,
        warmup_ratio: float = 0.067,
        first_learning_rate_ratio: float = 1e-3,
        min_learning_rate_ratio: float = 0.01,
        total_steps: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # built in configure_model, when strategy and data are known
        self.model: Any = None
        for split in ("val", "test"):
            for quantity in ("loss", "correct", "images"):
                # double precision: sums over a large set would lose the digits that are reported
                setattr(self, f"{split}_{quantity}", SumMetric().set_dtype(torch.float64))

    def vision_config(self) -> VisionConfig:
        """The network's configuration from the arguments and the data module."""
        hparams: Any = self.hparams
        fields = {"preset": hparams.model} if isinstance(hparams.model, str) else dict(hparams.model)
        datamodule = getattr(self._trainer, "datamodule", None)
        for name, source in (
            ("num_labels", "num_classes"),
            ("image_size", "image_size"),
            ("num_channels", "num_channels"),
        ):
            value = getattr(datamodule, source, None)
            if value is not None:
                fields.setdefault(name, value)
        preset = fields.pop("preset", None)
        if preset is not None:
            return vision_config(preset, **fields)
        check_vision_fields(fields)
        return VisionConfig(**fields)

    def configure_model(self) -> None:
        """Build the network, or load the pretrained one, once."""
        if self.model is not None:
            return
        hparams: Any = self.hparams
        if hparams.pretrained:
            model: Any = AutoModelForImageClassification.from_pretrained(hparams.pretrained, dtype=torch.float32)
            model.train()
        else:
            config = self.vision_config()
            # a checkpoint then says the sizes without the data
            known = {"preset": hparams.model} if isinstance(hparams.model, str) else dict(hparams.model)
            sizes = {name: getattr(config, name) for name in ("num_labels", "image_size", "num_channels")}
            hparams.model = {**known, **sizes}
            model = VisionForImageClassification(config)
        needed = getattr(getattr(self._trainer, "datamodule", None), "num_classes", None)
        if needed is not None and model.config.num_labels < needed:
            raise ValueError(
                f"the model has {model.config.num_labels} classes, the data {needed}; raise num_labels, or leave it out"
            )
        if hparams.compile:
            # compiling the LightningModule itself breaks self.log; in place keeps the state dict's keys
            model.compile()
        self.model = model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's whole configuration."""
        checkpoint["model_config"] = json.loads(self.model.config.to_json_string(use_diff=False))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.model(pixel_values=pixel_values).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        logits = self(batch["pixel_values"])
        loss = F.cross_entropy(logits.float(), batch["labels"], label_smoothing=self.hparams["label_smoothing"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/learning_rate", learning_rate, on_step=True, on_epoch=False)
        return loss

    def recalibration_step(self, batch: dict[str, Tensor]) -> None:
        """A forward pass for the statistics of batch norms."""
        self(batch["pixel_values"])

    def _evaluation_step(self, split: str, batch: dict[str, Tensor]) -> None:
        logits, labels = self(batch["pixel_values"]).float(), batch["labels"]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        if not torch.isfinite(loss):
            raise ValueError(f"the {split} loss is {loss.item()}: the training diverged; lower the learning rate")
        getattr(self, f"{split}_loss").update(loss.double())
        getattr(self, f"{split}_correct").update((logits.argmax(-1) == labels).sum().double())
        getattr(self, f"{split}_images").update(torch.tensor(float(len(labels)), dtype=torch.float64))

    def _evaluation_end(self, split: str) -> None:
        loss, correct, images = (getattr(self, f"{split}_{name}").compute() for name in ("loss", "correct", "images"))
        self.log(f"{split}/loss", (loss / images).float(), prog_bar=True)
        self.log(f"{split}/accuracy", (correct / images).float(), prog_bar=True)
        for name in ("loss", "correct", "images"):
            getattr(self, f"{split}_{name}").reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._evaluation_step("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracy over the whole set and all processes."""
        self._evaluation_end("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracy over the whole set and all processes."""
        self._evaluation_end("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Log-probabilities of the classes: (B, classes)."""
        return self(batch["pixel_values"]).float().log_softmax(-1)

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine, stepped once per optimiser step."""
        hparams: Any = self.hparams
        decayed: list[Tensor] = []
        spared: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                table = name.rpartition(".")[2] in TABLES
                (spared if table or parameter.dim() < 2 else decayed).append(parameter)
        groups = [{"params": decayed, "weight_decay": hparams.weight_decay}, {"params": spared, "weight_decay": 0.0}]
        return scheduled_adamw(
            self,
            groups,
            lambda step, warmup, total: cosine_with_linear_warmup(
                step,
                warmup_steps=warmup,
                total_steps=total,
                first_ratio=hparams.first_learning_rate_ratio,
                last_ratio=hparams.min_learning_rate_ratio,
            ),
        )
