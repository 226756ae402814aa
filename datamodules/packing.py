"""Token streams cut into sequences of fixed length, and a loader that continues in the middle of an epoch."""

import math
from collections.abc import Callable, Iterator
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

    A `DistributedSampler`, so that Lightning keeps it and tells it the epoch. `first` is the position, in samples over
    all processes; `epoch_offset` is added to the epoch that Lightning tells.

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
        self.first = self.epoch_offset = 0

    def __iter__(self) -> Iterator[Any]:
        """Indices from `first` on."""
        size = len(self.dataset)  # type: ignore[arg-type]
        if not self.shuffle:
            return iter(range(self.first + self.rank, size, self.num_replicas))
        # both numbers are mixed: with their sum, epoch 1 of seed 0 would be epoch 0 of seed 1
        mixed = np.random.SeedSequence([self.seed, self.epoch + self.epoch_offset]).generate_state(1, np.uint64)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(int(mixed[0])))
        return iter(order[self.first + self.rank : self.total_size : self.num_replicas].tolist())

    def __len__(self) -> int:
        """Samples of a whole epoch of this process."""
        if self.shuffle:
            return super().__len__()
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class ResumableDataLoader(DataLoader[dict[str, Tensor]]):
    """A loader with the state that Lightning saves: the epoch, and how many samples the trainer is done with.

    What workers have prepared but not handed out does not count, and neither does a batch whose step has not ended
    when the state is taken (an exception, Ctrl+C). Its length stays that of a whole epoch. With another batch size or
    number of processes the epoch goes on at the same sample, and Lightning's count of its batches is set to match.

    Args:
        args: as for `DataLoader`.
        identity: what has to be equal for a position to have a meaning; plain values.
        progress: gives Lightning's `batch_progress` of the training loop, or None without a trainer.
        options: as for `DataLoader`.
    """

    def __init__(
        self,
        *args: Any,
        identity: dict[str, Any] | None = None,
        progress: Callable[[], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.identity = identity or {}
        self.progress = progress or _no_progress
        self._epoch = self._first = self._given = self._processed_before = 0
        self._restored: dict[str, Any] | None = None

    @property
    def _samples_per_batch(self) -> int:
        sampler: Any = self.sampler
        return (self.batch_size or 1) * getattr(sampler, "num_replicas", 1)

    def __iter__(self) -> Any:
        """Batches of the epoch, or, right after a restore in the same epoch, the rest of it."""
        sampler: Any = self.sampler
        if not isinstance(sampler, ResumableSampler):
            # Lightning puts another sampler here to overfit a few batches
            yield from super().__iter__()
            return
        first = 0
        if self._restored is not None:
            sampler.epoch_offset = self._restored["epoch_offset"]
            if self._restored["epoch"] == sampler.epoch:
                first = self._restored["samples"]
            else:
                # what follows is the next epoch, even where Lightning has counted an empty one on the way: it does
                # so when a run limited by steps continues from the end of an epoch
                sampler.epoch_offset += self._restored["epoch"] + 1 - sampler.epoch
            self._restored = None
        progress = self.progress()
        self._processed_before = 0 if progress is None else progress.current.processed
        self._epoch, self._first, self._given = sampler.epoch, first, 0
        sampler.first = first
        for batch in super().__iter__():
            # counted before it is handed out: the state of its step is taken before the next one is asked for
            self._given += 1
            yield batch

    def _finished(self) -> int:
        """Batches handed out in this iteration whose step has ended."""
        progress = self.progress()
        if progress is None:
            return self._given
        unfinished = self._given - (progress.current.processed - self._processed_before)
        return self._given - 1 if unfinished == 1 else self._given

    def state_dict(self) -> dict[str, Any]:
        """Position in plain numbers, and what it refers to."""
        if self._restored is not None:
            return dict(self._restored)
        sampler: Any = self.sampler
        return {
            "epoch": self._epoch,
            "epoch_offset": getattr(sampler, "epoch_offset", 0),
            "samples": self._first + self._finished() * self._samples_per_batch,
            "samples_per_batch": self._samples_per_batch,
            "identity": self.identity,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position at the next iteration.

        Raises:
            ValueError: the position is one in other data or in another order.
        """
        if not isinstance(self.sampler, ResumableSampler):
            return
        saved = state["identity"]
        different = [
            f"{name} was {saved.get(name)!r} and is {self.identity.get(name)!r}"
            for name in sorted(saved.keys() | self.identity.keys())
            if saved.get(name) != self.identity.get(name)
        ]
        if different:
            raise ValueError(
                f"the checkpoint stands in the middle of other data: {', '.join(different)}; "
                "continue with the same data options, or start a new run from its weights"
            )
        self._restored = dict(state)
        progress = self.progress()
        if progress is None or state["samples_per_batch"] == self._samples_per_batch:
            return
        done = len(self) if progress.is_last_batch else math.ceil(state["samples"] / self._samples_per_batch)
        shift = done - progress.current.processed
        for name in ("ready", "started", "processed", "completed"):
            setattr(progress.current, name, getattr(progress.current, name) + shift)


def _no_progress() -> None:
    return None


def split_loader(
    dataset: Any,
    *,
    train: bool,
    batch_size: int,
    num_workers: int,
    seed: int,
    trainer: Any,
    identity: dict[str, Any],
    collate_fn: Callable[[list[Any]], Any] | None = None,
    sampler: "type[ResumableSampler] | None" = None,
) -> DataLoader[Any]:
    """The loader of one split: shuffled and resumable for training, in order otherwise, shared out over processes.

    Args:
        dataset: the split's sequences.
        train: whether it is the training split.
        batch_size: sequences per batch and process.
        num_workers: worker processes.
        seed: of the order.
        trainer: Lightning's trainer; None outside one.
        identity: what must be the same for a saved position to make sense.
        collate_fn: makes a batch; torch's by default.
        sampler: kind of the training split's sampler; `ResumableSampler` by default.
    """
    order = (sampler if train and sampler is not None else ResumableSampler)(
        dataset,
        num_processes=trainer.world_size if trainer is not None else 1,
        process=trainer.global_rank if trainer is not None else 0,
        shuffle=train,
        seed=seed,
    )

    def progress() -> Any:
        return None if trainer is None else trainer.fit_loop.epoch_loop.batch_progress

    kind: Any = ResumableDataLoader if train else DataLoader
    return kind(
        dataset,
        batch_size=batch_size,
        sampler=order,
        collate_fn=collate_fn,
        num_workers=num_workers,
        drop_last=train and len(order) >= batch_size,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        persistent_workers=num_workers > 0,
        # a generator of its own: each iterator draws a seed, which would shift the model's random numbers
        generator=torch.Generator().manual_seed(seed),
        **({"identity": identity, "progress": progress} if train else {}),
    )
