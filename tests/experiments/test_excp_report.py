"""Tables of the ExCP evidence: what stands on which line."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tenfold.experiments.bench.rows import Row
from tenfold.experiments.excp import report


def rows(*found: Row) -> list[dict[str, Any]]:
    return [asdict(row) for row in found]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ours_and_the_papers_numbers_stand_on_lines_of_their_own() -> None:
    some = rows(
        Row("a", "momentum_error", 0.5, "", peer="paper_lzma", peer_value=0.75),
        Row("a", "ratio_per_save", 61.0, "x", peer="zstd", peer_value=1.5),
        Row("a", "ratio_per_save", 61.0, "x", peer="paper_lzma", peer_value=23.0),
    )
    heading, _, ours, theirs, _ = report.chains(some)
    ratio, moment = cells(heading).index("ratio per save"), cells(heading).index("moment error")
    assert (cells(ours)[1], cells(ours)[ratio], cells(ours)[moment]) == ("ours", "61", "0.5")
    assert (cells(theirs)[1], cells(theirs)[ratio], cells(theirs)[moment]) == ("paper's pipeline", "23", "0.75")
    # not measured is not zero
    assert cells(ours)[cells(heading).index("decode MB/s")] == "-"


def test_a_peer_that_is_not_installed_has_its_reason() -> None:
    some = rows(
        Row("a", "ratio_per_save", 61.0, "x", peer="lzma", peer_value=1.25),
        Row("a", "ratio_per_save", 61.0, "x", peer="zipnn", reason="zipnn is not installed"),
    )
    lines = {cells(line)[1]: cells(line)[2] for line in report.lossless(some) if line}
    assert (lines["lzma"], lines["zipnn"], lines["zstd"]) == ("1.25", "zipnn is not installed", "-")


def test_resumes_are_differences_to_the_exact_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = rows(
        Row("m", "loss_excess_20_steps_mean", 0.004, "nats", repeats=9),
        Row("m", "loss_excess_20_steps_largest", 0.011, "nats"),
        Row("m", "first_update_largest", 2.4, "", peer="exact_resume", peer_value=2.0),
        Row("m", "final_held_out_loss", 6.5, "nats", peer="uninterrupted", peer_value=6.25),
        Row("m", "ratio", 60.0, "x"),
        Row("m", "error_over_step", 0.5, ""),
    )
    facts = {"cpu": "a processor", "torch": "2", "date": "2026-01-02T03:04:05"}
    path = tmp_path / "resume.json"
    path.write_text(json.dumps({"bench": "excp-resume", "environment": facts, "rows": some}))
    report.main([str(path)])
    title, _, _, _, line, *_ = capsys.readouterr().out.splitlines()
    assert title == "### excp-resume: a processor, torch 2, 2026-01-02"
    assert cells(line) == ["m", "+0.0040", "+0.0110", "1.2", "+0.250", "60", "0.5", "9"]
