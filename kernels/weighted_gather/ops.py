"""The public ops: they check their arguments, pick a path and define the gradients."""

import math
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal

import torch

from . import cpu_weighted_gather
from .reference import weighted_gather_groups_reference, weighted_gather_reference
from .segments import Segments, check_range, sort_segments

Backend = Literal["triton", "cpu", "reference"]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def weighted_gather(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    backend: Backend | None = None,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Weighted sum of table rows: `out[t] = sum_m weights[t, m] * table[indices[t, m]]`.

    Gradients reach `table` and `weights`; the one for the table is dense and deterministic. Sums run in float32, for
    float64 tables in float64; the result has the table's dtype. The weights may have another dtype than the table (a
    float32 softmax over a bfloat16 table): they enter the sum unrounded, and their gradient has their dtype.
    Autocast leaves the op's dtypes alone.

    Args:
        table: (R, H) rows, floating point.
        indices: (..., M) row numbers in [0, R), any integer dtype.
        weights: (..., M) factors, floating point, the same shape as `indices`.
        backend: `triton` (CUDA, or any device under Triton's interpreter), `cpu`, or `reference` (plain torch).
            Default: `triton` on CUDA where Triton is installed, `cpu` on the CPU, else `reference`.
        segments: `sort_segments(indices, R)`, when the caller shares one sort between several calls.

    Returns:
        (..., H) in the table's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes, devices or the backend do not fit, or on the CPU an index is out of range. On CUDA
            indices are not checked.
    """
    if table.dim() != 2:
        raise ValueError(f"table must be (R, H), got {tuple(table.shape)}")
    if indices.shape != weights.shape or indices.dim() == 0:
        raise ValueError(
            f"indices and weights must both be (..., M), got {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    return _call(table, indices, weights, backend, segments, grouped=False)


def weighted_gather_groups(
    table: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    backend: Backend | None = None,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Weighted sum of the N adjacent rows of a group: `out[t] = sum_n weights[t, n] * table[ids[t], n]`.

    The same as `weighted_gather` over `table.view(U * N, H)` with indices `ids * N + arange(N)`, which are not built on
    the GPU. Groups may be apart from each other (one layer's slice of a larger table): nothing is copied as long as the
    rows of a group are contiguous.

    Args:
        table: (U, N, H) groups of N rows, floating point.
        ids: (...) group numbers in [0, U), any integer dtype.
        weights: (..., N) factors, floating point.
        backend: as in `weighted_gather`.
        segments: `sort_segments(ids, U)`, when the caller shares one sort between several calls (MoLE: all layers).

    Returns:
        (..., H) in the table's dtype, contiguous.

    Raises:
        ValueError: as in `weighted_gather`.
    """
    if table.dim() != 3:
        raise ValueError(f"table must be (U, N, H), got {tuple(table.shape)}")
    if weights.dim() == 0 or weights.shape[:-1] != ids.shape or weights.shape[-1] != table.shape[1]:
        raise ValueError(
            f"weights must be {(*ids.shape, table.shape[1])} for ids {tuple(ids.shape)}, table {tuple(table.shape)}, "
            f"got {tuple(weights.shape)}"
        )
    return _call(table, ids, weights, backend, segments, grouped=True)


def _call(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    backend: Backend | None,
    segments: Segments | None,
    *,
    grouped: bool,
) -> torch.Tensor:
    if table.dtype not in _DTYPES or weights.dtype not in _DTYPES:
        raise ValueError(f"table and weights must be floating point, got {table.dtype} and {weights.dtype}")
    on_cpu = table.is_cpu and indices.is_cpu and weights.is_cpu
    # asking for a device makes an object, which a decoding step's sum feels
    if not on_cpu and not table.device == indices.device == weights.device:
        raise ValueError(
            f"table, indices and weights must be on one device, got {table.device}, {indices.device}, {weights.device}"
        )
    if indices.dtype != torch.int64:
        if indices.dtype not in _INDEX_DTYPES:
            raise ValueError(f"indices must be integers, got {indices.dtype}; convert them with .long()")
        indices = indices.long()
    if segments is not None and (segments.order.numel() != indices.numel() or segments.num_groups != table.shape[0]):
        raise ValueError(
            f"segments hold {segments.order.numel()} terms of {segments.num_groups} groups, this call has "
            f"{indices.numel()} of {table.shape[0]}; make them with sort_segments(indices, {table.shape[0]})"
        )
    chosen = _pick(backend, table)
    if weights.dim() == 2:
        return _dispatch(table, indices, weights, chosen, segments, grouped)
    shape = (*weights.shape[:-1], table.shape[-1])
    # not -1: it is ambiguous where there are no terms
    flat = weights.reshape(math.prod(weights.shape[:-1]), weights.shape[-1])
    indices = indices.reshape(flat.shape[:1] if grouped else flat.shape)
    return _dispatch(table, indices, flat, chosen, segments, grouped).view(shape)


def _dispatch(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    backend: Backend,
    segments: Segments | None,
    grouped: bool,
) -> torch.Tensor:
    """The op on checked (T, M) weights: traced, with gradients, or neither."""
    compiling = torch.compiler.is_compiling()
    if backend == "reference":
        if not compiling:
            check_range(indices, table.shape[0], "ids" if grouped else "indices")
        reference = weighted_gather_groups_reference if grouped else weighted_gather_reference
        with _no_autocast(table):
            return reference(table, indices, weights)
    if compiling:
        order, offsets = (segments.order, segments.offsets) if segments is not None else (None, None)
        return _forward_op(table, indices, weights, order, offsets, grouped, backend)
    if torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad):
        return _WeightedGather.apply(table, indices, weights, segments, grouped, backend)
    return _forward(table, indices, weights, grouped, backend)


