"""The rows that readers of the results look for are there, with counted bytes; a study goes on where it stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tenfold.experiments.bench import mole, mole_quality, mole_training, number_formats
from tenfold.experiments.bench.registry import BENCHES, Settings
from tenfold.experiments.mole import quality
from tenfold.experiments.mole.picture import Panel, draw
from tenfold.kernels.row_storage.direct import DirectRows
from tenfold.kernels.row_storage.region import RowRegion

SETTINGS = Settings("cpu", quick=True, seed=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("fast", "dtype", "num_bytes"), [(True, "bfloat16", 2), (False, "float32", 4)])
def test_decoding_rows(fast: bool, dtype: str, num_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(number_formats, "fast_bfloat16", lambda: fast)
    device, *rows = mole._decoding_rows("tiny", tmp_path, SETTINGS)
    assert (device.case, device.metric) == (f"tiny-10e experts {dtype}", "device_read_mb_s")
    assert device.value > 0
    assert {"mole", "mole-quality"} <= set(BENCHES)
    cases = {row.case for row in rows}
    for batch in (1, 8):
        for storage in ("memory", "mmap cache=warm", "mmap cache=cold", "direct cache=cold"):
            assert f"tiny-4e batch={batch} storage={storage} {dtype}" in cases
    for case in cases:
        timed = {row.peer: row for row in rows if row.case == case and row.metric == "decode_ms_per_step"}
        assert set(timed) == {"dense", "moe_resident", "moe_offloaded"}
        assert all(row.value > 0 and row.peer_value > 0 for row in timed.values())
    read = {row.case: row for row in rows if row.metric == "bytes_read_per_step"}
    # 4 layers, 4 experts, width 128: whole pages, so direct reads take no more
    one = 4 * 4 * 128 * num_bytes
    assert one % 4096 == 0
    for case in ("mmap cache=warm", "mmap cache=cold", "direct cache=cold"):
        row = read[f"tiny-4e batch=1 storage={case} {dtype}"]
        assert row.value == one
        # at least the two experts of one layer
        assert row.peer_value >= 2 * 2 * 128 * 256 * num_bytes


def test_the_device_row_reads_every_record_once_per_repeat(tmp_path: Path) -> None:
    (tmp_path / "records").write_bytes(bytes(20 * 8192))
    with DirectRows(RowRegion(tmp_path / "records", 0, 20, 8192, 8192)) as source:
        row = mole._device_row(source, "case", SETTINGS)
        assert source.bytes_read == row.repeats * 20 * 8192 == SETTINGS.repeats * 20 * 8192


def test_models_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mole.lookup_model

    def wrong(*arguments: object) -> mole.Rival:
        rival = real(*arguments)
        if arguments[-1] == "direct":
            torch.nn.init.normal_(rival.model.model.layers[0].feed_forward.router.weight)
        return rival

    monkeypatch.setattr(mole, "lookup_model", wrong)
    with pytest.raises(RuntimeError, match="result 0 of mole direct differs from ours"):
        next(mole._decoding_rows("tiny", tmp_path, SETTINGS))


def test_table_building_rows(tmp_path: Path) -> None:
    rows = list(mole_training.building_rows("tiny", tmp_path, SETTINGS))
    assert [row.metric for row in rows] == ["build_mb_s", "build_peak_bytes"] * 2
    assert all(row.value > 0 for row in rows)


def test_training_rows_without_the_text_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mole_training, "real_tokens", lambda *_, **__: None)
    (row,) = mole_training.training_rows("tiny", SETTINGS)
    assert row.reason is not None
    assert "tenfold assets get" in row.reason


def test_training_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(40, (1, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(mole_training, "real_tokens", lambda *_, **__: ids)
    repeats, timed = mole_training.training_rows("tiny", SETTINGS)
    assert (repeats.metric, repeats.value) == ("tokens_per_distinct_id", 64 / len(ids.unique()))
    assert (timed.metric, timed.peer) == ("train_step_ms", "naive")


STUDY = quality.Study(
    steps=8, batch_size=2, sequence_length=16, vocabulary=300, val_batches=2, task_documents=2, learning_rate=3e-3
)


class Text:
    """Stands in for the data module: sequences of a small cycle of ids."""

    vocab_size = 40

    def __init__(self, **options: object) -> None:
        self.options = options

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        assert stage == "fit"

    def train_dataloader(self) -> list[dict[str, torch.Tensor]]:
        ids = torch.arange(32).view(2, 16) % 40
        return [{"input_ids": ids, "labels": ids}, {"input_ids": ids.flip(1), "labels": ids.flip(1)}]

    val_dataloader = train_dataloader


def test_a_study_keeps_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tenfold.datamodules

    made = []
    monkeypatch.setattr(
        tenfold.datamodules, "TextDataModule", lambda **options: made.append(options) or Text(**options)
    )
    monkeypatch.setattr(quality, "task_scores", lambda *_: {})
    first = quality.run_one("mole-4e", 1, STUDY, tmp_path)
    assert quality.run_one("mole-4e", 1, STUDY, tmp_path) == first
    assert [options["seed"] for options in made] == [1]
    assert json.loads((tmp_path / STUDY.digest / "mole-4e-1.json").read_text()) == first
    # another seed and other settings are other runs
    assert quality.run_one("mole-4e", 2, STUDY, tmp_path)["val_loss"] != first["val_loss"]
    assert quality.Study().digest != STUDY.digest
    with pytest.raises(ValueError, match="unknown variant 'mole-5e'; there are dense, dense-5x-wide"):
        quality.run_one("mole-5e", 1, STUDY, tmp_path)


@pytest.mark.parametrize("variant", quality.VARIANTS)
def test_every_variant_learns(variant: str) -> None:
    torch.manual_seed(0)
    model = quality.VARIANTS[variant](40, 64).train()
    batches = Text().train_dataloader()
    before = quality.held_out_loss(model, batches, 2)
    quality.train(model, batches, STUDY)
    assert quality.held_out_loss(model.eval(), batches, 2) < before - 0.2


def test_variants_have_the_sizes_that_they_are_named_for() -> None:
    count = {name: sum(p.numel() for p in build(4096, 128).parameters()) for name, build in quality.VARIANTS.items()}
    layers, d, width, vocabulary = 4, 128, 512, 4096
    experts = layers * (4 * 2 * d * width + 4 * d + d)
    assert count["mole-4e"] - count["dense"] == experts
    assert count["dense-5x-wide"] - count["dense"] == layers * 4 * 2 * d * width
    assert count["moe-top2"] == count["moe-all-active"]
    assert count["token-table-4e"] - count["dense"] == layers * (vocabulary * 4 * d + 4 * d)
    assert count["bigram-4e"] - count["dense"] == experts + 49152 * d


def test_quality_rows_compare_with_dense_and_leave_out_the_majority_class_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(loss: float, bits: float, cloze: float, yes_no: float) -> dict[str, Any]:
        scores = {"wikipedia_title_cloze": cloze, "wikipedia_yes_no": yes_no}
        return {
            "parameters": 7,
            "val_loss": loss,
            "scores": {task: {"acc,none": value} for task, value in scores.items()}
            | {"wikipedia_bits_per_byte": {"bits_per_byte,none": bits}},
        }

    found = {
        "dense": [result(4.0, 2.0, 0.2, 0.5), result(6.0, 2.0, 0.3, 0.5)],
        "mole-4e": [result(4.0, 1.0, 0.5, 0.6), result(4.0, 1.0, 0.5, 0.4)],
    }

    class Found:
        def all(self, *_: object) -> dict[str, list[dict[str, Any]]]:
            return found

    monkeypatch.setattr(mole_quality, "runs", lambda *_: Found())
    monkeypatch.setattr(mole_quality, "FOLDER", tmp_path / "runs")
    rows = {(row.case.split()[0], row.metric): row for row in mole_quality.run(Settings("cpu"))}
    loss = rows["mole-4e", "val_loss"]
    assert (loss.value, loss.peer, loss.peer_value, loss.ratio, loss.repeats) == (4.0, "dense", 5.0, 1.25, 2)
    assert rows["dense", "val_loss"].spread == 2.0
    assert rows["dense", "val_loss"].peer is None
    assert rows["mole-4e", "wikipedia_bits_per_byte"].ratio == 2.0
    yes_no = rows["mole-4e", "wikipedia_yes_no"]
    assert (yes_no.bound, yes_no.bound_value) == ("always yes", 0.625)
    assert yes_no.spread == pytest.approx(0.2)
    assert rows["mole-4e", "wikipedia_title_cloze"].bound_value == 0.25
    assert rows["mole-4e", "wikipedia_title_cloze"].ratio == pytest.approx(2.0)
    assert rows["mole-4e", "mean accuracy with the majority-class task"].value == pytest.approx(0.5)
    assert rows["dense", "mean accuracy with the majority-class task"].value == pytest.approx(0.375)
    assert rows["dense", "mean accuracy without the majority-class task"].value == pytest.approx(0.25)
    with Image.open(tmp_path / "runs" / "mole-quality.png") as picture:
        assert np.asarray(picture).std() > 5


def test_a_picture_needs_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no panel"):
        draw([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="'dense' has no values for 'loss'"):
        draw([Panel("loss", {"dense": []})], tmp_path / "a.png")
    assert not any(tmp_path.iterdir())
