"""`tenfold checkpoint`: what it shows, finds, expands and codes, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.callbacks import ExCPCheckpointIO
from tenfold.callbacks.excp import ExCPOptions, load_checkpoint
from tenfold.callbacks.excp.container import is_save, read_identity, read_save
from tenfold.experiments.cli import main

SAVES = 4


def state(step: int) -> dict[str, Any]:
    weights = {f"layers.{n}.weight": torch.randn(40, 50, generator=torch.Generator().manual_seed(n)) for n in range(2)}
    for number, weight in enumerate(weights.values()):
        for past in range(step):
            weight += 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * past + number))
    moments = {
        number: {
            "step": torch.tensor(float(step)),
            "exp_avg": 1e-4 * weight,
            "exp_avg_sq": 1e-7 * weight**2 + 1e-9,
        }
        for number, weight in enumerate(weights.values())
    }
    group = {"params": [0, 1], "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [group]}],
        "epoch": 0,
        "global_step": 10 * step,
        "hyper_parameters": {"width": 40},
    }


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    """A folder with a chain of four saves and an alias."""
    io = ExCPCheckpointIO(ExCPOptions(min_numel=256), asynchronous=False)
    folder = tmp_path / "coded"
    for step in range(SAVES):
        io.save_checkpoint(state(step), folder / f"step{10 * step}.ckpt")
    io.save_checkpoint(state(SAVES - 1) | {"note": "last"}, folder / "last.ckpt")
    io.teardown()
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A folder with the same states as plain checkpoints, whose names are not in the order of their steps."""
    folder = tmp_path / "plain"
    folder.mkdir()
    for step in range(SAVES):
        torch.save(state(step), folder / f"step{10 * step}.ckpt")
    return folder


def table(text: str, title: str) -> list[dict[str, str]]:
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line == title or line.endswith(title))
    names = lines[start + 1].split("\t")
    rows = []
    for line in lines[start + 2 :]:
        if "\t" not in line:
            break
        rows.append(dict(zip(names, line.split("\t"), strict=True)))
    return rows


def test_inspect_shows_groups_and_chain(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(coded / "step20.ckpt")]) == 0
    out = capsys.readouterr().out
    groups = table(out, "step20.ckpt")
    assert [row["tensor"] for row in groups] == ["layers.*.weight", "all"]
    assert groups[0]["elements"] == "4,000"
    assert 0 < float(groups[0]["error / step"]) < 0.51
    chain = table(out, "its chain")
    assert [row["step"] for row in chain] == ["0", "10", "20", "30", "30"]
    assert [row["kind"].split()[0] for row in chain] == ["key", "residual", "residual", "residual", "repeats"]
    assert [row["this one"] for row in chain] == ["", "", "<-", "", ""]
    assert [int(row["file bytes"]) for row in chain[:4]] == [
        (coded / f"step{10 * step}.ckpt").stat().st_size for step in range(SAVES)
    ]
    exact, stored = state(2)["state_dict"], load_checkpoint(coded / "step20.ckpt")["state_dict"]
    error = sum(float((exact[name] - stored[name]).norm()) ** 2 for name in exact) ** 0.5
    before = state(1)["state_dict"]
    step = sum(float((exact[name] - before[name]).norm()) ** 2 for name in exact) ** 0.5
    assert float(chain[2]["error / step"]) == pytest.approx(error / step, abs=1e-3)


def test_inspect_a_folder_by_parameter_with_a_report(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = coded.parent / "report.html"
    assert main(["checkpoint", "inspect", str(coded), "--parameters", "--report", str(report)]) == 0
    names = [row["tensor"] for row in table(capsys.readouterr().out, "last.ckpt")]
    assert names == ["layers.0.weight", "layers.1.weight", "all"]
    page = report.read_text()
    assert "<svg" in page
    assert "layers.1.weight" in page


def test_verify_finds_damage(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(coded)]) == 0
    assert "5 of 5 saves are whole" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(coded / "last.ckpt")]) == 0
    path = next((coded / "excp").glob("000002-*"))
    content = bytearray(path.read_bytes())
    content[content.find(read_save(path).payload) + 10] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    capsys.readouterr()
    assert main(["checkpoint", "verify", str(coded)]) == 1
    captured = capsys.readouterr()
    assert "2 of 5 saves are whole" in captured.out
    lines = captured.err.strip().splitlines()
    assert len(lines) == 3
    assert "(step20.ckpt)" in lines[0]
    assert main(["checkpoint", "verify", str(coded / "step30.ckpt")]) == 2
    assert "needs a save that is damaged" in capsys.readouterr().err


