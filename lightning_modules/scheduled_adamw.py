"""AdamW whose learning rate follows a schedule over the whole training, as Lightning wants it configured."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule


def cosine_with_linear_warmup(
    step: int, *, warmup_steps: int, total_steps: int, first_ratio: float, last_ratio: float
) -> float:
    """Share of the peak learning rate: linear from `first_ratio`, then a cosine to `last_ratio` at `total_steps`.

    >>> ratios = {"first_ratio": 0.1, "last_ratio": 0.0}
    >>> [cosine_with_linear_warmup(s, warmup_steps=2, total_steps=6, **ratios) for s in (0, 1, 2, 4, 6, 9)]
    [0.1, 0.55, 1.0, 0.5, 0.0, 0.0]
    """
    if step < warmup_steps:
        return first_ratio + (1 - first_ratio) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return last_ratio + (1 - last_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


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
