"""The Lightning plugin: a run's checkpoints restore, resume, survive deletion, and stay apart from other runs'."""

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tenfold.callbacks import ExCPCheckpointIO, ExCPMetrics, RunCheckpoint
from tenfold.callbacks.excp import ExCPOptions, chain, expanded, load_checkpoint, restore
from tenfold.callbacks.excp.container import is_save, read_identity
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(pl.LightningModule):
    """Small, but with tensors large enough to be coded."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))
        self.seen: list[float] = []

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))
        self.seen.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        optimiser = torch.optim.AdamW(self.parameters(), 1e-3, betas=(0.9, 0.95))
        return [optimiser], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 30), "interval": "step"}]


class Keep(Callback):
    """Exact weights and first moments after chosen steps."""

    def __init__(self, every: int) -> None:
        self.every, self.states = every, {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.states[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}


def run(
    folder: Path,
    steps: int,
    *,
    every: int = 5,
    checkpoint: ModelCheckpoint | None = None,
    ckpt_path: Path | None = None,
    io: ExCPCheckpointIO | None = None,
    callbacks: tuple[Callback, ...] = (),
    logger: Any = False,
    width: int = 96,
) -> tuple[Net, ExCPCheckpointIO, pl.Trainer]:
    torch.manual_seed(0)
    io = io or ExCPCheckpointIO(ExCPOptions(min_numel=256))
    data = DataLoader(TensorDataset(torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))), batch_size=8)
    checkpoint = checkpoint or RunCheckpoint(dirpath=str(folder), every_n_train_steps=every, save_top_k=1)
    model = Net(width)
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, checkpoint],
        plugins=[io],
        logger=logger,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model, io, trainer


def keeping_all(folder: Path, every: int = 5) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, "step{step}", auto_insert_metric_name=False, save_top_k=-1, every_n_train_steps=every
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def stored(folder: Path) -> list[Path]:
    return sorted((folder / "excp").glob("*.excp"))


def test_every_save_of_a_run_restores_within_its_stated_error(tmp_path: Path) -> None:
    keep = Keep(5)
    _, io, _ = run(tmp_path, 60, checkpoint=keeping_all(tmp_path), callbacks=(keep,))
    events = {event.step: event for event in io.take_events()}
    assert sorted(events) == list(range(5, 65, 5))
    for step, exact in keep.states.items():
        restored = load_checkpoint(tmp_path / f"step{step}.ckpt")
        assert restored["global_step"] == step
        assert restored["lr_schedulers"][0]["last_epoch"] == step
        for part in events[step].report.parameters:
            error = (restored["state_dict"][part.name] - exact[part.name]).double().norm()
            assert float(error) == pytest.approx(part.squared_error**0.5, rel=1e-3, abs=1e-9)
            if not events[step].key_frame:
                step_norm = (exact[part.name] - keep.states[step - 5][part.name]).double().norm()
                assert part.squared_step**0.5 == pytest.approx(float(step_norm), rel=1e-3)
                assert error <= 0.5 * step_norm * 1.001
    assert [step for step, event in events.items() if event.key_frame] == [5]


def test_key_frames_come_every_k_saves_and_bound_what_a_restore_reads(tmp_path: Path) -> None:
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), key_frame_every=4)
    run(tmp_path, 50, checkpoint=keeping_all(tmp_path), io=io)
    positions = [read_identity(tmp_path / f"step{step}.ckpt").position for step in range(5, 55, 5)]
    assert positions == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    read: list[int] = []
    restore(tmp_path / "step20.ckpt", progress=lambda done, total: read.append(total))
    assert read == [4, 4, 4, 4, 4][: len(read)]


def test_resume_continues_loops_schedule_and_chain(tmp_path: Path) -> None:
    whole, _, _ = run(tmp_path / "whole", 40)
    run(tmp_path / "cut", 20)
    restored = load_checkpoint(tmp_path / "cut" / "last.ckpt")
    model, io, trainer = run(tmp_path / "cut", 40, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert trainer.global_step == 40
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 40
    assert len(model.seen) == 20
    # training starts from the stored weights exactly, which are near the true ones
    assert restored["state_dict"]["net.0.weight"].shape == (96, 64)
    first = io.take_events()[0]
    assert (first.step, first.key_frame) == (25, False)
    assert first.report.step_source == "exact"
    # the steps that were left, from where the first twenty had led
    assert abs(model.seen[-1] - whole.seen[-1]) < abs(whole.seen[0] - whole.seen[-1])
    assert model.seen[0] < whole.seen[0]


def test_resumed_weights_are_the_stored_ones_bit_for_bit(tmp_path: Path) -> None:
    run(tmp_path, 20)
    expected = load_checkpoint(tmp_path / "last.ckpt")

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert all(torch.equal(v, expected["state_dict"][k]) for k, v in pl_module.state_dict().items())
            state = trainer.optimizers[0].state_dict()["state"]
            for number, values in expected["optimizer_states"][0]["state"].items():
                assert all(
                    torch.equal(torch.as_tensor(values[k]), torch.as_tensor(v)) for k, v in state[number].items()
                )

    run(tmp_path, 25, ckpt_path=tmp_path / "last.ckpt", callbacks=(Look(),))


def test_last_repeats_the_save_beside_it(tmp_path: Path) -> None:
    _, io, _ = run(tmp_path, 20)
    events = io.take_events()
    assert [(event.path.name, event.alias) for event in events[-2:]] == [("step20.ckpt", False), ("last.ckpt", True)]
    one, other = load_checkpoint(tmp_path / "step20.ckpt"), load_checkpoint(tmp_path / "last.ckpt")
    for name, weight in one["state_dict"].items():
        assert torch.equal(weight, other["state_dict"][name])
    for number, values in one["optimizer_states"][0]["state"].items():
        assert torch.equal(values["exp_avg_sq"], other["optimizer_states"][0]["state"][number]["exp_avg_sq"])


def test_a_repetition_keeps_what_differs(tmp_path: Path, make_checkpoint: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256))
    io.save_checkpoint(state | {"note": 1, "buffer": torch.arange(3)}, tmp_path / "0.ckpt")
    io.save_checkpoint(state | {"note": 2, "buffer": torch.arange(3)}, tmp_path / "1.ckpt")
    # another small tensor: the state is another one
    io.save_checkpoint(state | {"note": 3, "buffer": torch.arange(1, 4)}, tmp_path / "2.ckpt")
    io.teardown()
    assert [read_identity(tmp_path / f"{n}.ckpt").alias for n in range(3)] == [False, True, False]
    loaded = [load_checkpoint(tmp_path / f"{n}.ckpt") for n in range(3)]
    assert [(state["note"], state["buffer"].tolist()) for state in loaded] == [
        (1, [0, 1, 2]),
        (2, [0, 1, 2]),
        (3, [1, 2, 3]),
    ]
    assert all(torch.equal(each["state_dict"]["w"], state["state_dict"]["w"]) for each in loaded)


def test_ranking_out_and_overwriting_leave_what_the_rest_needs(tmp_path: Path) -> None:
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), key_frame_every=4)
    run(tmp_path, 50, io=io)
    assert visible(tmp_path) == ["last.ckpt", "step50.ckpt"]
    # the group of the key frame at step 45 and no older one: 45, 50 and the alias
    assert [read_identity(path).position for path in stored(tmp_path)] == [0, 1, 2]
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 50


def test_deleting_any_visible_file_by_hand_harms_no_other(tmp_path: Path) -> None:
    run(tmp_path, 30, checkpoint=keeping_all(tmp_path))
    before = {step: load_checkpoint(tmp_path / f"step{step}.ckpt")["state_dict"] for step in (15, 30)}
    for step in (5, 10, 20, 25):
        (tmp_path / f"step{step}.ckpt").unlink()
    # the run goes on and collects what nobody needs
    run(tmp_path, 35, checkpoint=keeping_all(tmp_path), ckpt_path=tmp_path / "step30.ckpt")
    for step, state in before.items():
        restored = load_checkpoint(tmp_path / f"step{step}.ckpt")["state_dict"]
        assert all(torch.equal(restored[name], weight) for name, weight in state.items())
    assert len(stored(tmp_path)) == 7
    for step in (30, 35):
        (tmp_path / f"step{step}.ckpt").unlink()
    io = ExCPCheckpointIO()
    io.remove_checkpoint(tmp_path / "step15.ckpt")
    io.teardown()
    assert stored(tmp_path) == []


def test_links_follow(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(
        tmp_path, "step{step}", auto_insert_metric_name=False, save_top_k=1, save_last="link", every_n_train_steps=5
    )
    run(tmp_path, 20, checkpoint=checkpoint)
    assert (tmp_path / "last.ckpt").is_symlink()
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 20
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "best.ckpt").symlink_to(tmp_path / "step20.ckpt")
    assert load_checkpoint(elsewhere / "best.ckpt")["global_step"] == 20


def test_a_copied_folder_is_complete_and_not_emptied(tmp_path: Path) -> None:
    run(tmp_path / "a", 20, checkpoint=keeping_all(tmp_path / "a"))
    # plain copies: no hard links left
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "b", 25, checkpoint=keeping_all(tmp_path / "b"), ckpt_path=tmp_path / "b" / "step10.ckpt")
    for step in (5, 10, 15, 20, 25):
        assert load_checkpoint(tmp_path / "b" / f"step{step}.ckpt")["global_step"] == step


def test_a_run_continued_in_another_folder_takes_its_base_along(tmp_path: Path) -> None:
    run(tmp_path / "a", 20)
    _, io, _ = run(tmp_path / "b", 30, ckpt_path=tmp_path / "a" / "last.ckpt")
    assert [event.key_frame for event in io.take_events() if not event.alias] == [False, False]
    shutil.rmtree(tmp_path / "a")
    assert load_checkpoint(tmp_path / "b" / "last.ckpt")["global_step"] == 30


def test_two_runs_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path, "a{step}", auto_insert_metric_name=False, every_n_train_steps=5)
    run(tmp_path, 20, checkpoint=first)
    kept = load_checkpoint(tmp_path / "a20.ckpt")["state_dict"]
    second = ModelCheckpoint(tmp_path, "b{step}", auto_insert_metric_name=False, every_n_train_steps=5)
    run(tmp_path, 20, checkpoint=second, width=128)
    assert load_checkpoint(tmp_path / "b20.ckpt")["state_dict"]["net.0.weight"].shape == (128, 64)
    again = load_checkpoint(tmp_path / "a20.ckpt")["state_dict"]
    assert all(torch.equal(again[name], weight) for name, weight in kept.items())
    assert len({read_identity(path).chain_id for path in stored(tmp_path)}) == 2


def test_two_processes_with_one_chain_do_not_share_it(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    options = ExCPOptions(min_numel=256)
    one, other = (ExCPCheckpointIO(options, asynchronous=False) for _ in range(2))
    one.save_checkpoint(state, tmp_path / "0.ckpt")
    other.load_checkpoint(tmp_path / "0.ckpt")
    one.save_checkpoint(move(state, seed=1), tmp_path / "1.ckpt")
    # `one` holds the chain
    other.save_checkpoint(move(state, seed=2), tmp_path / "2.ckpt")
    assert [read_identity(tmp_path / f"{n}.ckpt").position for n in (0, 1, 2)] == [0, 1, 0]
    # and what it has not shown yet is not the other's to collect
    other.remove_checkpoint(tmp_path / "1.ckpt")
    one.save_checkpoint(move(state, seed=3), tmp_path / "3.ckpt")
    load_checkpoint(tmp_path / "3.ckpt")
    one.teardown()
    other.teardown()


def test_saves_that_must_be_exact_are_key_frames(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    # three levels cannot be that near
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256, weight_bits=2, error_target=1e-6), asynchronous=False)
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    io.save_checkpoint(move(state, seed=1), tmp_path / "1.ckpt")
    io.teardown()
    assert [read_identity(tmp_path / f"{number}.ckpt").base_id for number in (0, 1)] == [None, None]


def test_a_chain_goes_on_when_all_its_names_are_gone(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), asynchronous=False)
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    io.remove_checkpoint(tmp_path / "0.ckpt")
    io.save_checkpoint(move(state, seed=1), tmp_path / "1.ckpt")
    io.teardown()
    assert read_identity(tmp_path / "1.ckpt").position == 1
    assert load_checkpoint(tmp_path / "1.ckpt")["global_step"] == 110


def test_bases_deleted_by_hand_start_a_new_chain(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), asynchronous=False)
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    shutil.rmtree(tmp_path / "excp")
    io.save_checkpoint(move(state, seed=1), tmp_path / "1.ckpt")
    assert read_identity(tmp_path / "1.ckpt").base_id is None
    io.save_checkpoint(move(state, seed=2), tmp_path / "2.ckpt")
    for path in stored(tmp_path):
        if "-key-" in path.name:
            path.unlink()
    with pytest.raises(ValueError, match=r"2\.ckpt: the save [0-9a-f]{16} is missing in .*excp") as error:
        load_checkpoint(tmp_path / "2.ckpt")
    assert "\n" not in str(error.value)
    io.teardown()


def test_another_model_in_the_same_plugin_gets_its_own_chain(tmp_path: Path, make_checkpoint: Any) -> None:
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), asynchronous=False)
    io.save_checkpoint(make_checkpoint({"w": torch.randn(40, 50)}), tmp_path / "0.ckpt")
    io.save_checkpoint(make_checkpoint({"v": torch.randn(60, 50)}), tmp_path / "1.ckpt")
    assert read_identity(tmp_path / "1.ckpt").base_id is None
    assert load_checkpoint(tmp_path / "0.ckpt")["state_dict"]["w"].shape == (40, 50)
    io.teardown()


def test_plain_checkpoints_still_load_and_are_removed(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 4}, tmp_path / "plain.ckpt")
    io = ExCPCheckpointIO()
    assert io.load_checkpoint(tmp_path / "plain.ckpt")["epoch"] == 4
    io.remove_checkpoint(tmp_path / "plain.ckpt")
    io.teardown()
    assert not (tmp_path / "plain.ckpt").exists()


def test_load_from_checkpoint_through_an_expanded_file(tmp_path: Path) -> None:
    run(tmp_path, 10)
    with expanded(tmp_path / "last.ckpt") as plain:
        assert not is_save(plain)
        model = Net.load_from_checkpoint(plain, weights_only=True)
    assert not plain.exists()
    state = load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert all(torch.equal(value.cpu(), state[name]) for name, value in model.state_dict().items())


def test_metrics_reach_the_logger_at_the_saved_step(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    run(tmp_path / "run", 20, logger=logger, callbacks=(ExCPMetrics(),))
    import csv

    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("ckpt/ratio")]
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20]
    assert [float(row["ckpt/key_frame"]) for row in rows] == [1, 0, 0, 0]
    assert all(float(row["ckpt/ratio"]) > 8 for row in rows[1:])
    assert all(0 < float(row["ckpt/error_over_step"]) < 1 for row in rows[1:])
    assert all(float(row["ckpt/blocked_s"]) > 0 for row in rows)


@pytest.fixture
def slow_encode(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Coding waits until the event is set."""
    go = threading.Event()
    real = chain.encode

    def encode(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(chain, "encode", encode)
    yield go
    go.set()


def test_training_goes_on_while_a_save_is_coded_and_removals_wait(
    tmp_path: Path, make_checkpoint: Any, slow_encode: threading.Event
) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256))
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    io.save_checkpoint(state, tmp_path / "last.ckpt")
    io.remove_checkpoint(tmp_path / "0.ckpt")
    assert not tmp_path.joinpath("0.ckpt").exists()
    slow_encode.set()
    io.teardown()
    # were the removal first, 0.ckpt would be there
    assert visible(tmp_path) == ["last.ckpt"]
    assert torch.equal(load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"], state["state_dict"]["w"])


def test_what_is_written_is_the_state_at_the_call(
    tmp_path: Path, make_checkpoint: Any, slow_encode: threading.Event
) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    exact = state["state_dict"]["w"].clone()
    seen = Counter(a=1)
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256))
    io.save_checkpoint(state | {"seen": seen}, tmp_path / "0.ckpt")
    state["state_dict"]["w"] += 1
    state["optimizer_states"][0]["param_groups"][0]["lr"] = 99
    seen["a"] = 99
    slow_encode.set()
    io.teardown()
    loaded = load_checkpoint(tmp_path / "0.ckpt", weights_only=False)
    assert loaded["seen"]["a"] == 1
    assert torch.equal(loaded["state_dict"]["w"], exact)
    assert loaded["optimizer_states"][0]["param_groups"][0]["lr"] == 1e-3


