"""WeightEMA: an exponential moving average of weights that goes along with SLAB's norms."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging
from typing_extensions import override

from .bn_recalibration import BatchNormRecalibration
from .slab_schedule import progressive_norms


class WeightEMA(EMAWeightAveraging):
    """Lightning's `EMAWeightAveraging`, for models whose norms change while they train.

    Validation and checkpoints show the average. Lambda is never averaged, and old norms that `PRepBNSchedule` takes
    away leave the average too. After the last step the model gets the averaged weights, so that
    `BatchNormRecalibration`, listed behind this callback, takes its statistics from them.

    Args:
        decay: weight of the average in each update, 0 to 1.
        update_every_n_steps: optimiser steps between updates.

    Raises:
        ValueError: a decay out of range; a recalibration listed before this callback.
    """

    def __init__(self, *, decay: float = 0.9999, update_every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} is not from 0 up to 1")
        super().__init__(decay=decay, update_every_n_steps=update_every_n_steps)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        earlier = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if any(isinstance(callback, BatchNormRecalibration) for callback in earlier):
            raise ValueError(
                "BatchNormRecalibration is listed before WeightEMA and would measure weights that are not kept; "
                "list it after"
            )
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._average_model is None:
            return
        pairs = list(zip(progressive_norms(self._average_model.module), progressive_norms(pl_module), strict=True))
        for average, current in pairs:
            if current.old_norm is None and average.old_norm is not None:
                # updates pair parameters by their order
                average.set_blend(0.0)
                average.drop_old_norm()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        for average, current in pairs:
            value, warming = current.blend_state()
            average.set_blend(value, warming=warming)
        last_step = 0 < trainer.max_steps <= trainer.global_step
        if last_step or (trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1):
            self._copy_average_to_current(pl_module)
            self._average_model = None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # None after a whole training: what recalibration has measured since must stay
        if self._average_model is not None:
            super().on_train_end(trainer, pl_module)
            self._average_model = None
