"""Random numbers that depend on the step alone, so that a continued run draws what an uninterrupted one draws."""

import hashlib
import os
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import Callback
from typing_extensions import override


class StepSeed(Callback):
    """Seeds torch, numpy and Python before each training batch from the run's seed, the process and the batch's number.

    Lightning's checkpoints hold no state of the random number generators. Saving that state would not be enough:
    what runs when a run is continued (setting up loaders, finishing a validation) draws numbers too. Seeds made of
    the batch's number need no state, and each process has its own.

    Args:
        seed: the run's seed; the one of `seed_everything` when None.
    """

    def __init__(self, *, seed: int | None = None) -> None:
        self.seed = seed

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed
        key = f"{seed}/{trainer.global_rank}/{trainer.fit_loop.total_batch_idx}"
        number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        torch.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)