def test_memory_stays_bounded_over_many_saves(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(100, 100)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256))
    buffers = set()
    for number in range(6):
        state = move(state, seed=number)
        io.save_checkpoint(state, tmp_path / "last.ckpt")
        assert io._stage.held is not None
        buffers |= {tensor.data_ptr() for tensor in io._stage.held.tensors.values() if tensor.numel() > 1}
    io.teardown()
    # two sets of weights, one of each moment
    assert len(buffers) == 4


def test_an_error_of_the_worker_surfaces_at_the_next_save_and_at_the_end(
    tmp_path: Path, make_checkpoint: Any, move: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256))
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    io.wait()
    whole = load_checkpoint(tmp_path / "0.ckpt")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tenfold.callbacks.excp.container.torch.save", full)
    second = move(state, seed=1)
    io.save_checkpoint(second, tmp_path / "1.ckpt")
    io.wait()
    with pytest.raises(OSError, match=r"1\.ckpt was not saved: .*No space left on device; free space") as error:
        io.save_checkpoint(second, tmp_path / "last.ckpt")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    # the same state once more: it must not pass for a repetition of a save that never was
    io.save_checkpoint(second, tmp_path / "last.ckpt")
    io.wait()
    near = load_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"]
    step = (second["state_dict"]["w"] - state["state_dict"]["w"]).norm()
    assert (near - second["state_dict"]["w"]).norm() < step
    assert visible(tmp_path) == ["0.ckpt", "last.ckpt"]
    assert torch.equal(load_checkpoint(tmp_path / "0.ckpt")["state_dict"]["w"], whole["state_dict"]["w"])
    monkeypatch.setattr("tenfold.callbacks.excp.container.torch.save", full)
    io.save_checkpoint(move(state, seed=2), tmp_path / "3.ckpt")
    with pytest.raises(OSError, match=r"3\.ckpt was not saved"):
        io.teardown()
    monkeypatch.undo()
    io.teardown()


