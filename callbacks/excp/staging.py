"""A copy of the training state in host memory: the only part of a save that the training step waits for.

Buffers are kept from save to save, as fresh memory costs several times the copy itself, and pinned for a GPU.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .host_memory import copy_to_host, same_bits
from .tree import Path, state_dict_path, tensors_of

_Key = tuple[torch.Size, torch.dtype]


@dataclass
class Staged:
    """A checkpoint whose tensors are all copies.

    Attributes:
        checkpoint: the copy.
        tensors: its tensors, by their paths.
        step: the checkpoint's `global_step`, if it has one.
    """

    checkpoint: Mapping[str, Any]
    tensors: dict[Path, Tensor] = field(default_factory=dict)
    step: int | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in self.tensors.values()
        }
        return sum(storages.values())

    def weights(self) -> dict[str, Tensor]:
        """The copied state dict's tensors, by name."""
        root = state_dict_path(self.checkpoint)
        return {
            str(path[-1]): tensor for path, tensor in self.tensors.items() if root is not None and path[:-1] == root
        }


class HostStage:
    """Copies checkpoints into buffers that it uses again.

    One state is held at a time, and with `keep_weights` the weights of the one before.

    Args:
        keep_weights: leave the weights of the state before the held one alone, for whoever measures steps by them.
    """

    def __init__(self, *, keep_weights: bool = True) -> None:
        self.keep_weights = keep_weights
        self.held: Staged | None = None
        self._free: dict[_Key, list[Tensor]] = {}
        self._former: list[Tensor] = []

    def stage(self, checkpoint: Mapping[str, Any]) -> Staged:
        """Copies a checkpoint. What was staged before the last call must not be in use any more, but for weights."""
        if self.held is not None:
            self._recycle(self.held)
        memo: dict[int, Any] = {}
        copies: dict[Any, Tensor] = {}
        tensors: dict[Path, Tensor] = {}
        for path, tensor in tensors_of(checkpoint):
            # tied weights stay tied
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else path
            if key not in copies:
                copies[key] = self._buffer(tensor)
                copy_to_host(tensor, copies[key])
            tensors[path] = memo[id(tensor)] = copies[key]
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # containers and whatever else may change while training goes on
        self.held = Staged(copy.deepcopy(dict(checkpoint), memo), tensors, _step_of(checkpoint))
        return self.held

    def repeats(self, checkpoint: Mapping[str, Any]) -> bool:
        """Whether all tensors of a checkpoint are, bit for bit, those that are held."""
        held = self.held
        if held is None or held.step is None or held.step != _step_of(checkpoint):
            return False
        tensors = dict(tensors_of(checkpoint))
        return tensors.keys() == held.tensors.keys() and all(
            same_bits(tensor, held.tensors[path]) for path, tensor in tensors.items()
        )

    def again(self, checkpoint: Mapping[str, Any]) -> Staged:
        """A checkpoint that `repeats` the held one, with the held tensors in place of its own."""
        assert self.held is not None
        memo: dict[int, Any] = {id(tensor): self.held.tensors[path] for path, tensor in tensors_of(checkpoint)}
        return Staged(copy.deepcopy(dict(checkpoint), memo), self.held.tensors, self.held.step)

    def _recycle(self, old: Staged) -> None:
        weights = {tensor.data_ptr() for tensor in old.weights().values()} if self.keep_weights else set()
        kept = []
        seen = set()
        for tensor in old.tensors.values():
            if tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            if tensor.data_ptr() in weights:
                kept.append(tensor)
            else:
                self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        for tensor in self._former:
            self._free.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
        self._former = kept

    def _buffer(self, tensor: Tensor) -> Tensor:
        free = self._free.get((tensor.shape, tensor.dtype))
        if free:
            return free.pop()
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


def _step_of(checkpoint: Mapping[str, Any]) -> int | None:
    step = checkpoint.get("global_step")
    return step if isinstance(step, int) else None
