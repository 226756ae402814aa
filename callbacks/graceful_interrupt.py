"""Ctrl+C that lets the step in progress finish, so that what is saved can be continued exactly."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class GracefulInterrupt(Callback):
    """Turns the first Ctrl+C during training into the orderly stop that SIGTERM gets; the second one stops at once.

    Lightning raises KeyboardInterrupt wherever the process happens to be, in the middle of an optimiser's update too.
    SIGTERM it remembers until the step is done. With several processes nothing changes: their launcher forwards
    signals itself.

    Attributes:
        interrupted: whether Ctrl+C was pressed.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_interrupt)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self._restore()
        rank_zero_info("\nStopping after this step and saving; press Ctrl+C again to stop at once.")
        os.kill(os.getpid(), signal.SIGTERM)

    def _restore(self) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
