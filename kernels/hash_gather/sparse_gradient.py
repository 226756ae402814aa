"""Weighted gather whose gradient holds only the rows that were used, for tables of which a step reaches a part."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..weighted_gather import Segments, cpu_weighted_gather


def _path(backend: str) -> Any:
    if backend == "cpu":
        return cpu_weighted_gather
    from ..weighted_gather import triton_weighted_gather

    return triton_weighted_gather


def sparse_table_gradient(
    grad: Tensor, table: Tensor, rows: Tensor, weights: Tensor, backend: Literal["cpu", "triton"]
) -> Tensor:
    """Gradient (R, H) of the table for outputs' gradients (T, H): a COO tensor of the rows that are used, ascending.

    Autograd drops the mark that it is coalesced; `coalesced` puts it back without sorting again.

    Every row is summed in a fixed order and written once, so that two runs give the same bits. On a GPU it waits for
    the device: the number of rows is the tensor's size.

    Args:
        grad: (T, H).
        table: (R, H); only its shape and type matter.
        rows: (T, K) int64.
        weights: (T, K).
        backend: whose kernel sums.
    """
    values, order = rows.reshape(-1).sort(stable=True)
    used, counts = torch.unique_consecutive(values, return_counts=True)
    offsets = torch.zeros(len(used) + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    # the kernels ask a table for nothing but its shape and type
    shape = table[:1].expand(len(used), -1)
    sums = _path(backend).grad_table(grad, shape, weights, Segments(order, offsets), grouped=False)
    return torch.sparse_coo_tensor(used.unsqueeze(0), sums, table.shape, is_coalesced=True, check_invariants=False)


def coalesced(grad: Tensor) -> Tensor:
    """`grad.coalesce()`, at the price of a look at the indices where each row occurs once and they ascend."""
    if not grad.is_coalesced() and grad.sparse_dim() == 1 and bool((grad._indices()[0].diff() > 0).all()):
        return torch.sparse_coo_tensor(
            grad._indices(), grad._values(), grad.shape, is_coalesced=True, check_invariants=False
        )
    return grad.coalesce()


class _SparseWeightedGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor, backend: Literal["cpu", "triton"]) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        ctx.backend = backend
        return _path(backend).forward(table, rows, weights, grouped=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, rows, weights = ctx.saved_tensors
        needs_table, _, needs_weights, _ = ctx.needs_input_grad
        grad_table = sparse_table_gradient(grad, table, rows, weights, ctx.backend) if needs_table else None
        grad_weights = None
        if needs_weights:
            grad_weights = _path(ctx.backend).grad_weights(grad, table, rows, weights, grouped=False)
        return grad_table, None, grad_weights, None


def weighted_gather_sparse_grad(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """`weighted_gather` whose gradient for the table is sparse, as that of `nn.Embedding(sparse=True)`.

    Optimisers for it: `torch.optim.SparseAdam`, `Adagrad`, `SGD`, and the rules of `RowWiseOptimizer`.

    Args:
        table: (R, H) rows, floating point.
        rows: (..., K) int64 in [0, R).
        weights: (..., K), floating point.

    Returns:
        (..., H) in the table's dtype.

    Raises:
        ValueError: the tensors are neither on the CPU nor on CUDA, or on the CPU a row is out of range.
    """
    device = table.device.type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"sparse gradients need tensors on the CPU or on CUDA, these are on {table.device}")
    flat = rows.reshape(-1, rows.shape[-1])
    with torch.autocast(device, enabled=False):
        out = _SparseWeightedGather.apply(
            table, flat, weights.reshape(flat.shape), "cpu" if device == "cpu" else "triton"
        )
    return out.view(*rows.shape[:-1], table.shape[1])
