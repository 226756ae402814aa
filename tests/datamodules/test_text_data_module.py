"""Documents to packed sequences: splits, packing, byte counts, resuming, and what is refused."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from tenfold.datamodules import TextDataModule, split_of
from tenfold.datamodules.documents import list_files, read_documents
from tenfold.datamodules.packing import PackedSequences, ResumableDataLoader, ResumableSampler
from tenfold.datamodules.token_store import TokenStore
from tenfold.datamodules.tokenizer_folder import load_tokenizer, token_byte_lengths


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of words with letters outside ASCII, as JSON lines."""
    draw = random.Random(0)
    words = ["stone", "river", "größe", "naïve", "the", "of", "日本", "€", "mountain", "🙂"]
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    rows = [{"title": f"d{i}", "text": " ".join(draw.choices(words, k=draw.randint(20, 60)))} for i in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def module(corpus: Path, cache: Path, **options: Any) -> TextDataModule:
    settings = {
        "tokenizer": "bpe:300",
        "sequence_length": 32,
        "batch_size": 4,
        "val_fraction": 0.1,
        "test_fraction": 0.1,
    }
    return TextDataModule(str(corpus), cache=str(cache), **(settings | options))


def ready(data: TextDataModule) -> TextDataModule:
    data.prepare_data()
    data.setup("fit")
    return data


# splits


@given(st.lists(st.text(min_size=1), min_size=1, max_size=20), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_split_depends_on_the_text_alone(texts: list[str], seed: int) -> None:
    options: dict[str, Any] = {"val_fraction": 0.3, "test_fraction": 0.3, "split_seed": seed}
    first = {text: split_of(text, **options) for text in texts}
    assert first == {text: split_of(text, **options) for text in reversed(texts)}


def test_split_shares_are_the_fractions() -> None:
    splits = [split_of(f"document {i}", val_fraction=0.2, test_fraction=0.1) for i in range(20000)]
    assert abs(splits.count("val") / 20000 - 0.2) < 0.01
    assert abs(splits.count("test") / 20000 - 0.1) < 0.01
    other = [split_of(f"document {i}", val_fraction=0.2, test_fraction=0.1, split_seed=1) for i in range(20000)]
    assert splits != other


def test_splits_partition_the_documents(corpus: Path, tmp_path: Path) -> None:
    data = module(corpus, tmp_path)
    parts = {name: [d["title"] for d in data.documents(name)] for name in ("train", "val", "test")}
    assert all(parts.values())
    assert sorted(title for part in parts.values() for title in part) == sorted(d["title"] for d in data.documents())


# packing and byte counts


def test_packing_is_the_concatenation_of_the_training_documents(corpus: Path, tmp_path: Path) -> None:
    data = ready(module(corpus, tmp_path))
    expected: list[int] = []
    for document in data.documents("train"):
        expected += [*data.tokenizer(document["text"], add_special_tokens=False).input_ids, data.tokenizer.eos_token_id]
    loader = data.train_dataloader()
    got = [loader.dataset[i]["input_ids"] for i in range(len(loader.dataset))]
    assert len(got) == len(expected) // 32
    assert torch.cat(got).tolist() == expected[: 32 * len(got)]


def test_last_partial_sequence_is_padded_and_not_predicted(corpus: Path, tmp_path: Path) -> None:
    data = ready(module(corpus, tmp_path))
    dataset = data.val_dataloader().dataset
    size = len(TokenStore(data._store_path()).tokens("val"))
    assert size % 32 > 1, "the case under test"
    last = dataset[len(dataset) - 1]
    assert len(dataset) == size // 32 + 1
    assert (last["labels"] == -100).sum() == 32 - size % 32
    assert (last["input_ids"][size % 32 :] == data.tokenizer.pad_token_id).all()


def test_bytes_are_those_of_the_predicted_text(corpus: Path, tmp_path: Path) -> None:
    data = ready(module(corpus, tmp_path, sequence_length=100_000 // 100))
    dataset = data.val_dataloader().dataset
    text = "".join(document["text"] for document in data.documents("val"))
    first_tokens = [int(dataset[i]["input_ids"][0]) for i in range(len(dataset))]
    lengths = token_byte_lengths(data.tokenizer)
    total = sum(int(dataset[i]["num_bytes"]) for i in range(len(dataset)))
    # all bytes but those of each sequence's first token, which nothing predicts
    assert total == len(text.encode()) - sum(int(lengths[token]) for token in first_tokens)


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_token_bytes_sum_to_the_text(tiny_tokenizer: Any, text: str) -> None:
    lengths = token_byte_lengths(tiny_tokenizer)
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    special = [i for i in ids if i in tiny_tokenizer.all_special_ids]
    if not special:
        assert int(lengths[ids].sum()) == len(text.encode("utf-8"))


@pytest.fixture(scope="module")
def tiny_tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    data = module(corpus, tmp_path_factory.mktemp("cache"))
    data.prepare_data()
    return load_tokenizer(data.tokenizer_folder)


# store


def test_store_is_reused_and_keyed_by_data_and_tokenizer(corpus: Path, tmp_path: Path) -> None:
    first = ready(module(corpus, tmp_path))
    path = first._store_path()
    stamp = path.stat().st_mtime_ns
    assert ready(module(corpus, tmp_path))._store_path() == path
    assert path.stat().st_mtime_ns == stamp
    assert ready(module(corpus, tmp_path, tokenizer="bpe:320")).digest != first.digest
    assert ready(module(corpus, tmp_path, split_seed=7)).digest != first.digest
    changed = tmp_path / "changed.jsonl"
    changed.write_text(corpus.read_text(encoding="utf-8") + json.dumps({"text": "more"}) + "\n", encoding="utf-8")
    assert ready(module(changed, tmp_path, tokenizer=first.tokenizer_folder)).digest != first.digest


def test_altered_store_is_made_again(corpus: Path, tmp_path: Path) -> None:
    data = ready(module(corpus, tmp_path))
    path = data._store_path()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[TokenStore(path)._file.offset("train") + 10] ^= 0xFF
    path.write_bytes(damaged)
    ready(module(corpus, tmp_path))
    assert path.read_bytes() == whole


def test_processes_tokenise_as_threads_do(corpus: Path, tmp_path: Path) -> None:
    one = ready(module(corpus, tmp_path / "a"))
    two = ready(module(corpus, tmp_path / "b", num_proc=2))
    for split in ("train", "val", "test"):
        assert np.array_equal(TokenStore(one._store_path()).tokens(split), TokenStore(two._store_path()).tokens(split))


# readers


def test_formats_give_the_same_documents(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"title": "a", "text": "eins\nzwei"}, {"title": "b", "text": "  "}, {"title": "c", "text": "drei ü"}]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    with gzip.open(tmp_path / "y.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "z.parquet")
    expected = [row for row in rows if row["text"].strip()]
    for file in list_files(tmp_path):
        assert list(read_documents(file)) == expected, file.name


def test_long_text_files_are_cut_without_losing_a_character(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a long book\n" + "\n" * (i % 7 == 0) for i in range(3000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    sections = [document["text"] for document in read_documents(tmp_path / "book.txt")]
    assert len(sections) > 5
    assert "".join(sections) == text


# order and resuming


class Recorder(pl.LightningModule):
    """Records the ids it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextDataModule, folder: Path, *, ckpt_path: Path | None = None, **options: Any) -> Recorder:
    model = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        **options,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize(
    ("options", "num_workers"),
    [({}, 0), ({"val_check_interval": 3}, 0), ({"accumulate_grad_batches": 2}, 0), ({}, 2)],
    ids=["plain", "validating", "accumulating", "workers"],
)
def test_continued_run_sees_the_same_batches(
    corpus: Path, tmp_path: Path, options: dict[str, Any], num_workers: int
) -> None:
    make = {"num_workers": num_workers}
    whole = fit(module(corpus, tmp_path, **make), tmp_path / "whole", max_epochs=3, **options).seen
    per_epoch = len(ready(module(corpus, tmp_path)).train_dataloader())
    assert len(whole) == 3 * per_epoch
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch], "each epoch has its own order"
    accumulate = options.get("accumulate_grad_batches", 1)
    steps_per_epoch = -(-per_epoch // accumulate)
    for step in (1, steps_per_epoch - 1, steps_per_epoch, steps_per_epoch + 2):
        epochs, rest = divmod(step, steps_per_epoch)
        done = epochs * per_epoch + rest * accumulate
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        rest_of_run = fit(
            module(corpus, tmp_path, **make), tmp_path / f"from{step}", ckpt_path=checkpoint, max_epochs=3, **options
        ).seen
        assert rest_of_run == whole[done:], f"continued after step {step}"


def loader(num_processes: int, process: int, batch_size: int, size: int = 50) -> ResumableDataLoader:
    tokens = np.arange(size * 4, dtype=np.uint16)
    data = PackedSequences(tokens, np.ones(size * 4, dtype=np.int32), length=4, keep_partial=False, pad_id=0)
    sampler = ResumableSampler(data, num_processes=num_processes, process=process, shuffle=True, seed=3)
    return ResumableDataLoader(data, batch_size=batch_size, sampler=sampler, drop_last=True)


def firsts(batches: Iterator[dict[str, torch.Tensor]] | ResumableDataLoader) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch["input_ids"]]


def test_other_number_of_processes_goes_on_where_all_stopped() -> None:
    whole = loader(1, 0, 4)
    order = firsts(whole)
    one = loader(1, 0, 4)
    iterator = iter(one)
    for _ in range(6):
        next(iterator)
    state = one.state_dict()
    assert (state["epoch"], state["samples"]) == (0, 24)
    parts = []
    for process in range(2):
        two = loader(2, process, 2)
        two.load_state_dict(state)
        parts.append(firsts(two))
    together = {*parts[0], *parts[1]}
    assert together == set(order[24:48]) | together.difference(order[:24])
    assert not together & set(order[:24])


def test_processes_share_validation_without_counting_twice() -> None:
    data = loader(1, 0, 1, size=7).dataset
    shares = [list(ResumableSampler(data, num_processes=2, process=p, shuffle=False, seed=0)) for p in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(7))


# what is refused


def refused(path: Path, cache: Path, error: type[Exception], match: str, **options: Any) -> None:
    with pytest.raises(error, match=match) as raised:
        ready(module(path, cache, **options))
    assert "\n" not in str(raised.value)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_bad_text(tmp_path: Path) -> None:
    refused(tmp_path / "none.txt", tmp_path, FileNotFoundError, "does not exist")
    refused(write(tmp_path / "a.txt", ""), tmp_path, ValueError, "no document with text")
    refused(write(tmp_path / "b.txt", b"abc\0def"), tmp_path, ValueError, "NUL byte at offset 3")
    refused(write(tmp_path / "c.txt", b"good\n\xff\xfe"), tmp_path, ValueError, "not UTF-8 text: byte 0xff at offset 5")
    refused(
        write(tmp_path / "d.jsonl", '{"text": "a"}\n{"body": "b"}'), tmp_path, ValueError, "line 2: no text in field"
    )
    refused(write(tmp_path / "e.jsonl", "not json"), tmp_path, ValueError, "line 1: not JSON")
    refused(write(tmp_path / "f.pdf", "x"), tmp_path, ValueError, "extension '.pdf' is not one of")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, ValueError, "holds no file")


def test_corpus_shorter_than_one_sequence(tmp_path: Path) -> None:
    path = write(tmp_path / "short.txt", "only a few words")
    options = {"val_fraction": 0.0, "test_fraction": 0.0, "sequence_length": 500}
    refused(path, tmp_path, ValueError, r"has \d+ tokens, one sequence needs 500", **options)


def test_empty_held_out_split(tmp_path: Path) -> None:
    path = write(tmp_path / "one.jsonl", json.dumps({"text": "word " * 400}))
    options = {"val_fraction": 1e-9, "test_fraction": 0.0}
    refused(path, tmp_path, ValueError, "no document of .* falls into the val split", **options)


def test_bad_options(corpus: Path, tmp_path: Path) -> None:
    refused(corpus, tmp_path, ValueError, "val_fraction 1.5", val_fraction=1.5)
    refused(corpus, tmp_path, ValueError, "leave nothing to train on", val_fraction=0.6, test_fraction=0.5)
    refused(corpus, tmp_path, ValueError, "needs at least 258 entries", tokenizer="bpe:100")
    refused(corpus, tmp_path, ValueError, "bpe: takes a vocabulary size", tokenizer="bpe:many")
    refused(corpus, tmp_path, ValueError, "no tokenizer can be loaded", tokenizer=str(tmp_path))
    refused(corpus, tmp_path, ValueError, "sequence_length 1", sequence_length=1)


def test_tokenizer_without_an_end(corpus: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings_file = tmp_path / "tokenizer" / "tokenizer_config.json"
    content = json.loads(settings_file.read_text())
    content.pop("eos_token")
    settings_file.write_text(json.dumps(content))
    refused(corpus, tmp_path, ValueError, "no eos token", tokenizer=str(tmp_path / "tokenizer"))


def test_hub_data_set_out_of_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a local path nor a hub data set within reach"):
        TextDataModule("nobody/nothing", tokenizer="bpe:300", cache=str(tmp_path)).prepare_data()
