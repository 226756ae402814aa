"""Runs a module's validation a second time, inside the first, and collects what it logs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics import Metric


class LoggedValues:
    """Stands in for `LightningModule.log`: the mean over batches of each logged value, weighted by batch size."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}

    def log(self, name: str, value: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> None:
        """Take one value."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = float(batch_size or 1)
        value = torch.as_tensor(value).detach().double().cpu()
        self._sums[name] = self._sums.get(name, torch.zeros((), dtype=torch.float64)) + weight * value
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def log_dict(self, values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Take several values."""
        for name, value in values.items():
            self.log(name, value, *args, **kwargs)

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """Means over all batches and processes; metrics are reset, as the validation that follows begins anew."""
        means = {}
        for name, total in self._sums.items():
            mean = (total / self._weights[name]).float().to(trainer.strategy.root_device)
            means[name] = float(trainer.strategy.reduce(mean, reduce_op="mean"))
        for name, metric in self._metrics.items():
            means[name] = float(metric.compute())
            metric.reset()
        return means


@contextmanager
def logging_to(module: pl.LightningModule, log: Callable[..., None], log_dict: Callable[..., None]) -> Iterator[None]:
    """What `module` logs meanwhile goes to these functions."""
    # attributes of the object hide the methods of its class
    module.__dict__ |= {"log": log, "log_dict": log_dict}
    try:
        yield
    finally:
        del module.__dict__["log"], module.__dict__["log_dict"]


def batches(trainer: pl.Trainer) -> Iterator[tuple[Any, int, int]]:
    """Every validation batch on its device, its number, and its loader's number, within the trainer's limits."""
    loaders = trainer.val_dataloaders
    loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
    for index, (loader, limit) in enumerate(zip(loaders, trainer.num_val_batches, strict=True)):
        for number, batch in enumerate(loader):
            if number >= limit:
                break
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=index), number, index


@torch.no_grad()
def validate_once_more(trainer: pl.Trainer, pl_module: pl.LightningModule, *, suffix: str) -> dict[str, float]:
    """Validate now, and return what is logged with `suffix` after the first part of each name (`val_blend/loss`)."""
    logged = LoggedValues()
    several = isinstance(trainer.val_dataloaders, list | tuple) and len(trainer.val_dataloaders) > 1
    with logging_to(pl_module, logged.log, logged.log_dict):
        for batch, number, index in batches(trainer):
            with trainer.precision_plugin.val_step_context():
                pl_module.validation_step(batch, number, *([index] if several else []))
        pl_module.on_validation_epoch_end()
    values = logged.compute(trainer)
    return {renamed(name, suffix): value for name, value in values.items()}


def renamed(name: str, suffix: str) -> str:
    """A metric's name with a suffix after its first part.

    >>> renamed("val/loss", "_blend"), renamed("loss", "_blend")
    ('val_blend/loss', 'loss_blend')
    """
    split, slash, rest = name.partition("/")
    return split + suffix + slash + rest
