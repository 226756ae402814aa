"""Tables whose columns lie on several ranks: every rank hashes, gathers its columns, and one all-gather joins them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


def shard_columns(parts: list[Any], mesh: DeviceMesh) -> None:
    """Leave each rank its columns of the tables of memory layers or keyed memories; rank 0's values count.

    The ranks must be given the same tokens. Column j of an output needs column j of the table alone, so that nothing is
    sent but outputs (forward: one all-gather of H values per token) and the gradient of the input (backward: one
    all-reduce of d values per token). Rows on different ranks would need a sum of whole outputs over ranks instead.

    Args:
        parts: modules with a `table` parameter (R, H).
        mesh: of one dimension.

    Raises:
        ValueError: a table has fewer columns than there are ranks, or has gradients or shards already.
    """
    for part in parts:
        table = part.table
        if isinstance(table, DTensor) or table.grad is not None:
            raise ValueError("a table is sharded already or has a gradient; shard each once, before training")
        if table.shape[1] < mesh.size():
            raise ValueError(
                f"a table of {table.shape[1]} columns cannot be sharded over {mesh.size()} ranks; lower "
                f"tensor_parallel_size"
            )
        part.table = nn.Parameter(distribute_tensor(table.detach(), mesh, [Shard(1)]))


def gather_columns(table: DTensor, inputs: Tensor, gather: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`gather(table, inputs)` over a table whose columns are sharded: (..., H) whole on every rank.

    Args:
        table: (R, H), columns over a mesh of one dimension.
        inputs: the same on every rank; its gradient is summed over ranks.
        gather: maps a table (R, h) and the inputs to (..., h).
    """
    mesh = table.device_mesh
    # each rank's gradient comes from its columns only: they add up
    same = DTensor.from_local(inputs, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
    own = gather(table.to_local(), same)
    shape = torch.Size((*own.shape[:-1], table.shape[1]))
    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(
        own.contiguous(), mesh, [Shard(own.dim() - 1)], run_check=False, shape=shape, stride=stride
    )
    return whole.full_tensor()


def parallelise(model: Any, parts: list[Any], mesh: DeviceMesh) -> None:
    """Columns of tables over `tensor_parallel`, everything over `data_parallel` by FSDP2, for Lightning's mesh.

    Args:
        model: a decoder with `model.layers`; all ranks end with the values of rank 0.
        parts: its modules with tables.
        mesh: with the dimensions `data_parallel` and `tensor_parallel`.

    Raises:
        ValueError: see `shard_columns`.
    """
    from torch.distributed import broadcast
    from torch.distributed.fsdp import fully_shard

    for value in {id(v): v for v in (*model.parameters(), *model.buffers())}.values():
        broadcast(value.detach(), src=0)
    if mesh["tensor_parallel"].size() > 1:
        shard_columns(parts, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        fully_shard(model, mesh=mesh["data_parallel"])
