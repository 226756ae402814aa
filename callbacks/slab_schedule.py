"""PRepBNSchedule: lambda of progressive norms from the optimiser step (SLAB, arXiv 2405.11582)."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from .second_validation import validate_once_more

Decay = Literal["linear", "cosine"]


def blend_at(step: int, *, warmup_steps: int, decay_steps: int, decay: Decay = "linear") -> float:
    """Lambda of the given optimiser step, counted from 0: 1 at the first one after warm-up, 0 `decay_steps` later.

    >>> [blend_at(s, warmup_steps=2, decay_steps=4) for s in (0, 2, 3, 5, 6, 9)]
    [1.0, 1.0, 0.75, 0.25, 0.0, 0.0]
    """
    progress = min(1.0, max(0, step - warmup_steps) / decay_steps)
    return 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


class PRepBNSchedule(Callback):
    """Moves every progressive norm from its old norm to its batch norm while the model trains.

    Lambda is set before each training batch from the number of optimiser steps taken, so that neither gradient
    accumulation nor activation checkpointing changes it, all layers and processes have the same, and a continued run
    goes on where it was. During warm-up the batch norms see nothing. When lambda reaches 0 the old norms are removed
    from the model, from the optimiser and, under DDP, from what gradients are waited for; under strategies that shard
    parameters they stay where they are, unused, and fusing leaves them out.

    Logged at the trainer's log steps: `prepbn/lambda`; over layers `prepbn/branch_gap` and `prepbn/branch_gap_max`
    (distance of the two norms' outputs relative to the old one's; nan outside the blend), `prepbn/eta`,
    `prepbn/scale_rms`, `prepbn/running_std_min` and `prepbn/running_std_max`.

    Args:
        warmup_steps: optimiser steps with the old norm alone.
        decay_steps: optimiser steps from lambda 1 to 0, T; by default `decay_share` of the steps after warm-up.
        decay_share: see `decay_steps`; the authors advise a schedule that ends well before training does and found
            four fifths of all steps to work where a shorter one diverged.
        decay: `linear` (the paper's), or `cosine`, which moves slowly at both ends.
        validate: what validation shows while lambda is above 0: the batch norms alone (`bn`, the paper's evaluation),
            the blend (`blend`), or `both`, the blend under names with `_blend` after the split: `val_blend/loss`.

    Raises:
        ValueError: a number out of range or an unknown word; a model without progressive norms; a trainer without an
            end to take a share of.
    """

    def __init__(
        self,
        *,
        warmup_steps: int = 0,
        decay_steps: int | None = None,
        decay_share: float = 0.8,
        decay: Decay = "linear",
        validate: Literal["bn", "blend", "both"] = "bn",
    ) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps {warmup_steps} is below 0")
        if decay_steps is not None and decay_steps < 1:
            raise ValueError(f"decay_steps {decay_steps} is below 1; leave the callback out to start with batch norms")
        if not 0 < decay_share <= 1:
            raise ValueError(f"decay_share {decay_share} is not above 0 and at most 1")
        if decay not in ("linear", "cosine"):
            raise ValueError(f"decay {decay!r} is not one of linear, cosine")
        if validate not in ("bn", "blend", "both"):
            raise ValueError(f"validate {validate!r} is not one of bn, blend, both")
        self.warmup_steps, self.decay_steps, self.decay_share = warmup_steps, decay_steps, decay_share
        self.decay, self.validate = decay, validate
        # T as resolved at the first start, which a continued run keeps
        self._resolved: int | None = None
        self._norms: list[Any] = []
        self._ended = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"decay_steps": self._resolved, "warmup_steps": self.warmup_steps, "decay": self.decay}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        asked = {"decay_steps": self.decay_steps, "warmup_steps": self.warmup_steps, "decay": self.decay}
        for name, value in asked.items():
            if value is not None and value != state_dict[name]:
                rank_zero_warn(f"{name} {value} differs from the checkpoint's {state_dict[name]}; {value} counts now")
        self._resolved = self.decay_steps or state_dict["decay_steps"]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._norms = progressive_norms(pl_module)
        if not self._norms:
            raise ValueError(
                "PRepBNSchedule needs a model with progressive norms, this one has none; set `norm: prepbn`, call "
                "replace_norms, or leave the callback out"
            )
        self._ended = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        if self._resolved is None:
            if self.decay_steps is None and not math.isfinite(total):
                raise ValueError("the trainer has no end to take decay_share of; set decay_steps, or max_steps")
            self._resolved = self.decay_steps or max(1, round(self.decay_share * (total - self.warmup_steps)))
        end = self.warmup_steps + self._resolved
        if math.isfinite(total) and end >= total and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"lambda reaches 0 at step {end}, training ends after {total:.0f}: the old norms stay in use, "
                f"evaluation shows batch norms that were never trained alone, and the model can't be fused; shorten "
                f"decay_steps ({self._resolved}) or warmup_steps ({self.warmup_steps}), or train longer"
            )

    def blend_at(self, step: int) -> float:
        """Lambda of an optimiser step."""
        assert self._resolved is not None
        return blend_at(step, warmup_steps=self.warmup_steps, decay_steps=self._resolved, decay=self.decay)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._ended:
            return
        step = trainer.global_step
        value, warming = self.blend_at(step), step < self.warmup_steps
        record = (step + 1) % log_interval(trainer) == 0
        for norm in self._norms:
            norm.set_blend(value if norm.old_norm is not None else 0.0, warming=warming)
            norm.record_gap = record
        if value == 0.0:
            self._ended = True
            if any(norm.old_norm is not None for norm in self._norms):
                drop_old_norms(trainer, self._norms)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % log_interval(trainer) == 0:
            pl_module.log_dict(branch_statistics(self._norms), on_step=True, on_epoch=False)

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        norms = progressive_norms(pl_module)
        blending = any(norm.blend_state()[0] > 0 for norm in norms)
        if trainer.sanity_checking or not blending or self.validate == "bn":
            return
        if self.validate == "blend":
            for norm in norms:
                norm.evaluate_blend = True
            return
        with showing_blend(norms):
            values = validate_once_more(trainer, pl_module, suffix="_blend")
        pl_module.log_dict(values, sync_dist=True)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for norm in progressive_norms(pl_module):
            norm.evaluate_blend = False


def progressive_norms(module: nn.Module) -> list[Any]:
    """Every module that lambda can be set on."""
    return [part for part in module.modules() if hasattr(part, "set_blend") and hasattr(part, "drop_old_norm")]


def log_interval(trainer: Any) -> int:
    """Optimiser steps between logged values; 1 where logging is off."""
    return int(trainer.log_every_n_steps) or 1


@contextmanager
def showing_blend(norms: list[Any]) -> Iterator[None]:
    """Evaluate the blend in place of the batch norms."""
    for norm in norms:
        norm.evaluate_blend = True
    try:
        yield
    finally:
        for norm in norms:
            norm.evaluate_blend = False


def drop_old_norms(trainer: pl.Trainer, norms: list[Any]) -> None:
    """Take the old norms out of the model and the optimisers, where the strategy allows it."""
    strategy = trainer.strategy
    if type(strategy) is not SingleDeviceStrategy and not isinstance(strategy, DDPStrategy):
        rank_zero_info(f"{type(strategy).__name__} holds the parameters: the old norms stay in the model, unused")
        return
    removed = {id(parameter) for norm in norms for parameter in norm.drop_old_norm()}
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in removed]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in removed]
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        # the reducer waits for the parameters that it was built with
        strategy.model = strategy.model.module
        strategy.configure_ddp()
    rank_zero_info(f"lambda is 0 at step {trainer.global_step}: the old norms are gone")


def branch_statistics(norms: list[Any]) -> dict[str, float]:
    """What the schedule logs."""
    new: list[Any] = [norm.new_norm for norm in norms]
    values = {"prepbn/lambda": max(norm.blend_state()[0] for norm in norms)}
    gaps = [norm.branch_gap for norm in norms if norm.branch_gap is not None and norm.blend_state()[0] > 0]
    # a value that is left out would be repeated by the loggers
    values["prepbn/branch_gap"] = _over(gaps, torch.mean) if gaps else math.nan
    values["prepbn/branch_gap_max"] = _over(gaps, torch.max) if gaps else math.nan
    values["prepbn/eta"] = _over([norm.eta.detach().mean() for norm in new], torch.mean)
    values["prepbn/scale_rms"] = _over([norm.bn.weight.detach().square().mean().sqrt() for norm in new], torch.mean)
    values["prepbn/running_std_min"] = _over([norm.bn.running_var.min().sqrt() for norm in new], torch.min)
    values["prepbn/running_std_max"] = _over([norm.bn.running_var.max().sqrt() for norm in new], torch.max)
    return values


def _over(values: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> float:
    return float(reduce(torch.stack([value.float() for value in values])))
