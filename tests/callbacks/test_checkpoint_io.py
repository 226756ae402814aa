import os

import pytest
import torch
from tenfold.callbacks import AtomicCheckpointIO


def test_a_round_trip_is_exact_and_leaves_one_file(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    state = {"w": torch.arange(5.0), "step": 3}
    AtomicCheckpointIO().save_checkpoint(state, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    loaded = AtomicCheckpointIO().load_checkpoint(path, weights_only=True)
    assert loaded["step"] == 3
    assert torch.equal(loaded["w"], state["w"])


@pytest.mark.parametrize("fails", ["write", "flush", "rename"])
def test_a_save_that_fails_keeps_the_old_file(tmp_path, fails, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def half_a_file(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    def full(*args):
        raise OSError(28, "No space left on device")

    if fails == "write":
        monkeypatch.setattr(torch, "save", half_a_file)
    else:
        monkeypatch.setattr(os, "fsync" if fails == "flush" else "replace", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_the_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("flush"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    assert events[:2] == ["flush", "rename"]
