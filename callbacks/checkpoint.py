"""Checkpoints of a run under fixed names, with a `last.ckpt` that is there however training ended."""

from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override


class RunCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` with the names and the guarantees of a Tenfold run.

    `last.ckpt` holds the last finished step also when training ended between two intervals, when validation never
    ran, when the process got SIGTERM or Ctrl+C, and when a step raised. Parameters that an exception caught halfway
    through an update are never saved. File names carry no metric names, whose slashes would make folders.

    Args:
        dirpath: folder of the checkpoints; `checkpoints` in the run's folder when None.
        filename: name of a checkpoint without its suffix; `{step}` and `{epoch}` are filled in.
        monitor: logged metric that ranks the checkpoints, such as `val/loss`; the newest are kept when None.
        mode: whether a small (`min`) or a large (`max`) value of `monitor` is better.
        save_top_k: how many checkpoints to keep besides `last.ckpt`; -1 keeps all, 0 none.
        save_weights_only: leaves out the optimiser's and the loops' state; training cannot be continued from it.
        every_n_train_steps: optimiser steps between checkpoints.
        every_n_epochs: epochs between checkpoints; 1 when no interval is given.
        train_time_interval: time between checkpoints.
        save_on_train_epoch_end: save when an epoch ends rather than after validation; None decides by the trainer.
        verbose: report each checkpoint.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        filename: str = "step{step}",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 1,
        save_weights_only: bool = False,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: timedelta | None = None,
        save_on_train_epoch_end: bool | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            save_on_exception=True,
            save_weights_only=save_weights_only,
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            train_time_interval=train_time_interval,
            save_on_train_epoch_end=save_on_train_epoch_end,
            # one name, one file: a second `step100.ckpt` would be the same state
            enable_version_counter=False,
            verbose=verbose,
        )
        self._updating = False
        self._at_epoch_end = False
        self._last_step_in_last = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._updating = False
        self._last_step_in_last = trainer.global_step

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        self._updating = True

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # checkpoint callbacks run last, so every other callback has finished with this step
        self._updating = False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # a state saved here continues in the middle of an epoch; one saved after the loop has ended does not
        if trainer.global_step == trainer.max_steps:
            self._bring_last_up_to_date(trainer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._at_epoch_end = True
        try:
            super().on_train_epoch_end(trainer, pl_module)
        finally:
            self._at_epoch_end = False

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # a run that is continued from the end of an epoch with validation goes through the end of its last batch once
        # more, which would count the batch twice and shift the logged steps by one
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self._at_epoch_end and whole and trainer.enable_validation and "loops" in checkpoint:
            checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bring_last_up_to_date(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.sanity_checking or self._updating:
            return
        # saving is a collective operation: where one process of many raises, the others would wait for ever
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        if self._bring_last_up_to_date(trainer):
            rank_zero_info(f"{type(exception).__name__}: saved {self.last_model_path} at step {trainer.global_step}")

    @override
    def _save_last_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._last_step_in_last = trainer.global_step

    def _bring_last_up_to_date(self, trainer: pl.Trainer) -> bool:
        if getattr(trainer, "fast_dev_run", False) or trainer.global_step == self._last_step_in_last:
            return False
        # a monitored checkpoint of this step may still come after validation, so this save must not count as one
        counted = self._last_global_step_saved
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._last_global_step_saved = counted
        return True
