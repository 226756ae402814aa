"""Weighted sums of table rows against what one would write instead.

All start from the same inputs: row numbers, or for groups the ids, from which `embedding_bag` has to build row numbers.
Weights have the table's dtype, which that peer insists on. Backward times one `autograd.grad` for
table and weights over a graph that is kept; ours includes its sort. The bound is a plain copy of the bytes that must
move at least: every used row once, outputs and gradients once.

On the CPU ours runs on the C++ kernels, which are built first where they can be; `torch_path` is ours without them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ...kernels.native_build import cpu_kernels, without_cpu_kernels
from ...kernels.weighted_gather import weighted_gather, weighted_gather_groups
from .native import build_for
from .registry import Settings
from .rows import Row, compare, missing_peer
from .timing import copying, measure, require_same

Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BOUND = "copy of the same bytes"
_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Shape(NamedTuple):
    """`groups` rows or groups of a table, `rows` adjacent rows per group (None: single rows, `terms` per token)."""

    groups: int
    rows: int | None
    columns: int
    tokens: int
    terms: int

    def __str__(self) -> str:
        if self.rows is None:
            return f"R={self.groups} H={self.columns} T={self.tokens} M={self.terms}"
        return f"U={self.groups} N={self.rows} H={self.columns} T={self.tokens}"


# MoLE with 4 and 16 experts over 2000 distinct ids; MemoryFormer with 64 tables of 256 rows
TRAINING = [
    Shape(2000, 4, 768, 4096, 4),
    Shape(2000, 16, 768, 4096, 16),
    Shape(64 * 256, None, 512, 512, 64),
]
DECODING = [shape._replace(tokens=tokens) for shape in TRAINING for tokens in (1, 8)]


class Inputs(NamedTuple):
    """A case: the table as rows, every term's row, the weights, and the output's gradient."""

    table: torch.Tensor
    ids: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    grad: torch.Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, settings: Settings) -> Inputs:
    """Random inputs of a shape; MemoryFormer's term m uses table m."""
    generator = torch.Generator().manual_seed(settings.seed)
    num_rows = shape.groups * (shape.rows or 1)
    table = torch.randn(num_rows, shape.columns, generator=generator)
    weights = torch.rand(shape.tokens, shape.terms, generator=generator)
    grad = torch.randn(shape.tokens, shape.columns, generator=generator)
    if shape.rows is None:
        per_table = num_rows // shape.terms
        indices = torch.randint(per_table, (shape.tokens, shape.terms), generator=generator)
        indices += torch.arange(shape.terms) * per_table
        ids = indices
    else:
        ids = torch.randint(shape.groups, (shape.tokens,), generator=generator)
        indices = ids[:, None] * shape.rows + torch.arange(shape.rows)
    to = settings.device
    return Inputs(table.to(to, dtype), ids.to(to), indices.to(to), weights.to(to, dtype), grad.to(to, dtype))