def _pick(backend: Backend | None, table: torch.Tensor) -> Backend:
    if backend is None and table.is_cpu:
        return "cpu"
    device = table.device.type
    if backend is None:
        return "triton" if device == "cuda" and find_spec("triton") is not None else "reference"
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, these are on {table.device}; leave backend at None")
    if backend == "triton" and device != "cuda":
        if find_spec("triton") is None:
            raise ValueError("backend 'triton' needs the triton package, which is not installed; leave backend at None")
        from .triton_weighted_gather import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, these are on {table.device}; "
                "leave backend at None, or set TRITON_INTERPRET=1 before the program starts"
            )
    if backend not in ("triton", "cpu", "reference"):
        raise ValueError(f"backend {backend!r} is not one of 'triton', 'cpu', 'reference'")
    return backend


def _no_autocast(table: torch.Tensor) -> AbstractContextManager[Any]:
    device = table.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _path(backend: str) -> Any:
    if backend == "cpu":
        return cpu_weighted_gather
    from . import triton_weighted_gather

    return triton_weighted_gather


def _forward(
    table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grouped: bool, backend: str
) -> torch.Tensor:
    path = _path(backend)
    if not torch.is_autocast_enabled("cpu" if table.is_cpu else table.device.type):
        return path.forward(table, indices, weights, grouped=grouped)
    with _no_autocast(table):
        return path.forward(table, indices, weights, grouped=grouped)


def _backward(
    grad: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    segments: Segments | None,
    grouped: bool,
    backend: str,
    needs_table: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    path = _path(backend)
    grad_table = grad_weights = None
    with _no_autocast(table):
        if needs_table:
            segments = segments or sort_segments(indices, table.shape[0])
            grad_table = path.grad_table(grad, table, weights, segments, grouped=grouped)
        if needs_weights:
            grad_weights = path.grad_weights(grad, table, indices, weights, grouped=grouped)
    return grad_table, grad_weights


class _WeightedGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        segments: Segments | None,
        grouped: bool,
        backend: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(table, indices, weights)
        ctx.segments, ctx.grouped, ctx.backend = segments, grouped, backend
        return _forward(table, indices, weights, grouped, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        table, indices, weights = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        grads = _backward(grad, table, indices, weights, ctx.segments, ctx.grouped, ctx.backend, *needs)
        return grads[0], None, grads[1], None, None, None


# under torch.compile the same two functions are custom operators, opaque to the compiler: eager calls skip them, since
# their dispatch costs more than a decoding step's sum


@torch.library.custom_op("tenfold::weighted_gather", mutates_args=())
def _forward_op(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    grouped: bool,
    backend: str,
) -> torch.Tensor:
    return _forward(table, indices, weights, grouped, backend)


@_forward_op.register_fake
def _(
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    grouped: bool,
    backend: str,
) -> torch.Tensor:
    return table.new_empty(weights.shape[0], table.shape[-1])


@torch.library.custom_op("tenfold::weighted_gather_backward", mutates_args=())
def _backward_op(
    grad: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    grouped: bool,
    backend: str,
    needs_table: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    segments = Segments(order, offsets) if order is not None and offsets is not None else None
    grad_table, grad_weights = _backward(
        grad, table, indices, weights, segments, grouped, backend, needs_table, needs_weights
    )
    return (
        table.new_empty(0) if grad_table is None else grad_table,
        weights.new_empty(0) if grad_weights is None else grad_weights,
    )


@_backward_op.register_fake
def _(
    grad: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor | None,
    offsets: torch.Tensor | None,
    grouped: bool,
    backend: str,
    needs_table: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        table.new_empty(table.shape if needs_table else (0,)),
        weights.new_empty(weights.shape if needs_weights else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    table, indices, weights, order, offsets, ctx.grouped, ctx.backend = inputs
    ctx.save_for_backward(table, indices, weights, order, offsets)


def _backward_of_op(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needs_table, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_table, grad_weights = _backward_op(
        grad, *ctx.saved_tensors, ctx.grouped, ctx.backend, needs_table, needs_weights
    )
    return (grad_table if needs_table else None, None, grad_weights if needs_weights else None, None, None, None, None)


_forward_op.register_autograd(_backward_of_op, setup_context=_setup_context)
