"""Training of a detector from transformers around an image backbone: losses, average precision, optimiser. Wiring."""

import json
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchmetrics import SumMetric
from transformers import AutoModelForObjectDetection

from .box_average_precision import BoxAveragePrecision
from .detectors import (
    DETECTORS,
    DetectorKind,
    backbone_config,
    backbone_of,
    build_detector,
    detections,
    detector_config,
    detector_kind,
    in_padded_frame,
    load_backbone_weights,
)
from .scheduled_adamw import cosine_with_linear_warmup, scheduled_adamw
from .vision.modeling import TABLES

# of torchmetrics' values, those that are logged; areas of 32^2 and 96^2 pixels part the sizes
LOGGED = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


class ObjectDetectionModule(LightningModule):
    """Trains a detector of transformers (RT-DETR, Deformable DETR, DETR, ...) whose backbone is one of this project's.

    A batch is `CocoDetectionDataModule`'s. Logged: `train/loss`, its terms for the last decoder layer as transformers
    gives them (`train/loss_bbox`, ...), `train/learning_rate`; over the whole set `val/loss`, `val/map` (COCO's average
    precision, 0 to 1), `val/map_50`, `val/map_75`, `val/map_small`, `val/map_medium`, `val/map_large` and
    `val/mar_100`, and the same under `test/`. A size that no box has shows as -1.

    `BatchNormRecalibration` and `PRepBNSchedule` work on it. Batch norms over tokens are no `BatchNorm2d`, so that the
    detectors, which freeze these in their backbones, leave them alone. The encoder of RT-DETR has some of its own,
    which train.

    Args:
        detector: rt-detr, rt-detr-v2, deformable-detr, conditional-detr or detr.
        backbone: name of a preset (`swin-t`, ...), or the fields of a `VisionConfig`; a key `preset` among them names
            the preset that the other fields change. `out_features` are the last three stages by default, of detr and
            conditional-detr the last one. Image size is the data module's where nothing here says it.
        options: fields of the detector's own configuration, such as `num_queries` or `d_model`.
        num_labels: number of classes; the data module's by default.
        pretrained: folder of a detector to start from, in place of `detector`, `backbone` and `options`.
        pretrained_backbone: folder of a classifier or backbone of the same sizes to take the stages' weights from.
        freeze_batch_norms: keep the statistics of the backbone's batch norms as they are, as the paper's detectors do;
            needs a start whose lambda is 0.
        learning_rate: peak learning rate.
        backbone_learning_rate_ratio: the backbone's learning rate over that.
        weight_decay: decoupled weight decay on matrices; norms, biases and tables of positions have none.
        betas: Adam's betas.
        eps: Adam's epsilon.
        warmup_ratio: share of all steps (0 to 1) over which the learning rate rises.
        first_learning_rate_ratio: first learning rate as a share of the peak (0 to 1).
        min_learning_rate_ratio: last learning rate as a share of the peak (0 to 1).
        max_detections: most detections in an image.
        total_steps: length of the schedule in optimiser steps; the trainer's own estimate by default.

    Raises:
        ValueError: an unknown detector, preset or field; fewer classes than the data; recalibration of frozen norms;
            a diverged loss; pycocotools or SciPy missing.
    """

    def __init__(
        self,
        detector: str = "rt-detr",
        *,
        backbone: str | dict[str, Any] = "swin-t",
        options: dict[str, Any] | None = None,
        num_labels: int | None = None,
        pretrained: str | None = None,
        pretrained_backbone: str | None = None,
        freeze_batch_norms: bool = False,
        learning_rate: float = 1e-4,
        backbone_learning_rate_ratio: float = 0.1,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_ratio: float = 0.05,
        first_learning_rate_ratio: float = 1e-3,
        min_learning_rate_ratio: float = 0.1,
        max_detections: int = 100,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        detector_kind(detector)
        self.save_hyperparameters()
        # built in configure_model, when strategy and data are known
        self.model: Any = None
        for split in ("val", "test"):
            setattr(self, f"{split}_precision", BoxAveragePrecision())
            for quantity in ("loss", "images"):
                setattr(self, f"{split}_{quantity}", SumMetric().set_dtype(torch.float64))

    @property
    def kind(self) -> DetectorKind:
        """What is particular to the detector."""
        name = type(self.model).__name__.removesuffix("ForObjectDetection")
        return next(kind for kind in DETECTORS.values() if kind.name == name)

    def configure_model(self) -> None:
        """Build the network, or load the pretrained one, once."""
        if self.model is not None:
            return
        hparams: Any = self.hparams
        datamodule = getattr(self._trainer, "datamodule", None)
        needed = getattr(datamodule, "num_classes", None)
        if hparams.pretrained:
            model: Any = AutoModelForObjectDetection.from_pretrained(hparams.pretrained, dtype=torch.float32)
            model.train()
        else:
            fields = {"preset": hparams.backbone} if isinstance(hparams.backbone, str) else dict(hparams.backbone)
            if (size := getattr(datamodule, "image_size", None)) is not None:
                fields.setdefault("image_size", size)
            # a checkpoint then says the sizes without the data
            hparams.backbone = fields
            if hparams.num_labels is None:
                hparams.num_labels = needed
            if hparams.num_labels is None:
                raise ValueError("nothing says the number of classes; set num_labels, or give a data module")
            options = {"num_labels": hparams.num_labels, **(hparams.options or {})}
            if (classes := getattr(datamodule, "classes", None)) and len(classes) == hparams.num_labels:
                options.setdefault("id2label", dict(enumerate(classes)))
                options.setdefault("label2id", {name: number for number, name in enumerate(classes)})
            config = detector_config(
                hparams.detector, backbone_config(detector_kind(hparams.detector), fields), options
            )
            model = build_detector(config)
        if needed is not None and model.config.num_labels < needed:
            raise ValueError(
                f"the model has {model.config.num_labels} classes, the data {needed}; raise num_labels, or leave it out"
            )
        backbone_of(model)
        if hparams.pretrained_backbone:
            load_backbone_weights(model, hparams.pretrained_backbone)
        self.model = model
        self.train(self.training)

    def train(self, mode: bool = True) -> "ObjectDetectionModule":
        """Training or evaluation; frozen batch norms stay in evaluation."""
        super().train(mode)
        if mode and self.model is not None and self.hparams["freeze_batch_norms"]:
            for norm in _batch_norms(backbone_of(self.model)):
                norm.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuse callbacks that frozen statistics contradict."""
        if not self.hparams["freeze_batch_norms"]:
            return
        names = [type(callback).__name__ for callback in self.trainer.callbacks]  # type: ignore[attr-defined]
        if "BatchNormRecalibration" in names:
            raise ValueError(
                "freeze_batch_norms keeps statistics that BatchNormRecalibration would replace; leave one of them out"
            )
        blends: list[Any] = [part for part in self.modules() if hasattr(part, "blend_state")]
        blending = [part for part in blends if part.blend_state()[0] > 0]
        if blending:
            raise ValueError(
                f"freeze_batch_norms, and {len(blending)} norms still in the blend: their batch norms were never "
                f"trained; start from a pretrained_backbone whose lambda is 0, or let them train"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the network's whole configuration."""
        checkpoint["model_config"] = json.loads(self.model.config.to_json_string(use_diff=False))

    def forward(self, batch: dict[str, Any], *, with_loss: bool = False) -> Any:
        """The detector's output for a batch.

        Args:
            batch: of `CocoDetectionDataModule`.
            with_loss: hand over the labels.

        Raises:
            ValueError: boxes that are no finite numbers.
        """
        labels = None
        if with_loss:
            labels = [{name: label[name] for name in ("class_labels", "boxes", "size")} for label in batch["labels"]]
            if not self.kind.reads_mask:
                labels = in_padded_frame(labels, batch["pixel_values"].shape[-2:])
        try:
            return self.model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=labels)
        except ValueError as error:
            # what transformers' and SciPy's matching of boxes say of nan
            if not any(words in str(error) for words in ("(corner) format", "invalid numeric entries")):
                raise
            raise ValueError(
                "the detector's boxes are no finite numbers: the training diverged; lower the learning rate"
            ) from error

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        output = self(batch, with_loss=True)
        self.log("train/loss", output.loss.detach(), prog_bar=True, on_step=True, on_epoch=False)
        terms = {
            f"train/{name}": value.detach()
            for name, value in output.loss_dict.items()
            if name.startswith("loss_") and not any(part in name for part in ("_aux_", "_dn_", "_enc"))
        }
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({**terms, "train/learning_rate": learning_rate}, on_step=True, on_epoch=False)
        return output.loss

    def recalibration_step(self, batch: dict[str, Any]) -> None:
        """A forward pass for the statistics of batch norms."""
        self(batch)

    def _evaluation_step(self, split: str, batch: dict[str, Any]) -> None:
        output, images = self(batch, with_loss=True), len(batch["labels"])
        if not torch.isfinite(output.loss):
            raise ValueError(
                f"the {split} loss is {output.loss.item()}: the training diverged; lower the learning rate"
            )
        getattr(self, f"{split}_loss").update(output.loss.double() * images)
        getattr(self, f"{split}_images").update(torch.tensor(float(images), dtype=torch.float64))
        getattr(self, f"{split}_precision").update(self._detections(batch, output), batch["annotations"])

    def _detections(self, batch: dict[str, Any], output: Any) -> list[dict[str, Tensor]]:
        return detections(
            self.kind,
            output.logits,
            output.pred_boxes,
            batch["labels"],
            padded=batch["pixel_values"].shape[-2:],
            max_detections=self.hparams["max_detections"],
        )

    def _evaluation_end(self, split: str) -> None:
        loss, images = (getattr(self, f"{split}_{name}").compute() for name in ("loss", "images"))
        values = getattr(self, f"{split}_precision").compute()
        self.log(f"{split}/loss", (loss / images).float(), prog_bar=True)
        self.log(f"{split}/map", values["map"].to(self.device), prog_bar=True)
        self.log_dict({f"{split}/{name}": values[name].to(self.device) for name in LOGGED if name != "map"})
        for name in ("loss", "images", "precision"):
            getattr(self, f"{split}_{name}").reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add one batch."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add one batch."""
        self._evaluation_step("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss and average precision over the whole set and all processes."""
        self._evaluation_end("val")

    def on_test_epoch_end(self) -> None:
        """Log loss and average precision over the whole set and all processes."""
        self._evaluation_end("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Tensor]]:
        """Detections of each image: `scores`, `labels`, and `boxes` as corners in pixels before resizing."""
        return self._detections(batch, self(batch))

    def configure_optimizers(self) -> Any:
        """AdamW with a linear warm-up and a cosine, stepped once per optimiser step."""
        hparams: Any = self.hparams
        inside = {id(parameter) for parameter in backbone_of(self.model).parameters()}
        rates = {False: hparams.learning_rate, True: hparams.learning_rate * hparams.backbone_learning_rate_ratio}
        groups: dict[tuple[bool, bool], dict[str, Any]] = {
            (own, spared): {"params": [], "lr": rates[own], "weight_decay": 0.0 if spared else hparams.weight_decay}
            for own in (False, True)
            for spared in (False, True)
        }
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                spared = name.rpartition(".")[2] in TABLES or parameter.dim() < 2
                groups[id(parameter) in inside, spared]["params"].append(parameter)
        return scheduled_adamw(
            self,
            [group for group in groups.values() if group["params"]],
            lambda step, warmup, total: cosine_with_linear_warmup(
                step,
                warmup_steps=warmup,
                total_steps=total,
                first_ratio=hparams.first_learning_rate_ratio,
                last_ratio=hparams.min_learning_rate_ratio,
            ),
        )


def _batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]