def test_expand_gives_what_the_chain_holds(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = coded.parent / "plain.ckpt"
    assert main(["checkpoint", "expand", str(coded / "last.ckpt"), "--output", str(output)]) == 0
    assert not is_save(output)
    found = torch.load(output, weights_only=True)
    expected = load_checkpoint(coded / "last.ckpt")
    assert found.pop("note") == expected.pop("note") == "last"
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    before = output.read_bytes()
    assert main(["checkpoint", "expand", str(coded / "step0.ckpt"), "--output", str(output)]) == 2
    assert "exists; name a new file" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_compress_codes_a_run_in_the_order_of_its_steps(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the alphabet would put step100 before step20
    (plain / "step0.ckpt").rename(plain / "z.ckpt")
    output = plain.parent / "out"
    command = ["checkpoint", "compress", str(plain), "--output", str(output), "--min-numel", "256"]
    assert main([*command, "--key-frame-every", "3"]) == 0
    out = capsys.readouterr().out
    assert "4 checkpoints: " in out
    order = {path.name: read_identity(path).position for path in output.glob("*.ckpt")}
    assert order == {"z.ckpt": 0, "step10.ckpt": 1, "step20.ckpt": 2, "step30.ckpt": 0}
    restored = load_checkpoint(output / "step20.ckpt")
    exact = state(2)
    for name, weight in exact["state_dict"].items():
        moved = (weight - state(1)["state_dict"][name]).norm()
        assert (restored["state_dict"][name] - weight).norm() < 0.51 * moved
    assert restored["hyper_parameters"] == exact["hyper_parameters"]
    assert len(list(plain.glob("*.ckpt"))) == 4


def test_compress_goes_on_after_an_interruption(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "compress", "--output", str(plain.parent / "out"), "--min-numel", "256"]
    assert main([*command, str(plain / "step0.ckpt"), str(plain / "step10.ckpt")]) == 0
    before = (plain.parent / "out" / "step10.ckpt").stat()
    assert main([*command, str(plain)]) == 0
    assert capsys.readouterr().out.count("is there already") == 2
    assert (plain.parent / "out" / "step10.ckpt").stat().st_mtime_ns == before.st_mtime_ns
    assert [read_identity(plain.parent / "out" / f"step{10 * step}.ckpt").position for step in range(4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{tmp}/none"], "none does not exist; name a checkpoint"),
        (["inspect", "{plain}/step0.ckpt"], "is not an ExCP checkpoint; a plain one needs no ExCP"),
        (["inspect", "{plain}"], "has no coded checkpoints"),
        (["verify", "{plain}"], "has no coded checkpoints; name the folder"),
        (["expand", "{plain}", "--output", "{tmp}/x.ckpt"], "is a folder; name one checkpoint in it"),
        (["compress", "{tmp}/none", "--output", "{tmp}/x"], "none does not exist; name plain checkpoints"),
        (["compress", "{plain}", "--output", "{plain}"], "holds checkpoints to be coded; name another folder"),
        (["compress", "{plain}", "--output", "{tmp}/x", "--sparsity", "1"], "sparsity=1.0 is out of range"),
        (["compress", "{plain}", "{tmp}/twice", "--output", "{tmp}/x"], "two checkpoints are called step0.ckpt"),
        (["compress", "{tmp}/broken.ckpt", "--output", "{tmp}/x"], "cannot be read as a checkpoint of plain data"),
        (["compress", "{tmp}/empty", "--output", "{tmp}/x"], "no plain checkpoint among"),
    ],
)
def test_wrong_input_is_one_line(
    plain: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    tmp = plain.parent
    (tmp / "twice").mkdir()
    (tmp / "empty").mkdir()
    torch.save(state(0), tmp / "twice" / "step0.ckpt")
    (tmp / "broken.ckpt").write_text("no archive")
    assert main(["checkpoint", *(part.format(tmp=tmp, plain=plain) for part in arguments)]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp / "x").exists()
