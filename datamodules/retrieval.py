"""`KeyValueRecallDataModule`: synthetic multi-key recall, which a model can only answer by looking far back."""

from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .packing import IGNORED, split_loader

BEGIN, ASK = 0, 1
FIRST_SYMBOL = 2
_SPLITS = ("train", "val", "test")


class RecallPrompts(NamedTuple):
    """Questions about one chain each.

    Attributes:
        input_ids: (B, P) prompts: chains, then `ASK` and a key.
        answers: (B, value_length) the values of that key.
        asked: (B,) which chain was asked for, counted from the beginning.
    """

    input_ids: Tensor
    answers: Tensor
    asked: Tensor


def recall_prompts(
    *, num_prompts: int, num_keys: int, value_length: int, vocab_size: int, seed: int, asked: int | None = None
) -> RecallPrompts:
    """Prompts of one length with a question at the end, for testing a trained model.

    Args:
        num_prompts: B.
        num_keys: Chains of a key and its values in front of the question.
        value_length: Values per key.
        vocab_size: Token ids.
        seed: Of the draw.
        asked: Which chain is asked for; drawn when None.

    Raises:
        ValueError: More different symbols are needed than there are, or the chain asked for is none of them.
    """
    _check(num_keys, value_length, vocab_size)
    if asked is not None and not 0 <= asked < num_keys:
        raise ValueError(f"asked is {asked}; there are chains 0 to {num_keys - 1}")
    draw = np.random.default_rng(seed)
    chains = torch.stack([_chains(num_keys, value_length, vocab_size, draw) for _ in range(num_prompts)])
    chosen = torch.from_numpy(draw.integers(num_keys, size=num_prompts))
    if asked is not None:
        chosen = torch.full((num_prompts,), asked)
    found = chains[torch.arange(num_prompts), chosen]
    begin, ask = torch.full((num_prompts, 1), BEGIN), torch.full((num_prompts, 1), ASK)
    return RecallPrompts(torch.cat([begin, chains.flatten(1), ask, found[:, :1]], dim=1), found[:, 1:], chosen)


class KeyValueRecallDataModule(LightningDataModule):
    """Sequences of chains `key value … value` in front, then questions about them: `ASK key value … value`.

    All symbols of a sequence's front differ, so each is followed by one other only: what comes next is found by looking
    for the symbol further up, as with the multi-key needles of RULER. Batches: `input_ids` and `labels` (B, T) int64,
    -100 everywhere but at the values of questions. Every sequence is drawn from seed, split and its own number.

    Args:
        vocab_size: Token ids; two are no symbols.
        sequence_length: Tokens per sequence, T.
        min_keys: Fewest chains in front.
        max_keys: Most chains in front.
        value_length: Values per key.
        batch_size: Sequences per batch and process, B.
        num_train: Sequences of an epoch.
        num_eval: Sequences of validation, and of testing.
        seed: Of all draws and of the order.
        num_workers: Loader processes.

    Raises:
        ValueError: The numbers do not fit together.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        sequence_length: int = 512,
        min_keys: int = 2,
        max_keys: int = 56,
        value_length: int = 7,
        batch_size: int = 16,
        num_train: int = 100_000,
        num_eval: int = 64,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        _check(max_keys, value_length, vocab_size)
        if not 1 <= min_keys <= max_keys:
            raise ValueError(f"min_keys {min_keys} and max_keys {max_keys}: give 1 or more, in this order")
        longest = 1 + max_keys * (1 + value_length) + 2 + value_length
        if sequence_length < longest:
            raise ValueError(
                f"sequence_length {sequence_length} holds no question after {max_keys} keys of {value_length} values; "
                f"use {longest} or more, or fewer keys"
            )
        for name, value in (("batch_size", batch_size), ("num_train", num_train), ("num_eval", num_eval)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.vocab_size, self.sequence_length = vocab_size, sequence_length
        self.min_keys, self.max_keys, self.value_length = min_keys, max_keys, value_length
        self.batch_size, self.sizes = batch_size, {"train": num_train, "val": num_eval, "test": num_eval}
        self.seed, self.num_workers = seed, num_workers

    def sequence(self, split: str, index: int) -> dict[str, Tensor]:
        """One sequence: `input_ids` and `labels`, each (T,)."""
        # torch's generators take 32 bits of a seed only
        draw = np.random.default_rng([self.seed, _SPLITS.index(split), index])
        # as often from 2 to 4 as from 4 to 8: what is learned on few keys is soon needed for many
        num_keys = int(self.min_keys * ((self.max_keys + 1) / self.min_keys) ** draw.random())
        chains = _chains(num_keys, self.value_length, self.vocab_size, draw)
        num_questions = -(-(self.sequence_length - 1 - chains.numel()) // (2 + self.value_length))
        asked = chains[torch.from_numpy(draw.integers(num_keys, size=num_questions))]
        questions = torch.cat([torch.full((num_questions, 1), ASK), asked], dim=1)
        answers = questions.clone()
        answers[:, :2] = IGNORED
        front = torch.cat([torch.tensor([BEGIN]), chains.flatten()])
        ids = torch.cat([front, questions.flatten()])[: self.sequence_length]
        labels = torch.cat([torch.full_like(front, IGNORED), answers.flatten()])[: self.sequence_length]
        return {"input_ids": ids, "labels": labels}

    def _loader(self, split: str) -> DataLoader[Any]:
        names = ("vocab_size", "sequence_length", "min_keys", "max_keys", "value_length", "seed")
        return split_loader(
            _Sequences(self, split),
            train=split == "train",
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            trainer=self.trainer,
            identity={name: getattr(self, name) for name in names},
        )

    def train_dataloader(self) -> Any:
        """Sequences in an order that seed and epoch give; the position is saved in checkpoints."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Validation sequences."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """Test sequences."""
        return self._loader("test")


class _Sequences(Dataset[dict[str, Tensor]]):
    def __init__(self, module: KeyValueRecallDataModule, split: str) -> None:
        self.module, self.split = module, split

    def __len__(self) -> int:
        return self.module.sizes[self.split]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.module.sequence(self.split, index)


def _check(num_keys: int, value_length: int, vocab_size: int) -> None:
    if num_keys < 1 or value_length < 1:
        raise ValueError(f"{num_keys} keys of {value_length} values: both must be at least 1")
    needed, there = num_keys * (1 + value_length), vocab_size - FIRST_SYMBOL
    if needed > there:
        raise ValueError(
            f"{num_keys} keys of {value_length} values need {needed} different symbols, a vocabulary of {vocab_size} "
            f"has {there}; use fewer keys or a larger vocab_size"
        )


def _chains(num_keys: int, value_length: int, vocab_size: int, draw: np.random.Generator) -> Tensor:
    """(num_keys, 1 + value_length) different symbols."""
    symbols = draw.permutation(vocab_size - FIRST_SYMBOL)[: num_keys * (1 + value_length)]
    return torch.from_numpy(symbols).view(num_keys, 1 + value_length) + FIRST_SYMBOL
