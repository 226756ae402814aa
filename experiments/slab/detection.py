"""Small detectors whose backbones have layer norms, or batch norms that were blended in, on the same scenes."""

import copy
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kept_runs import KeptRuns

SEEDS = (0, 1, 2)
VARIANTS = ("layernorm", "prepbn")


@dataclass(frozen=True)
class Study:
    """Settings that all runs share.

    Attributes:
        stamps: where the stamps come from.
        classes: their classes.
        size: side of a scene in pixels.
        train: scenes to train on.
        test: scenes to score.
        epochs: passes over the scenes.
        batch_size: scenes per step.
        learning_rate: peak, of detector and backbone.
        decay_share: share of the steps in which lambda falls to 0.
        hidden_sizes: channels of the backbone's stages.
        depths: blocks of the stages.
        width: channels of the detector.
        num_queries: boxes per scene.
    """

    stamps: str = "asset:emoji"
    classes: tuple[str, ...] = ("Smileys & Emotion", "Flags", "Animals & Nature")
    size: int = 96
    train: int = 1920
    test: int = 400
    epochs: int = 4
    batch_size: int = 16
    learning_rate: float = 1e-3
    decay_share: float = 0.7
    hidden_sizes: tuple[int, ...] = (32, 64, 128)
    depths: tuple[int, ...] = (2, 2, 2)
    width: int = 64
    num_queries: int = 20


QUICK = Study(train=32, test=8, epochs=1, hidden_sizes=(16, 32), depths=(1, 1), width=32, num_queries=6)


def data_of(study: Study, seed: int) -> Any:
    """The scenes, in batches ordered by the seed; the scenes themselves are the same for all seeds."""
    from ...datamodules import StampScenesDataModule

    return StampScenesDataModule(
        study.stamps,
        classes=study.classes,
        scene_size=study.size,
        scenes=(study.train, 200 if study.train > 200 else 8, study.test),
        batch_size=study.batch_size,
        eval_batch_size=50,
        seed=seed,
    )


def module_of(study: Study, variant: str) -> Any:
    """The detector, RT-DETR around a small Swin."""
    from ...lightning_modules import ObjectDetectionModule

    stages = len(study.hidden_sizes)
    return ObjectDetectionModule(
        "rt-detr",
        backbone={
            "architecture": "swin",
            "image_size": study.size,
            "patch_size": 4,
            "hidden_sizes": list(study.hidden_sizes),
            "depths": list(study.depths),
            "num_heads": [max(1, size // 32) for size in study.hidden_sizes],
            "window_size": 6,
            "norm": variant,
            "out_features": [f"stage{stages - 1}", f"stage{stages}"],
        },
        options={
            "d_model": study.width,
            "encoder_ffn_dim": 2 * study.width,
            "encoder_attention_heads": 4,
            "decoder_ffn_dim": 2 * study.width,
            "decoder_attention_heads": 4,
            "decoder_layers": 2,
            "num_queries": study.num_queries,
            "num_denoising": 10,
            "hidden_expansion": 0.5,
        },
        learning_rate=study.learning_rate,
        backbone_learning_rate_ratio=1.0,
        min_learning_rate_ratio=0.02,
    )


def runs(study: Study, folder: Path) -> KeptRuns:
    """The study's runs, kept in `folder`."""
    return KeptRuns(folder, study, partial(result_of, study=study))


def trained(variant: str, seed: int, study: Study) -> tuple[Any, Any, Any]:
    """Train a variant: the trainer, the module and the data."""
    import lightning.pytorch as pl

    from ...callbacks import BatchNormRecalibration, PRepBNSchedule

    pl.seed_everything(seed, verbose=False)
    data, module = data_of(study, seed), module_of(study, variant)
    schedule = [PRepBNSchedule(decay_share=study.decay_share)] if variant == "prepbn" else []
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=study.epochs,
        gradient_clip_val=1.0,
        # the encoder's batch norms of all variants are recalibrated
        callbacks=[*schedule, BatchNormRecalibration(passes=1)],
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    return trainer, module, data


def result_of(variant: str, seed: int, study: Study) -> dict[str, Any]:
    """Train a variant and score it on the test scenes, with PRepBN a second time after fusion.

    Raises:
        ValueError: a loss that is no number.
    """
    begin = time.perf_counter()
    trainer, module, data = trained(variant, seed, study)
    seconds = round(time.perf_counter() - begin, 1)
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in module.model.parameters()),
        "train_seconds": seconds,
        "scores": _scores(trainer, module, data),
    }
    if variant == "prepbn":
        result["fused"] = _fused(trainer, module, data)
    return result


def _scores(trainer: Any, module: Any, data: Any) -> dict[str, float]:
    found = trainer.test(module, data, verbose=False)[0]
    scores = {name.removeprefix("test/"): float(value) for name, value in found.items()}
    if not all(math.isfinite(value) for value in scores.values()):
        raise ValueError(f"the scores are {scores}: the training diverged; lower the learning rate")
    return scores


@torch.no_grad()
def _fused(trainer: Any, module: Any, data: Any) -> dict[str, Any]:
    from ...lightning_modules import fused_detector

    plain = copy.copy(module)
    plain._modules = dict(module._modules)
    plain.model = fused_detector(module.model)
    module.eval()
    plain.model.eval()
    logits = boxes = 0.0
    for batch in data.test_dataloader():
        before, after = module(batch), plain(batch)
        logits = max(logits, float((before.logits - after.logits).abs().max()))
        boxes = max(boxes, float((before.pred_boxes - after.pred_boxes).abs().max()))
    return {
        "scores": _scores(trainer, plain, data),
        "max_logit_difference": logits,
        "max_box_difference": boxes,
        "parameters": sum(parameter.numel() for parameter in plain.model.parameters()),
    }
