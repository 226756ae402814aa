"""Killed, full or damaged: the last good checkpoint opens, and what is lost is named."""

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.callbacks import ExCPCheckpointIO
from tenfold.callbacks.excp import ExCPOptions, container, load_checkpoint, store
from tenfold.callbacks.excp.verify import verify_folder

OPTIONS = ExCPOptions(min_numel=256)
# every call that changes the disk
STEPS = [(container.torch, "save"), (os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (Path, "unlink")]


def plugin(**arguments: Any) -> ExCPCheckpointIO:
    return ExCPCheckpointIO(OPTIONS, asynchronous=False, workers=1, key_frame_every=3, **arguments)


@pytest.fixture
def states(make_checkpoint: Any, move: Any) -> list[dict[str, Any]]:
    """Five states of a run."""
    found = [make_checkpoint({"w": torch.randn(40, 50, generator=torch.Generator().manual_seed(0))})]
    for seed in range(4):
        found.append(move(found[-1], seed=seed))
    return found


def near(checkpoint: dict[str, Any], states: list[dict[str, Any]]) -> int:
    """Which state a restored checkpoint is."""
    step = checkpoint["global_step"]
    number = (step - 100) // 10
    exact, stored = states[number]["state_dict"]["w"], checkpoint["state_dict"]["w"]
    moved = 1.0 if number == 0 else float((exact - states[number - 1]["state_dict"]["w"]).norm())
    assert float((exact - stored).norm()) <= moved
    return number


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_step_of_a_save_or_a_removal(tmp_path: Path, states: list[dict[str, Any]], when: str) -> None:
    """The saves of a run as Lightning makes them: a ranked one, its predecessor's removal, `last`; killed anywhere."""
    start = tmp_path / "start"
    io = plugin()
    for number in range(3):
        io.save_checkpoint(states[number], start / f"step{number}.ckpt")
        io.save_checkpoint(states[number], start / "last.ckpt")
    io.remove_checkpoint(start / "step0.ckpt")
    io.remove_checkpoint(start / "step1.ckpt")
    io.teardown()
    kills = 0
    while True:
        folder = tmp_path / f"{when}{kills}"
        shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _die_at(kills, when)
                io = plugin()
                io.load_checkpoint(folder / "last.ckpt")
                io.save_checkpoint(states[3], folder / "step3.ckpt")
                io.save_checkpoint(states[3], folder / "last.ckpt")
                io.remove_checkpoint(folder / "step2.ckpt")
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
        visible = sorted(path for path in folder.glob("*.ckpt") if not path.name.startswith("."))
        found = {path.name: near(load_checkpoint(path), states) for path in visible}
        assert found["last.ckpt"] in (2, 3)
        assert all(number == int(name[4]) for name, number in found.items() if name != "last.ckpt")
        assert [finding for finding in verify_folder(folder) if finding.problem] == []
        # and the run can go on
        io = plugin()
        io.load_checkpoint(folder / "last.ckpt")
        io.save_checkpoint(states[4], folder / "last.ckpt")
        io.teardown()
        assert near(load_checkpoint(folder / "last.ckpt"), states) == 4
        if os.WIFEXITED(status):
            break
        kills += 1
    assert sorted(found) == ["last.ckpt", "step3.ckpt"]
    assert kills > 10


def _die_at(count: int, when: str) -> None:
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            mine, calls = calls, calls + 1
            if mine == count and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if mine == count:
                    os.kill(os.getpid(), signal.SIGKILL)

        return step

    for owner, name in STEPS:
        setattr(owner, name, wrap(getattr(owner, name)))


@pytest.mark.parametrize(("owner", "name"), STEPS[:4], ids=["write", "fsync", "rename", "link"])
def test_a_full_disk_at_any_step_leaves_what_was_there(
    tmp_path: Path, states: list[dict[str, Any]], owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    io = plugin()
    io.save_checkpoint(states[0], tmp_path / "last.ckpt")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, name, full)
    if name == "link":
        # nothing is left for a copy either
        monkeypatch.setattr(store.shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"last\.ckpt was not saved: .*No space left on device; free space"):
        io.save_checkpoint(states[1], tmp_path / "last.ckpt")
    monkeypatch.undo()
    assert near(load_checkpoint(tmp_path / "last.ckpt"), states) == 0
    assert [finding for finding in verify_folder(tmp_path) if finding.problem] == []
    assert not list(tmp_path.rglob(".*partial"))
    io.save_checkpoint(states[2], tmp_path / "last.ckpt")
    assert near(load_checkpoint(tmp_path / "last.ckpt"), states) == 2
    io.teardown()


def test_a_file_system_without_links_gets_copies(
    tmp_path: Path, states: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    io = plugin()
    for number in range(5):
        io.save_checkpoint(states[number], tmp_path / f"step{number}.ckpt")
        if number:
            io.remove_checkpoint(tmp_path / f"step{number - 1}.ckpt")
    io.teardown()
    assert near(load_checkpoint(tmp_path / "step4.ckpt"), states) == 4
    # the second group's key frame and the residual after it
    assert len(list((tmp_path / "excp").glob("*.excp"))) == 2
    assert [finding.problem for finding in verify_folder(tmp_path)] == [None] * 3


def test_damage_anywhere_in_a_chain_is_found_and_named(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    io = ExCPCheckpointIO(OPTIONS, asynchronous=False)
    for number, state in enumerate(states):
        io.save_checkpoint(state, tmp_path / f"step{number}.ckpt")
    io.teardown()
    good = {path.name: path.read_bytes() for path in (tmp_path / "excp").glob("*.excp")}
    for name, content in sorted(good.items())[:3]:
        path = tmp_path / "excp" / name
        position = int(name[:6])
        broken = bytearray(content)
        broken[broken.find(container.read_save(path).payload) + 10] ^= 1
        with path.open("r+b") as file:
            file.write(broken)
        problems = {finding.names[0]: finding.problem for finding in verify_folder(tmp_path) if finding.problem}
        assert sorted(problems) == [f"step{number}.ckpt" for number in range(position, 5)]
        assert all("\n" not in problem for problem in problems.values())
        assert all("which is damaged" in problems[f"step{later}.ckpt"] for later in range(position + 1, 5))
        with pytest.raises(ValueError, match=r"step4\.ckpt needs a save that is damaged: .*excp"):
            load_checkpoint(tmp_path / "step4.ckpt")
        for number in range(position):
            assert near(load_checkpoint(tmp_path / f"step{number}.ckpt"), states) == number
        with path.open("r+b") as file:
            file.write(content)
    assert not any(finding.problem for finding in verify_folder(tmp_path))
    # a save under another one's name
    names = sorted(good)
    (tmp_path / "excp" / names[1]).write_bytes(good[names[2]])
    assert any("holds another save" in (finding.problem or "") for finding in verify_folder(tmp_path))


def test_a_removed_base_is_named_by_verify(tmp_path: Path, states: list[dict[str, Any]]) -> None:
    io = ExCPCheckpointIO(OPTIONS, asynchronous=False)
    for number in range(3):
        io.save_checkpoint(states[number], tmp_path / f"step{number}.ckpt")
    io.teardown()
    next((tmp_path / "excp").glob("000001-*")).unlink()
    findings = {finding.names: finding.problem for finding in verify_folder(tmp_path)}
    assert findings["step0.ckpt",] is None
    assert "missing" in (findings["step1.ckpt",] or "missing")
    assert "is missing" in (findings["step2.ckpt",] or "")
