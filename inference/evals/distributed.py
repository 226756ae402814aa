"""The processes of a data-parallel evaluation, as torchrun describes them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# a slow rank may generate for hours before it meets the others
TIMEOUT = timedelta(days=14)


@dataclass(frozen=True)
class Processes:
    """This process among those that share the documents.

    Only counts and Python objects travel between them, so everything goes through a gloo group in host memory,
    whatever device the models are on and whatever backend the caller has initialised.

    Args:
        rank: Index of this process over all machines.
        world_size: Number of processes.
        local_rank: Index of this process on its machine.
        group: The gloo group; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes along the first dimension, on this tensor's device."""
        if self.world_size == 1:
            return tensor
        own = tensor.detach().cpu().reshape(1) if tensor.ndim == 0 else tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own, group=self.group)
        return torch.cat(parts).to(tensor.device)

    def gather_object(self, value: Any, dst: int = 0) -> list[Any] | None:
        """Collect one object from each process on `dst`; None elsewhere."""
        if self.world_size == 1:
            return [value]
        collected: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(value, collected, dst=dst, group=self.group)
        return collected

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier(group=self.group)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, or be alone.

    Uses a process group that is already initialised; otherwise initialises one and leaves it at the end.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size == 1:
        yield Processes()
        return
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        group = dist.group.WORLD
    else:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield Processes(rank=rank, world_size=world_size, local_rank=local_rank, group=group)
    finally:
        if owned:
            dist.destroy_process_group()
