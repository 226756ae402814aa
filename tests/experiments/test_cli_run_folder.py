import os
from pathlib import Path

import pytest
from tenfold.experiments.run_folder import RunFolder, RunOptions, free_name, named


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.delenv("TENFOLD_RUN_FOLDER", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return RunFolder(RunOptions(root=str(tmp_path), experiment="mole", name="tiny"))


def save_last(run: Path, mtime_s: int) -> Path:
    path = run / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    os.utime(path, (mtime_s, mtime_s))
    return path


def test_names_come_from_the_configuration_file():
    assert vars(named(RunOptions(), Path("experiments/mole/tiny.yaml"))) == vars(
        RunOptions(experiment="mole", name="tiny")
    )
    assert named(RunOptions(name="mine"), Path("experiments/mole/tiny.yaml")).name == "mine"
    assert (named(RunOptions(), None).experiment, named(RunOptions(), None).name) == ("default", "run")


@pytest.mark.parametrize("name", ["../up", "a/b", "..", ".hidden", "a b", "-flag"])
def test_a_name_is_one_folder(name):
    with pytest.raises(ValueError, match=r"--run\.name is .*folder name"):
        named(RunOptions(name=name), None)


def test_each_run_gets_its_own_folder_and_nothing_is_reused(folders):
    names = [folders.fresh(create=True).name for _ in range(3)]
    assert names == ["tiny", "tiny-2", "tiny-3"]
    assert [path.name for path in folders.existing()] == names


def test_looking_for_a_folder_makes_none(folders):
    assert folders.fresh(create=False) == folders.base
    assert not folders.base.parent.exists()


def test_runs_are_in_the_order_of_their_numbers_and_others_are_left_out(folders):
    for name in ("tiny-10", "tiny-2", "tiny", "tiny-x", "tinyer", "tiny-2-3"):
        (folders.base.parent / name).mkdir(parents=True)
    assert [path.name for path in folders.existing()] == ["tiny", "tiny-2", "tiny-10"]


def test_the_youngest_last_checkpoint_wins(folders):
    assert folders.newest_last() is None
    save_last(folders.base, 100)
    second = save_last(folders.base.with_name("tiny-2"), 300)
    save_last(folders.base.with_name("tiny-3"), 200)
    assert folders.newest_last() == second


def test_a_checkpoint_knows_its_run(folders, tmp_path):
    path = save_last(folders.base.with_name("tiny-2"), 1)
    assert folders.of_checkpoint(path) == folders.base.with_name("tiny-2")
    assert folders.of_checkpoint(save_last(tmp_path / "elsewhere", 1)) is None


def test_processes_of_one_run_share_the_folder_of_the_first(folders, monkeypatch):
    first = folders.fresh(create=True)
    (first / "config.yaml").write_text("")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert folders.fresh(create=False) == first


def test_a_free_name_never_overwrites(tmp_path):
    seen = []
    for _ in range(3):
        path = free_name(tmp_path / "config.yaml")
        path.write_text("")
        seen.append(path.name)
    assert seen == ["config.yaml", "config-2.yaml", "config-3.yaml"]
