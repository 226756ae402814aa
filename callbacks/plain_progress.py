"""Progress as plain lines, for logs and pipes where a moving bar is noise."""

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from typing_extensions import override


class PlainProgress(Callback):
    """Prints a line every so many training steps and after each validation.

    A line names the step, the number of steps where it is known, the time since the start, and the metrics that were
    logged with `prog_bar=True`.

    Args:
        every_n_steps: optimiser steps between lines.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; a line every 1 or more steps is possible")
        self.every_n_steps = every_n_steps
        self._started = 0.0
        self._printed_step = -1

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()
        self._printed_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, _total_steps(trainer)
        # with gradient accumulation several batches end at the same step
        if step == self._printed_step or (step % self.every_n_steps and step != total):
            return
        self._printed_step = step
        self._line("train", trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._line("val", trainer)

    @rank_zero_only
    def _line(self, split: str, trainer: pl.Trainer) -> None:
        total = _total_steps(trainer)
        parts = [f"{split} step {trainer.global_step}" + ("" if total is None else f"/{total}")]
        if self._started:
            parts.append(f"{time.monotonic() - self._started:.1f} s")
        metrics = trainer.progress_bar_metrics if split == "train" else trainer.callback_metrics
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.numel() != 1:
                continue
            if split == "train" or name.startswith(("val", "perf")):
                parts.append(f"{name} {float(value):.4g}")
        print("  ".join(parts), flush=True)


def _total_steps(trainer: pl.Trainer) -> int | None:
    if trainer.state.fn != TrainerFn.FITTING:
        return None
    total = trainer.estimated_stepping_batches
    return None if math.isinf(total) else int(total)
