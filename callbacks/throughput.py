"""Training speed in tokens per second and milliseconds per step, over a sliding window."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from typing_extensions import override


class TokenThroughput(Callback):
    """Logs `perf/tokens_per_s` (all processes together) and `perf/step_ms`, validation and checkpoints left out.

    A batch is a mapping with `input_ids` (B, T); every position counts, as padding costs the same. The time of a step
    runs from the end of the previous batch to the end of this one, so waiting for data is part of it, and the
    validation and the saving between two batches are not. A step is an optimiser step: with gradient accumulation
    the batches of one step add up.

    Args:
        window: optimiser steps to average over.
        log_every_n_steps: optimiser steps between values; the trainer's `log_every_n_steps` when None.
    """

    def __init__(self, *, window: int = 50, log_every_n_steps: int | None = None) -> None:
        if window < 1:
            raise ValueError(f"window is {window}; at least 1 step is needed to average over")
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(f"log_every_n_steps is {log_every_n_steps}; use 1 or more, or leave it out")
        self.window = window
        self.log_every_n_steps = log_every_n_steps
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)  # seconds, tokens
        self._seconds = 0.0
        self._tokens = 0
        self._mark: float | None = None
        self._step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.clear()
        self._seconds, self._tokens, self._mark, self._step = 0.0, 0, None, trainer.global_step

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._mark is None:
            self._mark = self._now(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = self._now(pl_module)
        if self._mark is not None:
            self._seconds += now - self._mark
        self._mark = now
        self._tokens += _num_tokens(batch)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._steps.append((self._seconds, self._tokens))
        self._seconds, self._tokens = 0.0, 0
        every: int = self.log_every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._step % every == 0:
            seconds = sum(s for s, _ in self._steps)
            tokens = sum(t for _, t in self._steps)
            pl_module.log_dict(
                {
                    "perf/tokens_per_s": trainer.world_size * tokens / max(seconds, 1e-9),
                    "perf/step_ms": 1e3 * seconds / len(self._steps),
                },
                batch_size=1,
            )

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # the next batch starts the clock again
        self._mark = None

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        self._mark = None

    def _now(self, pl_module: pl.LightningModule) -> float:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        return time.perf_counter()


def _num_tokens(batch: Any) -> int:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        kind = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"TokenThroughput needs a batch with `input_ids`, got {kind}; leave the callback out for it")
    return int(batch["input_ids"].numel())
