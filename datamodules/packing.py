"""Token streams cut into sequences of fixed length, and a loader that continues in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

IGNORED = -100


class PackedSequences(Dataset[dict[str, Tensor]]):
    """Sequences of `length` tokens, one after the other through the split, documents running on.

    An item has `input_ids` (T,), `labels` (T,) (the same ids, -100 at padding; the model shifts them), and `num_bytes`
    (), the UTF-8 bytes of the tokens that are predicted, that is all but the first.

    Args:
        tokens: (S,) ids of the split.
        byte_lengths: (V,) bytes of text that each id stands for.
        length: T.
        keep_partial: pad the last, incomplete sequence instead of dropping it.
        pad_id: id at padding.
    """

    def __init__(
        self, tokens: np.ndarray, byte_lengths: np.ndarray, *, length: int, keep_partial: bool, pad_id: int
    ) -> None:
        self.tokens, self.byte_lengths, self.length, self.pad_id = tokens, byte_lengths, length, pad_id
        full = len(tokens) // length
        # a last sequence of one token predicts nothing
        self.count = full + int(keep_partial and len(tokens) - full * length > 1)

    def __len__(self) -> int:
        """Number of sequences."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sequence."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        tokens = torch.from_numpy(self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64))
        padding = self.length - len(tokens)
        return {
            "input_ids": torch.nn.functional.pad(tokens, (0, padding), value=self.pad_id),
            "labels": torch.nn.functional.pad(tokens, (0, padding), value=IGNORED),
            "num_bytes": torch.tensor(self.byte_lengths[tokens[1:].numpy()].sum(dtype=np.int64)),
        }


class ResumableSampler(DistributedSampler[Any]):
    """Each process's share of a permutation keyed by seed and epoch, from a given position on.

    A `DistributedSampler`, so that Lightning keeps it and tells it the epoch.

    Args:
        dataset: what is sampled.
        num_processes: processes that share it.
        process: this one's number.
        shuffle: permute; else in order.
        seed: of the permutation.
    """

    def __init__(self, dataset: Any, *, num_processes: int, process: int, shuffle: bool, seed: int) -> None:
        # training drops what does not divide over the processes; evaluation must not count a sequence twice
        super().__init__(dataset, num_processes, process, shuffle=shuffle, seed=seed, drop_last=shuffle)
        self.first = 0

    def __iter__(self) -> Iterator[Any]:
        """Indices from `first` on."""
        if self.shuffle:
            indices = list(super().__iter__())
        else:
            indices = list(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]
        return iter(indices[self.first :])

    def __len__(self) -> int:
        """Samples of a whole epoch of this process."""
        if self.shuffle:
            return super().__len__()
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class ResumableDataLoader(DataLoader[dict[str, Tensor]]):
    """A loader with the state that Lightning saves: the epoch, and how many samples all processes have been given.

    What workers have prepared but not handed out does not count. Its length stays that of a whole epoch.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._given = 0
        self._restored: dict[str, int] | None = None

    @property
    def _samples_per_batch(self) -> int:
        sampler: Any = self.sampler
        return (self.batch_size or 1) * sampler.num_replicas

    def __iter__(self) -> Any:
        """Batches of the epoch, or, right after a restore in the same epoch, the rest of it."""
        sampler: Any = self.sampler
        batches = 0
        if self._restored is not None and self._restored["epoch"] == sampler.epoch:
            # another number of processes has another batch: a partly given one is given again
            batches = self._restored["samples"] // self._samples_per_batch
        self._restored = None
        self._given = batches
        sampler.first = batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Position in plain numbers."""
        if self._restored is not None:
            return dict(self._restored)
        sampler: Any = self.sampler
        return {"epoch": sampler.epoch, "samples": self._given * self._samples_per_batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position at the next iteration."""
        self._restored = {"epoch": int(state["epoch"]), "samples": int(state["samples"])}