def gather_sum(table: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """What one writes first: gather rows, or groups of rows, scale, add up."""
    return (table[indices] * weights.unsqueeze(-1)).sum(-2)


def make_ops(inputs: Inputs, shape: Shape) -> dict[str, Op]:
    """Ours and the peers as functions of table and weights."""

    def as_groups(table: torch.Tensor) -> torch.Tensor:
        return table if shape.rows is None else table.view(shape.groups, shape.rows, -1)

    def ours(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        op = weighted_gather if shape.rows is None else weighted_gather_groups
        return op(as_groups(table), inputs.ids, weights)

    def embedding_bag(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        indices = inputs.ids
        if shape.rows is not None:
            indices = indices.unsqueeze(1) * shape.rows + torch.arange(shape.rows, device=indices.device)
        return functional.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")

    def gathered(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return gather_sum(as_groups(table), weights, inputs.ids)

    compiled = torch.compile(gather_sum, dynamic=False)

    def compiled_gather(table: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return compiled(as_groups(table), weights, inputs.ids)

    ops: dict[str, Op] = {
        "ours": ours,
        "embedding_bag": embedding_bag,
        "gather_sum": gathered,
        "compiled": compiled_gather,
    }
    if inputs.table.device.type == "cpu" and cpu_kernels() is not None:
        ops["torch_path"] = ours
    return ops


def least_bytes(inputs: Inputs, metric: str) -> int:
    """Bytes that cross the memory bus at least: every used row once, every result once."""
    table, weights, grad = inputs.table, inputs.weights, inputs.grad
    used = inputs.indices.unique().numel() * table.shape[1] * table.itemsize
    others = weights.numel() * weights.itemsize + inputs.ids.numel() * 8 + grad.numel() * grad.itemsize
    return used + others if metric == "forward_ms" else used + others + table.numel() * table.itemsize


def _calls(ops: dict[str, Op], inputs: Inputs, metric: str) -> dict[str, Callable[[], Any]]:
    """Functions without arguments that do the timed work and return its results."""
    if metric == "forward_ms":
        return _without_kernels({name: partial(_forward, op, inputs) for name, op in ops.items()})
    calls: dict[str, Callable[[], Any]] = {}
    for name, op in ops.items():
        leaves = inputs.table.detach().requires_grad_(), inputs.weights.detach().requires_grad_()
        calls[name] = partial(torch.autograd.grad, op(*leaves), leaves, inputs.grad, retain_graph=True)
    return _without_kernels(calls)


def _without_kernels(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The same calls, that of `torch_path` without the C++ kernels."""
    if (inner := calls.get("torch_path")) is not None:

        def torch_path() -> Any:
            with without_cpu_kernels():
                return inner()

        calls["torch_path"] = torch_path
    return calls


def _forward(op: Op, inputs: Inputs) -> tuple[torch.Tensor]:
    return (op(inputs.table, inputs.weights),)


def _able(ops: dict[str, Op], inputs: Inputs) -> tuple[dict[str, Op], dict[str, str]]:
    """The ops that run here, and for the others why not (torch.compile needs a compiler)."""
    able, reasons = {}, {}
    for name, op in ops.items():
        try:
            op(inputs.table, inputs.weights)
            able[name] = op
        except Exception as error:
            if name == "ours":
                raise
            reasons[name] = f"does not run here: {str(error).splitlines()[0][:120]}"
    return able, reasons


def run(settings: Settings) -> Iterator[Row]:
    """Rows for every shape, dtype, metric and peer."""
    import torch._functorch.config

    yield from build_for(settings)
    dtypes = [torch.float32] if settings.quick else [torch.float32, torch.bfloat16]
    shapes = [TRAINING[0], DECODING[0]] if settings.quick else TRAINING + DECODING
    # a kept graph may be walked again, so its buffers may not be reused by the compiled backward
    with torch._functorch.config.patch(donated_buffer=False):
        for dtype in dtypes:
            for shape in shapes:
                torch._dynamo.reset()
                yield from _rows(shape, dtype, settings)


def _rows(shape: Shape, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    case = f"{shape} {str(dtype).removeprefix('torch.')}"
    inputs = make_inputs(shape, dtype, settings)
    ops, reasons = _able(make_ops(inputs, shape), inputs)
    for metric in ("forward_ms", "backward_ms"):
        with torch.set_grad_enabled(metric == "backward_ms"):
            calls = _calls(ops, inputs, metric)
            ours = calls["ours"]()
            for peer in ops.keys() - {"ours"}:
                require_same(f"{case} {metric}", peer, calls[peer](), ours, _LIMITS[dtype])
            del ours
            calls["copy"] = copying(least_bytes(inputs, metric), settings.device)
            timings = measure(calls, device=settings.device, repeats=settings.repeats, seed=settings.seed)
        bound = timings["copy"].median_ms
        for peer in ("embedding_bag", "gather_sum", "compiled", *(("torch_path",) if "torch_path" in ops else ())):
            row = compare(
                case, metric, timings["ours"], peer=peer, theirs=timings.get(peer), bound=BOUND, bound_value=bound
            )
            yield row if peer in ops else missing_peer(row, peer, reasons[peer])
