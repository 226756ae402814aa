"""The file: readable by torch, checked everywhere, replaced as a whole or not at all."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.callbacks.excp import EncodedSave, decode, encode
from tenfold.callbacks.excp import container as module
from tenfold.callbacks.excp.container import KEY, is_save, read_save, write_save


@pytest.fixture(scope="module")
def encoded() -> EncodedSave:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 65, generator=generator)
    state = {"step": torch.tensor(3.0), "exp_avg": 1e-4 * weight, "exp_avg_sq": 1e-7 * weight**2}
    checkpoint = {
        "epoch": 2,
        "global_step": 30,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"w": weight, "small": torch.arange(5)},
        "optimizer_states": [{"state": {0: state}, "param_groups": [{"params": [0], "lr": 1e-3}]}],
        "hyper_parameters": {
            "width": 64,
            "betas": [0.9, 0.95],
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        },
        "loops": {"fit_loop": {"state_dict": {}}},
    }
    return encode(checkpoint)


def written(encoded: EncodedSave, path: Path) -> Path:
    write_save(encoded, path)
    return path


def test_round_trip_through_the_file(encoded: EncodedSave, tmp_path: Path) -> None:
    path = written(encoded, tmp_path / "runs" / "step30.ckpt")
    read = read_save(path)
    assert read.header == encoded.header
    assert read.payload == encoded.payload
    assert read.report.ratio == encoded.report.ratio
    first, _ = decode(encoded)
    second, reference = decode(read)
    assert torch.equal(first["state_dict"]["w"], second["state_dict"]["w"])
    assert torch.equal(second["state_dict"]["small"], torch.arange(5))
    assert second["hyper_parameters"] == first["hyper_parameters"]
    assert encoded.reference is not None
    assert reference.digest == encoded.reference.digest
    assert os.listdir(path.parent) == ["step30.ckpt"]


def test_torch_reads_hyper_parameters_in_clear_and_payload_as_bytes(encoded: EncodedSave, tmp_path: Path) -> None:
    outer = torch.load(written(encoded, tmp_path / "a.ckpt"), weights_only=True)
    assert outer["hyper_parameters"]["width"] == 64
    assert (outer["epoch"], outer["global_step"]) == (2, 30)
    assert "state_dict" not in outer
    assert outer[KEY]["magic"] == "tenfold-excp"
    assert {outer[KEY][name].dtype for name in ("header", "rest", "payload")} == {torch.uint8}


def test_same_save_gives_the_same_file(encoded: EncodedSave, tmp_path: Path) -> None:
    first, second = (written(encoded, tmp_path / name / "x.ckpt") for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_is_save(encoded: EncodedSave, tmp_path: Path) -> None:
    assert is_save(written(encoded, tmp_path / "a.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    (tmp_path / "text.ckpt").write_text("tenfold-excp")
    assert not any(is_save(tmp_path / name) for name in ("plain.ckpt", "text.ckpt", "missing.ckpt"))


def test_cut_off_anywhere_is_one_line(encoded: EncodedSave, tmp_path: Path) -> None:
    data = written(encoded, tmp_path / "a.ckpt").read_bytes()
    for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99, 0.9999):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"cut\.ckpt") as error:
            read_save(path)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_anywhere_is_told_or_harmless(encoded: EncodedSave, tmp_path: Path) -> None:
    data = written(encoded, tmp_path / "a.ckpt").read_bytes()
    right, _ = decode(encoded)
    path = tmp_path / "flipped.ckpt"
    told = 0
    positions = np.random.default_rng(0).integers(0, len(data), 400)
    for position in positions.tolist():
        broken = bytearray(data)
        broken[position] ^= 1 << (position % 8)
        path.write_bytes(broken)
        try:
            decoded, _ = decode(read_save(path))
        except ValueError as error:
            told += "\n" not in str(error)
        else:
            # padding and time stamps of the archive
            assert torch.equal(decoded["state_dict"]["w"], right["state_dict"]["w"])
            assert torch.equal(
                decoded["optimizer_states"][0]["state"][0]["exp_avg_sq"],
                right["optimizer_states"][0]["state"][0]["exp_avg_sq"],
            )
            assert decoded["hyper_parameters"] == right["hyper_parameters"]
            assert decoded["global_step"] == 30
    assert told > 0.8 * len(positions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda outer: outer[KEY].update(version=2), r"ExCP version 2, this tenfold reads version 1; upgrade tenfold"),
        (lambda outer: outer[KEY].update(magic="other"), "is not an ExCP checkpoint"),
        (lambda outer: outer[KEY]["payload"][100].add_(1), r"payload is damaged \(checksum differs\)"),
        (lambda outer: outer[KEY]["header"][5].add_(1), r"header is damaged"),
        (lambda outer: outer[KEY]["rest"][5].add_(1), r"rest is damaged"),
        (lambda outer: outer[KEY].pop("rest"), "rest is missing"),
        (lambda outer: outer["hyper_parameters"].update(width=32), "clear part was altered"),
        (lambda outer: outer.pop("epoch"), "clear part was altered"),
    ],
    ids=["version", "magic", "payload", "header", "rest", "missing", "hyper-parameters", "epoch"],
)
def test_alterations_are_named(
    encoded: EncodedSave, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = written(encoded, tmp_path / "a.ckpt")
    outer = torch.load(path, weights_only=True)
    change(outer)
    torch.save(outer, path)
    with pytest.raises(ValueError, match=message):
        read_save(path)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        read_save(tmp_path / "none.ckpt")
    torch.save({"state_dict": {"a": torch.zeros(2)}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="is not an ExCP checkpoint; a plain one needs no ExCP"):
        read_save(tmp_path / "plain.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.ckpt"):
        read_save(tmp_path / "text.ckpt")


class Custom:
    """Something that torch.load refuses unless told that the file is trusted."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Custom)

    __hash__ = None  # type: ignore[assignment]


def test_objects_in_the_rest_need_trust(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    write_save(encode({"state_dict": {"w": torch.randn(70, 70)}, "callbacks": {"x": Custom()}}), path)
    with pytest.raises(ValueError, match="Weights only load failed") as error:
        read_save(path)
    assert "\n" not in str(error.value)
    assert decode(read_save(path, weights_only=False))[0]["callbacks"]["x"] == Custom()


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_failure_leaves_the_old_file_and_no_other(
    encoded: EncodedSave, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(encoded, tmp_path / "a.ckpt")
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch if where == "save" else module.os, where, full)
    with pytest.raises(OSError, match="No space left"):
        write_save(encoded, path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.ckpt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where", ["save", "fsync", "replace", "open"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_at_any_step_leaves_a_whole_file(encoded: EncodedSave, tmp_path: Path, where: str) -> None:
    path = written(encoded, tmp_path / "a.ckpt")
    child = os.fork()
    if child == 0:
        real = getattr(module.torch if where == "save" else module.os, where)

        def die(*args: Any, **kwargs: Any) -> None:
            # after the step has done its work; `open` is the folder's, after the rename
            if where == "save":
                args[1].write(b"half of it")
                args[1].flush()
            else:
                real(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(module.torch if where == "save" else module.os, where, die)
        write_save(encoded, path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert read_save(path).digest == encoded.digest
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["a.ckpt"]
