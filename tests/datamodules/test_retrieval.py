"""Key-value recall: what is asked can be answered by looking up, sequences repeat, and bad sizes are told."""

from itertools import pairwise

import pytest
import torch
from tenfold.datamodules import KeyValueRecallDataModule, recall_prompts


def test_every_value_asked_for_follows_its_symbol_in_front() -> None:
    data = KeyValueRecallDataModule(vocab_size=130, sequence_length=128, max_keys=14, value_length=7, seed=3)
    seen = set()
    for index in range(40):
        item = data.sequence("train", index)
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        assert len(ids) == len(labels) == 128
        front = ids.index(1)
        num_keys, rest = divmod(front - 1, 8)
        assert rest == 0
        seen.add(num_keys)
        assert len(set(ids[1:front])) == front - 1
        after = dict(pairwise(ids[1:front]))
        keys = ids[1:front:8]
        for place in range(front, 128):
            offset = (place - front) % 9
            if offset >= 2:
                assert labels[place] == ids[place] == after[ids[place - 1]]
            else:
                assert labels[place] == -100
                assert ids[place] == 1 if offset == 0 else ids[place] in keys
        assert set(labels[:front]) == {-100}
    assert min(seen) == 2 < 8 < max(seen) <= 14


def test_sequences_depend_on_seed_split_and_number_alone() -> None:
    make = KeyValueRecallDataModule
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    drawn = [
        one.sequence("train", 0),
        one.sequence("train", 1),
        one.sequence("val", 0),
        one.sequence("test", 0),
        other.sequence("train", 0),
    ]
    assert torch.equal(drawn[0]["input_ids"], same.sequence("train", 0)["input_ids"])
    assert len({tuple(item["input_ids"].tolist()) for item in drawn}) == len(drawn)


def test_loaders_hold_what_they_say_and_continue_in_the_middle() -> None:
    data = KeyValueRecallDataModule(batch_size=4, num_train=24, num_eval=6)
    batches = list(data.train_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 512)] * 6
    assert [len(batch["labels"]) for batch in data.val_dataloader()] == [4, 2]
    loader = data.train_dataloader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    state = loader.state_dict()
    again = data.train_dataloader()
    again.load_state_dict(state)
    for mine, theirs in zip(again, batches[2:], strict=True):
        assert torch.equal(mine["input_ids"], theirs["input_ids"])


def test_prompts_ask_for_the_chain_they_name() -> None:
    prompts = recall_prompts(num_prompts=5, num_keys=6, value_length=3, vocab_size=64, seed=0)
    assert prompts.input_ids.shape == (5, 1 + 6 * 4 + 2)
    for ids, answer, asked in zip(prompts.input_ids, prompts.answers, prompts.asked, strict=True):
        start = 1 + 4 * int(asked)
        assert ids[start] == ids[-1]
        assert torch.equal(ids[start + 1 : start + 4], answer)
        assert ids[-2] == 1
    fixed = recall_prompts(num_prompts=2, num_keys=6, value_length=3, vocab_size=64, seed=0, asked=4)
    assert fixed.asked.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_keys": 64}, "64 keys of 7 values need 512 different symbols, a vocabulary of 512 has 510"),
        (
            {"max_keys": 60, "sequence_length": 480},
            "sequence_length 480 holds no question after 60 keys of 7 values; use 490 or more",
        ),
        ({"min_keys": 9, "max_keys": 8}, "min_keys 9 and max_keys 8: give 1 or more, in this order"),
        ({"value_length": 0}, "56 keys of 0 values: both must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_told(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeyValueRecallDataModule(**options)


def test_a_chain_that_is_not_there_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="asked is 6; there are chains 0 to 5"):
        recall_prompts(num_prompts=1, num_keys=6, value_length=3, vocab_size=64, seed=0, asked=6)
