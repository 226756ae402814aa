"""Continuing where it is easy to be off by one: ends of epochs, failed steps, another batch size, other data."""

import json
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tenfold.datamodules import TextDataModule
from tenfold.datamodules.packing import ResumableSampler

T, BATCH = 32, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(1)
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    words = ["stone", "river", "mountain", "the", "of", "light"]
    rows = [{"text": " ".join(draw.choices(words, k=40))} for _ in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def module(corpus: Path, **options: Any) -> TextDataModule:
    defaults = {"tokenizer": "bpe:300", "sequence_length": T, "batch_size": BATCH, "val_fraction": 0.1}
    return TextDataModule(str(corpus), cache=str(corpus.parent / "cache"), **(defaults | options))


class Recorder(pl.LightningModule):
    """Keeps the sequences of all steps that end; step `fail_at` (from 1) raises."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []
        self.steps, self.fail_at = 0, fail_at

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the step fails")
        self.seen += [tuple(row) for row in batch["input_ids"].tolist()]
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    data: TextDataModule, checkpoints: Any, *, ckpt_path: Path | None = None, fail_at: int | None = None, **options: Any
) -> list[tuple[int, ...]]:
    model = Recorder(fail_at)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[checkpoints], **quiet, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return model.seen


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}", save_on_train_epoch_end=True)


def num_batches(corpus: Path) -> int:
    data = module(corpus)
    data.prepare_data()
    data.setup("fit")
    return len(data.train_dataloader())


@pytest.mark.parametrize("limit", ["steps", "epochs"])
def test_from_the_end_of_an_epoch_the_next_one_follows(corpus: Path, tmp_path: Path, limit: str) -> None:
    per_epoch = num_batches(corpus)
    options: dict[str, Any] = {"max_steps": 3 * per_epoch} if limit == "steps" else {"max_epochs": 3}
    whole = fit(module(corpus), each_epoch(tmp_path / "whole"), **options)
    for epoch in (0, 1):
        checkpoint = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        rest = fit(module(corpus), each_step(tmp_path / f"rest{epoch}"), ckpt_path=checkpoint, **options)
        assert rest == whole[(epoch + 1) * per_epoch * BATCH :], f"after epoch {epoch}"
    if limit == "steps":
        # and once more from the middle of a run that was itself continued from such an end
        step = per_epoch + 3
        again = fit(
            module(corpus), each_step(tmp_path / "again"), ckpt_path=tmp_path / "rest0" / f"step={step}.ckpt", **options
        )
        assert again == whole[step * BATCH :]


def test_batch_of_a_failed_step_is_given_again(corpus: Path, tmp_path: Path) -> None:
    whole = fit(module(corpus), each_epoch(tmp_path / "whole"), max_epochs=2)
    saving = ModelCheckpoint(tmp_path / "failed", every_n_train_steps=1000, save_on_exception=True)
    with pytest.raises(RuntimeError, match="the step fails"):
        fit(module(corpus), saving, max_epochs=2, fail_at=6)
    (checkpoint,) = (tmp_path / "failed").glob("*.ckpt")
    rest = fit(module(corpus), each_epoch(tmp_path / "rest"), ckpt_path=checkpoint, max_epochs=2)
    assert rest == whole[5 * BATCH :]


@pytest.mark.parametrize("other", [1, 3, 8], ids="batch={}".format)
def test_another_batch_size_goes_on_at_the_same_sequence(corpus: Path, tmp_path: Path, other: int) -> None:
    """The position is in samples over all processes, so this is the case of another number of processes as well."""
    step = 4
    whole = fit(module(corpus), each_step(tmp_path / "whole"), max_epochs=1)
    rest = fit(
        module(corpus, batch_size=other),
        each_epoch(tmp_path / "rest"),
        ckpt_path=tmp_path / "whole" / f"step={step}.ckpt",
        max_epochs=1,
    )
    common = min(len(rest), len(whole) - step * BATCH)
    assert rest[:common] == whole[step * BATCH :][:common]
    # the rest of the epoch is used up to what does not fill a batch
    assert abs(len(rest) - (len(whole) - step * BATCH)) < other + BATCH


def test_position_in_other_data_is_refused(corpus: Path, tmp_path: Path) -> None:
    fit(module(corpus), each_step(tmp_path / "whole"), max_epochs=1)
    with pytest.raises(ValueError, match="in the middle of other data: seed was 0 and is 1") as raised:
        fit(
            module(corpus, seed=1),
            each_epoch(tmp_path / "rest"),
            ckpt_path=tmp_path / "whole" / "step=3.ckpt",
            max_epochs=1,
        )
    assert "\n" not in str(raised.value)


def test_overfitting_a_few_batches_works(corpus: Path, tmp_path: Path) -> None:
    seen = fit(module(corpus), each_epoch(tmp_path), max_epochs=2, overfit_batches=2)
    assert len(seen) == 4 * BATCH
    assert seen[: 2 * BATCH] == seen[2 * BATCH :]


def test_making_an_iterator_leaves_the_random_numbers_alone(corpus: Path) -> None:
    data = module(corpus)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.rand(1), expected)


def test_seed_and_epoch_are_not_interchangeable() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = ResumableSampler(range(30), num_processes=1, process=0, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) != order(1, 0)
    assert order(0, 1) == order(0, 1)
    assert sorted(order(5, 2)) == list(range(30))
