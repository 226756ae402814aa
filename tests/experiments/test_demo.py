"""The demo from end to end, short, and that an interrupted one goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
from tenfold.experiments import cli


@pytest.mark.slow
def test_demo_writes_its_summary_and_goes_on(
    tmp_path: Path, require_asset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_asset("wikipedia-summaries")
    folder = tmp_path / "demo"
    command = ["demo", "--output", str(folder), "--max-steps", "4", "--limit", "6", "--wandb", "off"]

    from tenfold.experiments.demo.stages import Demo

    with monkeypatch.context() as patch:
        patch.setattr(Demo, "export", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(command) == 130
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("train/*/checkpoints/last.ckpt")}
    assert len(stamps) == 3
    assert cli.main(command) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}, "trained again"

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scores"]["mole"]["experts"] == summary["scores"]["mole"]["lookup"]
    equal = summary["lookup_equals_experts"]
    assert equal["identical_greedy_tokens"] == equal["greedy_tokens"] >= 1000
    assert equal["max_abs_logit_diff"] < 1e-4
    assert summary["bytes_per_token"]["counted"] == summary["bytes_per_token"]["formula"] == 4 * 4 * 128 * 4
    assert {"train dense", "train moe", "train mole", "export", "total"} <= summary["seconds"].keys()
    for name in ("dense", "moe", "mole"):
        assert summary["held_out"][name]["val/loss"] > 0
    page = (folder / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<svg") == 2

    # a finished demo is set aside, not overwritten
    with monkeypatch.context() as patch:
        patch.setattr(Demo, "train", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(command) == 130
    assert (tmp_path / "demo-1" / "summary.json").exists()