def test_a_folder_that_cannot_be_written(tmp_path: Path, make_checkpoint: Any) -> None:
    io = ExCPCheckpointIO(asynchronous=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"0\.ckpt was not saved: .*file.*; free space or name another folder"):
        io.save_checkpoint(make_checkpoint({"w": torch.randn(80, 80)}), tmp_path / "file" / "0.ckpt")
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(OSError, match="Permission denied"):
            io.save_checkpoint(make_checkpoint({"w": torch.randn(80, 80)}), tmp_path / "0.ckpt")
        tmp_path.chmod(0o700)
    io.teardown()


def test_a_folder_in_the_way(tmp_path: Path, make_checkpoint: Any) -> None:
    (tmp_path / "0.ckpt").mkdir()
    io = ExCPCheckpointIO(asynchronous=False)
    with pytest.raises(ValueError, match=r"0\.ckpt is a folder"):
        io.save_checkpoint(make_checkpoint({"w": torch.randn(80, 80)}), tmp_path / "0.ckpt")
    io.teardown()


def test_values_that_are_not_finite_are_stored_exactly(tmp_path: Path, make_checkpoint: Any, move: Any) -> None:
    state = make_checkpoint({"w": torch.randn(40, 50), "v": torch.randn(40, 50)})
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), asynchronous=False)
    io.save_checkpoint(state, tmp_path / "0.ckpt")
    state = move(state, seed=1)
    state["state_dict"]["w"][3, 4] = float("nan")
    io.save_checkpoint(state, tmp_path / "1.ckpt")
    loaded = load_checkpoint(tmp_path / "1.ckpt")["state_dict"]
    assert torch.equal(loaded["w"].view(torch.int32), state["state_dict"]["w"].view(torch.int32))
    assert any("not finite" in note for part in io.take_events()[-1].report.parameters for note in part.notes)
    io.teardown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"key_frame_every": 0}, "key_frame_every=0 is out of range; use 1 or more"),
        ({"workers": 0}, "workers=0 is out of range"),
    ],
)
def test_options_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExCPCheckpointIO(**arguments)


def test_map_location_and_storage_options(tmp_path: Path, make_checkpoint: Any) -> None:
    io = ExCPCheckpointIO(asynchronous=False)
    io.save_checkpoint(make_checkpoint({"w": torch.randn(80, 80)}), tmp_path / "0.ckpt")
    assert io.load_checkpoint(tmp_path / "0.ckpt", map_location="meta")["state_dict"]["w"].is_meta
    with pytest.raises(ValueError, match="is not a device; name one"):
        io.load_checkpoint(tmp_path / "0.ckpt", map_location={"cuda:0": "cpu"})
    with pytest.raises(ValueError, match="takes no storage_options"):
        io.save_checkpoint({}, tmp_path / "1.ckpt", storage_options={"a": 1})
    io.teardown()
