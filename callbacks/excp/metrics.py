"""What each save became, in the trainer's loggers."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from .checkpoint_io import ExCPCheckpointIO, SaveEvent


class ExCPMetrics(Callback):
    """Logs ratio, errors and times of the saves of `ExCPCheckpointIO`, at the step that was saved.

    `ckpt/ratio` (raw bytes over coded ones), `ckpt/error_over_step` (stored against true weights over the step since
    the last save), `ckpt/first_update_ratio` (largest first Adam update after a resume over the exact one),
    `ckpt/blocked_s`, `ckpt/encode_s`, `ckpt/file_bytes`, `ckpt/key_frame` and more. `tenfold fit` adds it by itself.

    Args:
        verbose: a line for each save, too.
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._log(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, ExCPCheckpointIO):
            # the last save is made when training has ended
            io.wait()
        self._log(trainer)

    def _log(self, trainer: pl.Trainer) -> None:
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, ExCPCheckpointIO):
            return
        for event in io.take_events():
            for logger in trainer.loggers:
                # an alias repeats the save before it, which has been logged
                if not event.alias:
                    logger.log_metrics(event.metrics(), step=trainer.global_step if event.step is None else event.step)
            if self.verbose:
                rank_zero_info(_line(event))


def _line(event: SaveEvent) -> str:
    if event.alias:
        return f"ExCP: {event.path.name} repeats the save before it, {event.file_bytes:,} bytes"
    report = event.report
    kind = "key frame" if event.key_frame else f"error {report.total.error_over_step:.3f} of the step"
    return (
        f"ExCP: {event.path.name} is {report.ratio:.1f} times smaller ({event.file_bytes:,} bytes, {kind}; training "
        f"waited {event.blocked_s:.3f} s, coding took {event.encode_s:.1f} s)"
    )
