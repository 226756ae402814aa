"""AdamW whose learning rate follows a schedule over the whole training, as Lightning wants it configured."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule


def scheduled_adamw(
    module: LightningModule, groups: list[dict[str, Any]], factor: Callable[[int, int, int], float]
) -> dict[str, Any]:
    """What `configure_optimizers` returns: AdamW, and a schedule that is stepped once per optimiser step.

    Args:
        module: in training, with `learning_rate`, `betas`, `eps`, `warmup_ratio` and `total_steps` in its
            hyper-parameters; without `total_steps` the trainer's end counts.
        groups: parameter groups.
        factor: of the learning rate, given the step, the steps of warm-up, and all steps.

    Raises:
        ValueError: neither the trainer nor the hyper-parameters say when training ends.
    """
    hparams: Any = module.hparams
    trainer = module.trainer
    # Lightning refuses to clip for a fused optimiser under mixed precision
    fused = not (trainer.gradient_clip_val and "mixed" in str(trainer.precision))
    optimizer = torch.optim.AdamW(
        groups, lr=hparams.learning_rate, betas=tuple(hparams.betas), eps=hparams.eps, fused=fused
    )
    total = hparams.total_steps or trainer.estimated_stepping_batches
    if not math.isfinite(total):
        raise ValueError("the trainer has no end (max_steps and max_epochs are unset); set one, or total_steps")
    warmup = round(hparams.warmup_ratio * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, warmup, int(total)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
