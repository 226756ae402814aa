"""One run of the study of controls: train, score before and after recalibration and after fusion."""

import copy
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from ..text_scores import held_out, task_scores

STAGES = ("trained", "recalibrated", "fused")


class Diverged(Exception):
    """A loss that is no number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss is no number at step {step}")
        self.step = step


class Watch(pl.Callback):
    """Ends a training that diverges, and copies the network after the last step. Listed before recalibration."""

    def __init__(self) -> None:
        self.trained: Any = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss; keep the network."""
        if not math.isfinite(float(outputs["loss"])):
            raise Diverged(trainer.global_step)
        if trainer.global_step == trainer.max_steps:
            network: Any = pl_module.model
            self.trained = copy.deepcopy(network).eval()


def train(module: Any, data: Any, study: Any, *, steps: int, clip: float) -> dict[str, Any]:
    """Fit, with the schedule and recalibration where the model has norms for them.

    Returns:
        `parameters`, `train_seconds`, `diverged_at` (a step, or None), and under `models` the networks of the stages
        that there are, in evaluation mode.
    """
    from ...callbacks import BatchNormRecalibration, PRepBNSchedule
    from ...callbacks.bn_recalibration import batch_norms
    from ...callbacks.slab_schedule import progressive_norms

    module.configure_model()
    watch, callbacks = Watch(), []
    if progressive_norms(module):
        callbacks.append(PRepBNSchedule(decay_share=study.decay_share))
    callbacks.append(watch)
    fixed = bool(batch_norms(module))
    if fixed:
        callbacks.append(
            BatchNormRecalibration(passes=study.recalibration_passes, max_batches=study.recalibration_batches)
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin, diverged, models = time.perf_counter(), None, {}
    try:
        trainer.fit(module, data)
        models = {"trained": watch.trained} | ({"recalibrated": module.model.eval()} if fixed else {})
    except Diverged as error:
        diverged = error.step
    return {
        "parameters": sum(p.numel() for p in (watch.trained or module.model).parameters()),
        "train_seconds": round(time.perf_counter() - begin, 1),
        "diverged_at": diverged,
        "models": models,
    }


def scored(
    run: dict[str, Any], score: Callable[[Any], dict[str, float]], fuse: Callable[[Any, Path], Any]
) -> tuple[dict[str, Any], Any]:
    """The run with the scores of each stage in place of the networks, and the last stage's network.

    Args:
        run: see `train`.
        score: numbers of a network; one that is not finite makes the run a diverged one.
        fuse: writes the fused form into a folder, gives `max_abs_logit_diff` among others, and the network as loaded.
    """
    models = run.pop("models")
    scores = {stage: score(model) for stage, model in models.items()}
    last: Any = models.get("recalibrated") or models.get("trained")
    finite = all(math.isfinite(value) for values in scores.values() for value in values.values())
    if last is not None and not finite:
        # weights or statistics without a number in them, after losses that had one
        run["diverged_at"], last = run["diverged_at"] or "evaluation", None
    if "recalibrated" in models and last is not None:
        with tempfile.TemporaryDirectory() as folder:
            report, last = fuse(last, Path(folder))
        run["fusion"] = report
        scores["fused"] = score(last)
    values = {stage: {k: v if math.isfinite(v) else None for k, v in found.items()} for stage, found in scores.items()}
    return run | {"scores": values}, last


def image_run(images: dict[str, Any], fields: dict[str, Any], seed: int, study: Any) -> dict[str, Any]:
    """A small DeiT (mean pooling, softmax attention) on pictures; scores are accuracy and loss."""
    from ...datamodules import ImageDataModule
    from ...lightning_modules import ImageClassificationModule

    pl.seed_everything(seed, verbose=False)
    data = ImageDataModule(
        **images,
        batch_size=study.image_batch_size,
        eval_batch_size=256,
        val_fraction=0.0,
        test_fraction=study.test_fraction,
        magnitude=None,
        erasing=0.0,
        mixup=0.2,
        cutmix=0.0,
        crop_ratio=1.0,
        seed=seed,
    )
    data.prepare_data()
    data.setup("fit")
    size = {
        "architecture": "deit",
        "patch_size": 4,
        "hidden_sizes": [study.image_width],
        "depths": [study.image_layers],
        "num_heads": [4],
        "pooling": "mean",
        "image_size": images["image_size"],
        "num_channels": images["num_channels"],
        "num_labels": data.num_classes,
    }
    module = ImageClassificationModule(size | fields, learning_rate=study.image_learning_rate)
    run = train(module, data, study, steps=study.image_steps, clip=5.0)
    batches = list(data.test_dataloader())
    run["test_images"] = sum(len(batch["labels"]) for batch in batches)
    result, _ = scored(run, lambda model: classified(model, batches), _fused_classifier)
    return result


@torch.no_grad()
def classified(model: Any, batches: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """Share of images whose class is right, and cross-entropy in nats."""
    nats, right, count = 0.0, 0, 0
    for batch in batches:
        logits = model(pixel_values=batch["pixel_values"]).logits.float()
        nats += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
        right += int((logits.argmax(-1) == batch["labels"]).sum())
        count += len(logits)
    return {"accuracy": right / count, "loss": nats / count}


def _fused_classifier(model: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    from transformers import AutoModelForImageClassification

    from ...lightning_modules.slab.vision_export import export_fused_classifier

    report = export_fused_classifier(model, folder)
    return report, AutoModelForImageClassification.from_pretrained(folder).eval()


def _fused_decoder(model: Any, folder: Path) -> tuple[dict[str, Any], Any]:
    from transformers import AutoModelForCausalLM

    from ...lightning_modules.slab.convert import export_fused

    report = export_fused(model, folder)
    return report, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def text_data(study: Any, seed: int, *, tokenizer: str, batch_size: int) -> Any:
    """Wikipedia summaries, set up."""
    from ...datamodules import TextDataModule

    data = TextDataModule(tokenizer=tokenizer, sequence_length=study.sequence_length, batch_size=batch_size, seed=seed)
    data.prepare_data()
    data.setup("fit")
    return data


def text_run(fields: dict[str, Any], seed: int, study: Any) -> dict[str, Any]:
    """A small decoder on Wikipedia; scores are loss and bits per byte, `tasks` those of lm-eval in the last form."""
    from ...lightning_modules import CausalLMModule, SLABLightning

    pl.seed_everything(seed, verbose=False)
    data = text_data(study, seed, tokenizer=f"bpe:{study.vocabulary}", batch_size=study.text_batch_size)
    size = {
        "preset": "dense-tiny",
        "vocab_size": data.vocab_size,
        "hidden_size": study.text_width,
        "num_hidden_layers": study.text_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max(study.sequence_length, 64),
    }
    kind: Any = SLABLightning if fields["norm"] == "prepbn" else CausalLMModule
    module = kind(size | fields, learning_rate=study.text_learning_rate, warmup_ratio=0.1)
    run = train(module, data, study, steps=study.text_steps, clip=1.0)
    result, last = scored(
        run, lambda model: held_out(model, data.test_dataloader(), study.test_batches), _fused_decoder
    )
    if last is not None:
        result["tasks"] = task_scores(last, data, study.task_documents)
    return result


def pretrained_run(kind: str, seed: int, study: Any) -> dict[str, Any]:
    """SmolLM2 as it is, fine-tuned, or with its norms replaced, at equal steps; scores are loss and bits per byte."""
    from ...datamodules.assets import resolve
    from ...lightning_modules import CausalLMModule, SLABLightning

    pl.seed_everything(seed, verbose=False)
    data = text_data(study, seed, tokenizer=study.pretrained, batch_size=study.pretrained_batch_size)
    options: Any = {"learning_rate": study.pretrained_learning_rate, "warmup_ratio": 0.1}
    module: Any = (SLABLightning if kind == "prepbn" else CausalLMModule)(
        pretrained=resolve(study.pretrained), **options
    )
    if kind == "original":
        module.configure_model()
        parameters = sum(p.numel() for p in module.model.parameters())
        run: dict[str, Any] = {"parameters": parameters, "train_seconds": 0.0, "diverged_at": None}
        run["models"] = {"trained": module.model.eval()}
    else:
        run = train(module, data, study, steps=study.pretrained_steps, clip=1.0)
    batches = study.pretrained_test_batches
    result, _ = scored(run, lambda model: held_out(model, data.test_dataloader(), batches), _fused_decoder)
    return result
