"""An optimiser that steps only the rows of a table that a batch has used; AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...kernels.hash_gather import coalesced

RowRule = Literal["lazy_adam", "rowwise_adam", "rowwise_adagrad"]
# moments that a rule keeps beside a table of H columns, in values per value
STATE_VALUES: dict[RowRule, int] = {"lazy_adam": 2, "rowwise_adam": 1, "rowwise_adagrad": 0}
_CHUNK_VALUES = 2**16


class RowWiseOptimizer(torch.optim.Optimizer):
    """AdamW; in groups with a `row_rule`, only rows with a gradient are read and written, moments included.

    `lazy_adam`: Adam whose rows without a gradient stand still, moments and all (`torch.optim.SparseAdam`; epsilon and
    decoupled decay are AdamW's, so that it is AdamW where every row has a gradient). `rowwise_adam`: the same with one
    second moment per row, of the mean square over its columns (FBGEMM's PARTIAL_ROWWISE_ADAM). `rowwise_adagrad`: no
    first moment, and per row the sum of those mean squares (FBGEMM's EXACT_ROWWISE_ADAGRAD). Bias correction counts all
    steps of the table, not those of a row. Weight decay reaches rows only in steps that use them.

    Gradients may be sparse (the rows they hold are stepped) or dense (rows that are not all zero).

    Args:
        params: parameter groups; `row_rule` in one makes it a group of tables (R, H).
        lr: learning rate of groups that have none.
        betas: of Adam.
        eps: of Adam and Adagrad.
        weight_decay: of groups that have none.
        fused: of AdamW.

    Raises:
        ValueError: an unknown rule, or a tensor in such a group that is no matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        fused: bool = False,
    ) -> None:
        groups = [{"row_rule": None, **group, "params": list(group["params"])} for group in params]
        for group in groups:
            if group["row_rule"] not in (None, *get_args(RowRule)):
                raise ValueError(f"row_rule {group['row_rule']!r} is not one of {', '.join(get_args(RowRule))}")
            shapes = [tuple(p.shape) for p in group["params"] if group["row_rule"] and p.dim() != 2]
            if shapes:
                raise ValueError(f"row_rule {group['row_rule']!r} is for tables (rows, columns), got {shapes[0]}")
        defaults: dict[str, Any] = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        dense = [group for group in groups if not group["row_rule"]]
        # it steps groups and state of ours; on its own it holds nothing
        self._adamw = torch.optim.AdamW(dense, **defaults, fused=fused) if dense else None
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._adamw is not None:
            # loading a state replaces both
            self._adamw.param_groups = [group for group in self.param_groups if not group["row_rule"]]
            self._adamw.state = self.state
            self._adamw.step()
        for group in self.param_groups:
            for table in group["params"] if group["row_rule"] else ():
                if table.grad is not None:
                    self._step_rows(table, *used_rows(table.grad), group)
        return loss

    def _step_rows(self, table: Tensor, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        rule, state = group["row_rule"], self.state[table]
        if not state:
            state["step"] = torch.tensor(0.0)
            if rule != "rowwise_adagrad":
                state["exp_avg"] = torch.zeros_like(table)
            if rule == "lazy_adam":
                state["exp_avg_sq"] = torch.zeros_like(table)
            else:
                name = "sum" if rule == "rowwise_adagrad" else "exp_avg_sq"
                state[name] = table.new_zeros(len(table), 1)
        state["step"] += 1
        step = state["step"].item()
        # on a CPU a few rows at a time, whose copies stay in a core's cache
        size = max(1, _CHUNK_VALUES // max(1, table.shape[1])) if table.device.type == "cpu" else max(1, len(rows))
        for some, part in zip(rows.split(size), grad.split(size), strict=True):
            _step_some(table, some, part, state, group, step)


def _step_some(
    table: Tensor, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: float
) -> None:
    rule, (beta1, beta2) = group["row_rule"], group["betas"]
    values = table.index_select(0, rows).mul_(1 - group["lr"] * group["weight_decay"])
    if rule == "rowwise_adagrad":
        total = state["sum"].index_select(0, rows).add_(grad.square().mean(1, keepdim=True))
        state["sum"].index_copy_(0, rows, total)
        values.addcdiv_(grad, total.sqrt_().add_(group["eps"]), value=-group["lr"])
    else:
        square = grad.square() if rule == "lazy_adam" else grad.square().mean(1, keepdim=True)
        first = state["exp_avg"].index_select(0, rows).lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].index_select(0, rows).mul_(beta2).add_(square, alpha=1 - beta2)
        state["exp_avg"].index_copy_(0, rows, first)
        state["exp_avg_sq"].index_copy_(0, rows, second)
        scale = second.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        values.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))
    table.index_copy_(0, rows, values)


def used_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (U,) of a gradient (R, H) and their values (U, H): those that a sparse one holds, or that are not zero."""
    if grad.is_sparse:
        grad = coalesced(grad)
        return grad.indices()[0], grad.values()
    rows = (grad != 0).any(1).nonzero().squeeze(1)
    return rows, grad.index_select(0, rows)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float, algorithm: Literal["norm", "value"]) -> Tensor | None:
    """`clip_grad_norm_` and `clip_grad_value_` of `torch.nn.utils`, for sparse gradients and several meshes too.

    Sparse ones are coalesced: parts of a row from several micro-batches count as their sum.

    Returns:
        The norm before, None for `value`.
    """
    parts: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = coalesced(parameter.grad)
        part = parameter.grad.values() if parameter.grad.is_sparse else parameter.grad
        parts.setdefault(part.device_mesh if isinstance(part, DTensor) else None, []).append(part)
    if algorithm == "value":
        for part in (part for some in parts.values() for part in some):
            part.clamp_(-limit, limit)
        return None
    # torch sums up tensors of one mesh only
    norms = [torch.nn.utils.get_total_norm(some) for some in parts.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.nn.utils.get_total_norm(norms)
    for part in (part for some in parts.values() for part in some):
        part.mul_(float((limit / (total + 1e-6)).clamp(max=1.0)))
    return total
