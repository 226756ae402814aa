"""Batch statistics over several processes, and whether a forward pass is a recomputation."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce


def in_backward_pass() -> bool:
    """Whether this code runs inside a backward pass, as the second forward of activation checkpointing does."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = value.clone()
        all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total = grads[0].contiguous().clone()
        all_reduce(total, group=ctx.group)
        return total, None


def shared_statistics(x: Tensor, keep: Tensor | None, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the tokens of all processes, and their number.

    Args:
        x: (tokens, C) of this process.
        keep: (tokens,) bool, False at padding, or None.
        group: the process group.

    Returns:
        (C,), (C,) and a scalar, in float32 or float64; gradients reach `x` on every process.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    values = x.to(dtype)
    weight = torch.ones(len(x), 1, dtype=dtype, device=x.device) if keep is None else keep.to(dtype).unsqueeze(1)
    # where, not a product: padding may hold anything
    kept = values if keep is None else torch.where(keep.unsqueeze(1), values, 0.0)
    totals = _SumOverProcesses.apply(torch.cat([kept.sum(0), weight.sum().unsqueeze(0)]), group)
    count = totals[-1].detach().clamp_min(1)
    mean = totals[:-1] / count
    centred = values - mean if keep is None else torch.where(keep.unsqueeze(1), values - mean, 0.0)
    variance = _SumOverProcesses.apply(centred.square().sum(0), group) / count
    return mean, variance, count
