"""Tables of a results file of `tenfold bench excp`, `excp-resume` or `excp-downstream`, as Markdown: the README's."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
_CHAINS = ("error_over_step", "relative_error", "momentum_error", "ratio_per_save", "ratio_amortised")


def find(rows: Rows, case: str, metric: str, peer: str | None = None) -> dict[str, Any] | None:
    """The row of a case, metric and (if given) peer."""
    matching = (row for row in rows if row["case"] == case and row["metric"] == metric)
    return next((row for row in matching if peer is None or row["peer"] == peer), None)


def _field(row: dict[str, Any] | None, name: str) -> float | None:
    return None if row is None else row[name]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(headings: list[str], lines: list[list[str]]) -> Iterator[str]:
    yield _line(headings)
    yield _line(["---"] * len(headings))
    yield from map(_line, lines)
    yield ""


def chains(rows: Rows) -> Iterator[str]:
    """Ratio and errors of every chain, ours and the paper's pipeline on separate lines."""
    lines = []
    cases = dict.fromkeys(row["case"] for row in rows if row["metric"] == "momentum_error")
    for case in cases:
        found = [find(rows, case, metric, "paper_lzma") for metric in _CHAINS]
        bound = find(rows, case, "size_over_order0_bound", "paper_lzma")
        speeds = [find(rows, case, metric, "paper_lzma") for metric in ("encode_mb_s", "decode_mb_s")]
        for who, field in (("ours", "value"), ("paper's pipeline", "peer_value")):
            lines.append([case, who, *(_number(_field(row, field)) for row in [*found, bound, *speeds])])
    headings = ["case", "coder", "error / step", "error / norm", "moment error", "ratio per save",
                "ratio, 60 saves", "size / order 0", "encode MB/s", "decode MB/s"]  # fmt: skip
    yield from _table(headings, lines)


def lossless(rows: Rows) -> Iterator[str]:
    """Lossless peers: error 0."""
    metrics = ("ratio_per_save", "ratio_amortised", "encode_mb_s", "decode_mb_s")
    peers = ("torch_save", "lzma", "zstd", "shuffle_zstd", "xor_shuffle_zstd", "zipnn")
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows if row["peer"] == "lzma"):
        for peer in peers:
            found = [find(rows, case, metric, peer) for metric in metrics]
            reason = next((row["reason"] for row in found if row and row["reason"]), None)
            lines.append([case, peer, *([reason, "", "", ""] if reason else
                          [_number(_field(row, "peer_value")) for row in found])])  # fmt: skip
    yield from _table(["case", "peer", "ratio per save", "ratio, 60 saves", "encode MB/s", "decode MB/s"], lines)


def others(rows: Rows) -> Iterator[str]:
    """Blocked time, memory, updates."""
    lines = [
        [row["case"], row["metric"], _number(row["value"]), row["unit"], row["peer"] or row["bound"] or "-",
         _number(row["peer_value"] if row["peer"] else row["bound_value"])]
        for row in rows
        if row["metric"] in ("blocked_ms", "encode_peak_bytes", "first_update_ratio", "ratio_over_paper_worst_save")
        or row["peer"] == "paper_order0_bound" or row["metric"].startswith("bits_per_byte")
    ]  # fmt: skip
    yield from _table(["case", "metric", "ours", "unit", "against", "value"], lines)


def resumes(rows: Rows) -> Iterator[str]:
    """The study of resumed training, one line per mode and beta2."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        some = {row["metric"]: row for row in rows if row["case"] == case}
        excess = {key: row for key, row in some.items() if key.startswith("loss_excess")}
        mean, largest = (next(row for key, row in excess.items() if key.endswith(end)) for end in ("mean", "largest"))
        update, held_out = some["first_update_largest"], some["final_held_out_loss"]
        lines.append(
            [case, f"{mean['value']:+.4f}", f"{largest['value']:+.4f}", _number(update["value"] / update["peer_value"]),
             f"{held_out['value'] - held_out['peer_value']:+.3f}", _number(some["ratio"]["value"]),
             _number(some["error_over_step"]["value"]), str(mean["repeats"])]
        )  # fmt: skip
    headings = ["case", "loss excess, mean", "largest", "first update / exact", "held-out loss, end", "ratio",
                "error / step", "resumes"]  # fmt: skip
    yield from _table(headings, lines)


def main(files: list[str]) -> None:
    """Prints the tables of result files."""
    for file in files:
        loaded = json.loads(Path(file).read_text(encoding="utf-8"))
        for result in loaded if isinstance(loaded, list) else [loaded]:
            facts = result["environment"]
            print(f"### {result['bench']}: {facts['cpu']}, torch {facts['torch']}, {facts['date'][:10]}\n")
            makers = [resumes] if result["bench"] == "excp-resume" else [chains, lossless, others]
            for maker in makers:
                print("\n".join(maker(result["rows"])))


if __name__ == "__main__":
    main(sys.argv[1:])
