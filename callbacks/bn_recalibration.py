"""BatchNormRecalibration: running statistics of batch norms from the trained weights (SLAB, arXiv 2405.11582)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from .second_validation import logging_to


class BatchNormRecalibration(Callback):
    """Passes over the training data at the end of training that change nothing but running means and variances.

    The statistics that training leaves behind lag behind the weights and were taken with drop path and dropout on. Here
    everything is in evaluation but the batch norms. Runs after the last step and before the last validation and
    checkpoint; after training that ended early (patience, time), before the trainer lets go of the model, and then the
    newest checkpoint is written again.

    A batch is fed through the module's `recalibration_step(batch)` where it has one, else through `training_step`
    without its logging.

    Args:
        passes: passes over the training data (10 in the released code).
        max_batches: batches of a pass, per process; all by default.
        average: `exponential` with each norm's momentum, as in the released code, or `cumulative`, the plain mean over
            all batches from scratch.

    Raises:
        ValueError: a number below 1 or an unknown word; a model without batch norms.
    """

    def __init__(
        self,
        *,
        passes: int = 10,
        max_batches: int | None = None,
        average: Literal["exponential", "cumulative"] = "exponential",
    ) -> None:
        for name, value in (("passes", passes), ("max_batches", max_batches)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if average not in ("exponential", "cumulative"):
            raise ValueError(f"average {average!r} is not one of exponential, cumulative")
        self.passes, self.max_batches, self.average = passes, max_batches, average
        self._done = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = False
        if not batch_norms(pl_module):
            raise ValueError("BatchNormRecalibration needs a model with batch norms, this one has none; leave it out")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_step = 0 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.is_last_batch and trainer.max_epochs == trainer.current_epoch + 1
        if (last_step or last_epoch) and not self._done:
            self._recalibrate(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._done:
            return
        self._recalibrate(trainer, pl_module)
        for callback in trainer.checkpoint_callbacks:
            if newest := getattr(callback, "last_model_path", ""):
                trainer.save_checkpoint(newest)

    def _recalibrate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = True
        norms, passes, max_batches = batch_norms(pl_module), self.passes, self.max_batches
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            passes, max_batches = 1, 1
        before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        loader = plain_loader(trainer.train_dataloader, trainer)
        with torch.no_grad(), only_batch_norms_train(pl_module), logging_to(pl_module, _nowhere, _nowhere):
            if self.average == "cumulative":
                for norm in norms:
                    norm.reset_running_stats()
            momenta = [norm.momentum for norm in norms]
            try:
                for norm in norms:
                    norm.momentum = None if self.average == "cumulative" else norm.momentum
                for epoch in range(passes):
                    if isinstance(getattr(loader, "sampler", None), DistributedSampler):
                        loader.sampler.set_epoch(epoch)
                    self._pass(trainer, pl_module, islice(loader, max_batches))
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
            if trainer.world_size > 1:
                average_over_processes(trainer, norms)
        moved = [
            float((norm.running_mean - mean).div(variance.sqrt().clamp_min(1e-12)).square().mean().sqrt())
            for norm, (mean, variance) in zip(norms, before, strict=True)
        ]
        rank_zero_info(
            f"{len(norms)} batch norms recalibrated in {passes} passes: means moved by {max(moved):.3f} standard "
            f"deviations at most (RMS over channels)"
        )

    def _pass(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batches: Iterable[Any]) -> None:
        step: Any = getattr(pl_module, "recalibration_step", None)
        for number, batch in enumerate(batches):
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                step(batch) if step is not None else pl_module.training_step(batch, number)


def batch_norms(module: nn.Module) -> list[Any]:
    """The batch norms with running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


@contextmanager
def only_batch_norms_train(module: nn.Module) -> Iterator[None]:
    """Evaluation for everything but batch norms; the earlier modes come back."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    for part in batch_norms(module):
        part.training = True
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _nowhere(*args: Any, **kwargs: Any) -> None:
    return None


def plain_loader(loader: Any, trainer: pl.Trainer) -> Any:
    """A loader over the same data that shares no position with the one that training may be continued from."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    sampler: Any = RandomSampler(loader.dataset, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    if trainer.world_size > 1:
        sampler = DistributedSampler(
            loader.dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, drop_last=True
        )
    # a last batch of one token would have no variance, and any small one counts as much as a full one
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        drop_last=len(sampler) >= loader.batch_size,
    )


def average_over_processes(trainer: pl.Trainer, norms: list[Any]) -> None:
    """Statistics of all processes' tokens from each process's own: the variance of means is part of the variance."""

    def mean_of(value: Tensor) -> Any:
        return trainer.strategy.reduce(value.clone(), reduce_op="mean")

    for norm in norms:
        mean, square = mean_of(norm.running_mean), mean_of(norm.running_var + norm.running_mean.square())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp_min(0))
