"""Norms of SLAB (arXiv 2405.11582): RepBN, and its progressive blend with the norm that it replaces."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from .statistics import in_backward_pass, shared_statistics

Initialisation = Literal["vision", "language"]
# scale and shift of the batch norm, and weight of the identity, before training (released vision and LLaMA code)
INITIAL_VALUES: dict[str, tuple[float, float, float]] = {"vision": (1.0, 0.0, 1.0), "language": (0.0, 0.0, 0.0)}


class RepBatchNorm(nn.Module):
    """`batch_norm(x) + eta * x` with one learnable eta per layer (arXiv 2405.11582, section 3.2).

    Statistics are taken over all tokens of the batch, and in evaluation the norm is one multiplication and one addition
    per channel, `affine()`, which a following linear layer can take over.

    Whether batch statistics are used and updated is decided by `self.bn.training`, so that code that knows nothing
    but torch's batch norms (recalibration, freezing) works on it. `nn.SyncBatchNorm.convert_sync_batchnorm` and
    Lightning's `sync_batchnorm` make the statistics those of all processes, on CPUs too.

    In a causal language model the statistics of a training batch include later tokens: a leak that is gone in
    evaluation.

    Args:
        num_features: channels, C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for the plain average over batches.
        initial: `vision` starts at a normalised input plus the input (scale 1, eta 1), `language` at zero (scale 0,
            eta 0), as the released vision and LLaMA code do.
        eta: start value of eta in place of that; 0 with `learn_eta=False` makes a plain batch norm.
        learn_eta: train eta.

    Attributes:
        token_mask: (B, T, ...) with 0 at padding, left out of the statistics; the leading dimensions of the input.

    Raises:
        ValueError: an unknown start.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        initial: Initialisation = "vision",
        eta: float | None = None,
        learn_eta: bool = True,
    ) -> None:
        super().__init__()
        if initial not in INITIAL_VALUES:
            raise ValueError(f"initial {initial!r} is not one of {', '.join(INITIAL_VALUES)}")
        scale, shift, identity = INITIAL_VALUES[initial]
        self._initial = (scale, shift, identity if eta is None else eta)
        self.bn: nn.Module = nn.BatchNorm1d(num_features, eps=eps, momentum=momentum)
        self.eta = nn.Parameter(torch.empty(1), requires_grad=learn_eta)
        self.token_mask: Tensor | None = None
        self.initialise()

    @torch.no_grad()
    def initialise(self, initializer_range: float = 0.0) -> None:
        """Set the start values; the argument is the decoder's and has no effect here."""
        bn: Any = self.bn
        scale, shift, eta = self._initial
        # these leave alone what transformers has already loaded
        initialization.constant_(bn.weight, scale)
        initialization.constant_(bn.bias, shift)
        initialization.constant_(self.eta, eta)
        if bn.running_mean is not None:
            # a folder without this norm leaves them as they lie in memory
            initialization.zeros_(bn.running_mean)
            initialization.ones_(bn.running_var)
            initialization.zeros_(bn.num_batches_tracked)

    @property
    def num_features(self) -> int:
        """Channels, C."""
        return self.bn.num_features  # type: ignore[return-value]

    def affine(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """The vectors a and b, each (C,), of `norm(x) == a * x + b` in evaluation, in `dtype` or the weights' own."""
        bn: Any = self.bn
        if bn.running_mean is None:
            raise ValueError(
                "this batch norm keeps no running statistics, so it has no fixed form; recalibrate it first"
            )
        weight, bias, eta, mean, variance = (
            value if dtype is None else value.to(dtype)
            for value in (bn.weight, bn.bias, self.eta, bn.running_mean, bn.running_var)
        )
        scale = weight * torch.rsqrt(variance + bn.eps)
        return scale + eta, bias - scale * mean

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C).

        Raises:
            ValueError: batch statistics of fewer than two tokens, or a mask of another shape.
        """
        if not self.bn.training:
            scale, shift = self.affine()
            return torch.addcmul(shift, x, scale).to(x.dtype)
        return (self._batch_norm(x) + self.eta * x).to(x.dtype)

    def _batch_norm(self, x: Tensor) -> Tensor:
        bn: Any = self.bn
        flat = x.reshape(-1, x.shape[-1])  # (tokens, C)
        # activation checkpointing runs the forward pass a second time: that batch has been counted
        update = not in_backward_pass()
        shared = isinstance(bn, nn.SyncBatchNorm) and torch.distributed.is_initialized()
        keep = self._kept_tokens(x)
        if not shared:
            tokens = flat if keep is None else flat[keep]
            if len(tokens) < 2:
                raise ValueError(
                    f"a batch norm in training got {len(tokens)} token (padding aside), its variance needs at least 2; "
                    f"use a larger batch, or eval() for single tokens"
                )
            normed = self._native(bn, tokens, update)
            if keep is None:
                return normed.view(x.shape)
            # padding is read by nobody; it stays finite
            return torch.zeros_like(flat, dtype=normed.dtype).masked_scatter(keep[:, None], normed).view(x.shape)
        mean, variance, count = shared_statistics(flat, keep, bn.process_group)
        if update:
            self._update(bn, mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        normed = (flat.to(mean.dtype) - mean) * torch.rsqrt(variance + bn.eps)
        return (normed * bn.weight + bn.bias).to(x.dtype).view(x.shape)

    @staticmethod
    def _native(bn: Any, tokens: Tensor, update: bool) -> Tensor:
        factor = bn.momentum
        if update:
            bn.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(bn.num_batches_tracked)
        mean, variance = bn.running_mean, bn.running_var
        if not update and mean is not None:
            # what is saved for the backward pass must look the same in both passes
            mean, variance = mean.clone(), variance.clone()
        return F.batch_norm(tokens, mean, variance, bn.weight, bn.bias, True, factor or 0.0, bn.eps)

    @staticmethod
    @torch.no_grad()
    def _update(bn: Any, mean: Tensor, variance: Tensor) -> None:
        bn.num_batches_tracked.add_(1)
        factor = bn.momentum if bn.momentum is not None else 1.0 / float(bn.num_batches_tracked)
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), factor)
        bn.running_var.lerp_(variance.to(bn.running_var.dtype), factor)

    def _kept_tokens(self, x: Tensor) -> Tensor | None:
        """(tokens,) bool, or None where nothing is masked."""
        mask = self.token_mask
        if mask is None:
            return None
        if mask.shape != x.shape[: mask.dim()] or mask.dim() >= x.dim():
            raise ValueError(
                f"the token mask is {tuple(mask.shape)}, the norm's input {tuple(x.shape)}; a mask has the input's "
                f"leading dimensions, and set_token_mask(model, None) takes it away"
            )
        mask = mask.bool()
        return mask.reshape(*mask.shape, *(1,) * (x.dim() - 1 - mask.dim())).expand(x.shape[:-1]).reshape(-1)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_features}"


class _ZeroGradients(torch.autograd.Function):
    """The first argument; the others get zero gradients, so that no process waits for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class ProgressiveNorm(nn.Module):
    """`lambda * old_norm(x) + (1 - lambda) * new_norm(x)` in training, `new_norm(x)` in evaluation (PRepBN).

    arXiv 2405.11582, section 3.2; the released code calls it LinearNorm. Lambda is a buffer that a schedule writes
    (`PRepBNSchedule`). deviation: the released code counts forward passes in each layer, which activation
    checkpointing and gradient accumulation change; here it is the optimiser step that counts.

    Args:
        old_norm: the norm that is faded out; None for one that is already gone.
        new_norm: the norm that stays.

    Attributes:
        blend: lambda, a float32 scalar from 1 (only the old norm) to 0.
        warming: bool scalar; while true the new norm is not evaluated and sees no batch.
        evaluate_blend: show the blend in evaluation too.
        record_gap: keep the relative distance of the two norms' outputs, `||new - old|| / ||old||`, in `branch_gap`.
        config: a configuration whose `norm_options` are told when the old norm goes.
    """

    blend: Tensor
    warming: Tensor

    def __init__(self, old_norm: nn.Module | None, new_norm: RepBatchNorm) -> None:
        super().__init__()
        self.old_norm, self.new_norm = old_norm, new_norm
        self.register_buffer("blend", torch.tensor(0.0 if old_norm is None else 1.0))
        self.register_buffer("warming", torch.tensor(False))
        self.evaluate_blend = False
        self.record_gap = False
        self.branch_gap: Tensor | None = None
        self.config: Any = None
        # lambda and warming as Python values: reading the buffers would wait for the device in every pass
        self._host: tuple[float, bool] | None = None
        # what a pass has to know of them; compiled code would be made anew for every value of lambda
        self._stage: Literal["warming", "blend", "new"] | None = None

    @torch.no_grad()
    def initialise(self, initializer_range: float = 0.0) -> None:
        """Set the buffers' start values; the argument is the decoder's and has no effect here."""
        initialization.constant_(self.blend, 0.0 if self.old_norm is None else 1.0)
        initialization.constant_(self.warming, False)

    def set_blend(self, value: float, *, warming: bool = False) -> None:
        """Set lambda, 0 to 1.

        Raises:
            ValueError: it is out of range, or above 0 without an old norm.
        """
        if not 0.0 <= value <= 1.0 or math.isnan(value):
            raise ValueError(f"lambda {value} is not between 0 and 1")
        if value > 0 and self.old_norm is None:
            raise ValueError(f"lambda {value} needs the old norm, which this layer has dropped; train a new model")
        with torch.no_grad():
            self.blend.fill_(value)
            self.warming.fill_(warming)
        self._host = (value, warming)
        self._stage = "warming" if warming else "new" if value == 0.0 else "blend"

    def blend_state(self) -> tuple[float, bool]:
        """Lambda, and whether the new norm still waits."""
        if self._host is None:
            self.set_blend(float(self.blend), warming=bool(self.warming))
        assert self._host is not None
        return self._host

    def drop_old_norm(self) -> list[nn.Parameter]:
        """Remove the old norm and return its parameters; lambda must be 0."""
        value, _ = self.blend_state()
        if value != 0.0:
            raise ValueError(f"lambda is {value:.4g}: the old norm is still in use; finish the schedule first")
        removed = [] if self.old_norm is None else list(self.old_norm.parameters())
        self.old_norm = None
        if self.config is not None:
            # saved models are then built without it
            self.config.norm_options = {**(self.config.norm_options or {}), "old_norm": None}
        return removed

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        old_norm = self.old_norm
        if old_norm is None or not (self.training or self.evaluate_blend):
            return self.new_norm(x)
        if self._stage is None:
            self.blend_state()
        if self._stage == "warming":
            y = old_norm(x)
            return _ZeroGradients.apply(y, *self._trained(self.new_norm)) if torch.is_grad_enabled() else y
        if self._stage == "new":
            y = self.new_norm(x)
            return _ZeroGradients.apply(y, *self._trained(old_norm)) if torch.is_grad_enabled() else y
        old, new = old_norm(x), self.new_norm(x)
        if self.record_gap:
            with torch.no_grad():
                self.branch_gap = (new.float() - old.float()).norm() / old.float().norm().clamp_min(1e-12)
        # sixteen bits do not hold 1 - 1/T. A copy: the schedule may write before a later backward pass reads it
        dtype = torch.promote_types(old.dtype, torch.float32)
        weight = self.blend.to(dtype, copy=True)
        return (weight * old.to(dtype) + (1 - weight) * new.to(dtype)).to(x.dtype)

    @staticmethod
    def _trained(norm: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in norm.parameters() if parameter.requires_grad]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # a checkpoint from after the end of the schedule has no old norm
        if self.old_norm is not None and not any(key.startswith(f"{prefix}old_norm.") for key in state_dict):
            stored = state_dict.get(f"{prefix}blend")
            if stored is not None and float(stored) == 0.0:
                self.set_blend(0.0)
                self.drop_old_norm()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._host = self._stage = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.blend
        super()._apply(fn, recurse)
        if self.blend.dtype != before.dtype:
            # sixteen bits would round lambda
            self.blend = before.to(self.blend.device)
        return self
