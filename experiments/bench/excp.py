"""ExCP on real training runs: ratio and error of every save, speed, blocked time and memory, against peers.

Each run is trained once into `runs/bench/excp` (a broken-off one goes on), then every coder takes the same chain of
saves. What a chain gave is kept beside the saves until the coder's source or settings change. A case without a suffix
is the codec at its defaults. ` paper-settings` has the thresholds of the released code. ` equal-error` spends as many
bits as it takes to be no farther from the true weights and first moments than the paper's pipeline is at that save.
` clamp` is where the paper's threshold is at its limit of 2.5 medians for every tensor, which is what its headline
ratios need. Speeds count CPU seconds of one core.

The paper's pipeline takes a minute and more for a save of 1.6 GB: of `finetune-135m` it gets every eighth parameter,
and so does the codec wherever the two are compared at equal settings or errors.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from ...callbacks.excp import ExCPOptions
from ...callbacks.excp.staging import HostStage
from ..excp.training import RunSettings, make_saves
from . import excp_lossless
from .excp_chain import (
    CODEC_SOURCES,
    PAPER_SOURCES,
    Progress,
    SaveNumbers,
    amortised_ratio,
    code_ours,
    code_paper,
    load,
    measured,
)
from .registry import Settings
from .rows import Row, compare, missing_peer, ratio
from .timing import measure

GROUP = 60
CASES: dict[str, RunSettings] = {
    "scratch": RunSettings(
        model="dense-tiny",
        overrides=(("num_hidden_layers", 6), ("hidden_size", 384), ("num_attention_heads", 6)),
        tokenizer="bpe:8192",
        sequence_length=128,
        batch_size=8,
        learning_rate=1e-3,
        cosine_steps=440,
        warmup_steps=40,
        betas=(0.9, 0.95),
        first_save=40,
        steps_per_save=40,
        num_saves=11,
        bfloat16=True,
    ),
    "finetune-135m": RunSettings(
        model="asset:smollm2-135m",
        tokenizer="asset:smollm2-135m",
        sequence_length=128,
        batch_size=2,
        learning_rate=5e-5,
        warmup_steps=10,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        first_save=25,
        steps_per_save=25,
        num_saves=6,
    ),
}
QUICK: dict[str, RunSettings] = {
    "scratch": RunSettings(
        model="dense-tiny",
        overrides=(("num_hidden_layers", 2), ("hidden_size", 64), ("num_attention_heads", 2)),
        tokenizer="bpe:512",
        sequence_length=32,
        batch_size=4,
        first_save=5,
        steps_per_save=5,
        num_saves=4,
    )
}
# of this case every eighth parameter goes through the paper's pipeline and through the codec at its error
COMPARED = {"finetune-135m": 8}
ALPHAS = {"": 5e-5, " clamp": 1e9}
# the codec takes a finer threshold than asked for where the error wants it
_SPARSEST = 0.9999


def folder_of(case: str, settings: RunSettings) -> Path:
    """Where a run and what was measured on it lie."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs", "bench", "excp", f"{case}-{digest}")


class Case:
    """One run and the chains of its saves.

    Args:
        name: of the case.
        settings: of its run.
    """

    def __init__(self, name: str, settings: RunSettings) -> None:
        self.name, self.settings = name, settings
        self.folder = folder_of(name, settings)
        self.paths = make_saves(settings, self.folder, self.report)

    def report(self, line: str) -> None:
        """One line of progress."""
        print(f"{self.name}: {line}", flush=True)

    def ours(
        self, label: str, options: list[ExCPOptions], momentum_errors: list[float] | None = None, *, every: int = 1
    ) -> list[SaveNumbers]:
        """Our codec with the options of each save; `momentum_errors` as `code_ours` takes them."""

        def work(progress: Progress) -> list[SaveNumbers]:
            self.report(f"chain{label or ' at the defaults'}")
            return code_ours(self.paths, options.__getitem__, progress=progress, momentum_errors=momentum_errors)

        path = self.folder / f"ours{label.replace(' ', '-')}{_suffix(every)}"
        return measured(path, CODEC_SOURCES, (options, momentum_errors), work, every=every, report=self.report)

    def paper(self, regime: str, *, every: int = 1) -> list[SaveNumbers]:
        """The paper's pipeline."""

        def work(progress: Progress) -> list[SaveNumbers]:
            self.report(f"the paper's pipeline{regime}")
            return code_paper(self.paths, alpha=ALPHAS[regime], progress=progress)

        path = self.folder / f"paper{regime.replace(' ', '-')}{_suffix(every)}"
        return measured(path, PAPER_SOURCES, ALPHAS[regime], work, every=every, report=self.report)

    def always(self, options: ExCPOptions) -> list[ExCPOptions]:
        """The same options at every save."""
        return [options] * len(self.paths)


def _suffix(every: int) -> str:
    return f"-every-{every}" if every > 1 else ""


def paper_settings(regime: str) -> ExCPOptions:
    """The codec with the paper's thresholds and masks, whatever becomes of the error."""
    return ExCPOptions(
        mode="paper", alpha=ALPHAS[regime], second_moment="masked", error_target=None, update_target=None
    )


def equal_error(paper: list[SaveNumbers]) -> list[ExCPOptions]:
    """The codec with each tensor's error no larger, over its step, than the paper's over all tensors."""
    targets = [0.5] + [0.999 * numbers.error_over_step for numbers in paper[1:]]
    return [ExCPOptions(sparsity=_SPARSEST, error_target=target) for target in targets]


def residual_ratio(numbers: list[SaveNumbers]) -> float:
    """Raw over coded bytes of all saves but the key frame together."""
    return sum(n.raw_bytes for n in numbers[1:]) / sum(n.coded_bytes for n in numbers[1:])


def speeds(numbers: list[SaveNumbers]) -> tuple[list[float], list[float]]:
    """MB of raw per CPU second of every residual save, encoded and decoded."""
    return (
        [n.raw_bytes / 1e6 / n.encode_s for n in numbers[1:]],
        [n.raw_bytes / 1e6 / n.decode_s for n in numbers[1:] if n.decode_s],
    )


def _rate(case: str, metric: str, ours: list[float], theirs: list[float], peer: str) -> Row:
    value, other = median(ours), median(theirs)
    return Row(
        case, metric, value, "MB/s per core", peer=peer, peer_value=other,
        ratio=ratio(value, other, higher_is_better=True), repeats=len(ours), spread=max(ours) - min(ours),
    )  # fmt: skip


def _against_paper(case: str, ours: list[SaveNumbers], paper: list[SaveNumbers]) -> Iterator[Row]:
    """Ratios, each followed by the errors that it was bought with."""
    count = len(ours) - 1
    value, other = residual_ratio(ours), residual_ratio(paper)
    bound = sum(n.raw_bytes for n in ours[1:]) / sum(n.bound_bytes for n in ours[1:])
    theirs = sum(n.raw_bytes for n in paper[1:]) / sum(n.bound_bytes for n in paper[1:])
    better = ratio(value, other, higher_is_better=True)
    yield Row(
        case, "ratio_per_save", value, "x", peer="paper_lzma", peer_value=other, ratio=better,
        bound="order-0 entropy of our streams", bound_value=bound, repeats=count,
    )  # fmt: skip
    yield Row(
        case, "ratio_per_save", value, "x", peer="paper_order0_bound", peer_value=theirs,
        ratio=ratio(value, theirs, higher_is_better=True), repeats=count,
    )  # fmt: skip
    worst = min(a.ratio / b.ratio for a, b in zip(ours[1:], paper[1:], strict=True))
    yield Row(case, "ratio_over_paper_worst_save", worst, "x", repeats=count)
    for metric in ("error_over_step", "relative_error", "momentum_error"):
        mine, other = (fmean(getattr(n, metric) for n in numbers[1:]) for numbers in (ours, paper))
        unit = "of the step" if metric == "error_over_step" else "of the norm"
        yield Row(
            case, metric, mine, unit, peer="paper_lzma", peer_value=other, ratio=ratio(mine, other), repeats=count
        )
        last = ours[-1], paper[-1]
        mine, other = (getattr(numbers, metric) for numbers in last)
        yield Row(case, f"{metric}_last", mine, unit, peer="paper_lzma", peer_value=other, ratio=ratio(mine, other))
    long, other = amortised_ratio(ours, GROUP), amortised_ratio(paper, GROUP)
    yield Row(
        case, "ratio_amortised", long, "x", peer="paper_lzma", peer_value=other,
        ratio=ratio(long, other, higher_is_better=True), repeats=count,
    )  # fmt: skip
    over = fmean(n.coded_bytes / n.bound_bytes for n in ours[1:])
    theirs = fmean(n.coded_bytes / n.bound_bytes for n in paper[1:])
    yield Row(
        case, "size_over_order0_bound", over, "x", peer="paper_lzma", peer_value=theirs, ratio=ratio(over, theirs),
        repeats=count,
    )  # fmt: skip


def _speed_rows(case: str, ours: list[SaveNumbers], paper: list[SaveNumbers]) -> Iterator[Row]:
    (encoded, decoded), (theirs_encoded, theirs_decoded) = speeds(ours), speeds(paper)
    yield _rate(case, "encode_mb_s", encoded, theirs_encoded, "paper_lzma")
    yield _rate(case, "decode_mb_s", decoded, theirs_decoded, "paper_lzma")
    peaks = [[n.peak_bytes for n in numbers[1:] if n.peak_bytes is not None] for numbers in (ours, paper)]
    if all(peaks):
        mine, other = (float(max(peak)) for peak in peaks)
        yield Row(
            case, "encode_peak_bytes", mine, "bytes", peer="paper_lzma", peer_value=other, ratio=ratio(mine, other),
            bound="raw size", bound_value=float(ours[1].raw_bytes), repeats=len(ours) - 1,
        )  # fmt: skip


def _lossless_rows(case: Case, ours: list[SaveNumbers]) -> Iterator[Row]:
    checkpoint, previous = load(case.paths[-1]), load(case.paths[-2])
    results, missing = excp_lossless.code_all(checkpoint, previous)
    results["torch_save"] = excp_lossless.torch_save(checkpoint)
    error = fmean(n.error_over_step for n in ours[1:])
    own = {
        "ratio_per_save": residual_ratio(ours),
        "ratio_amortised": amortised_ratio(ours, GROUP),
        "encode_mb_s": median(speeds(ours)[0]),
        "decode_mb_s": median(speeds(ours)[1]),
    }
    for metric, value in own.items():
        unit = "MB/s per core" if metric.endswith("mb_s") else "x"
        row = Row(case.name, metric, value, unit, repeats=len(ours) - 1)
        for peer, coded in results.items():
            quotient = coded.raw_bytes / coded.coded_bytes
            seconds = coded.decode_s if metric == "decode_mb_s" else coded.encode_s
            if peer == "xor_shuffle_zstd" and metric == "ratio_amortised":
                # its chain starts with a save that has nothing before it
                first = results["shuffle_zstd"]
                quotient = GROUP / (first.coded_bytes / first.raw_bytes + (GROUP - 1) / quotient)
            other = quotient if metric.startswith("ratio") else coded.raw_bytes / 1e6 / max(seconds, 1e-9)
            better = ratio(value, other, higher_is_better=True)
            yield replace(row, peer=peer, peer_value=other, ratio=better)
        for peer, reason in missing.items():
            yield missing_peer(row, peer, reason)
    yield Row(
        case.name, "error_over_step", error, "of the step", peer="lossless", peer_value=0.0, repeats=len(ours) - 1
    )


def _blocked_rows(case: Case, settings: Settings) -> Iterator[Row]:
    """What the plugin holds training up for, the copy of the state, against writing a plain checkpoint."""
    checkpoint = load(case.paths[-1])
    file = case.folder / f"blocked-{os.getpid()}.pt"
    stage = HostStage()

    def save(*, flushed: bool) -> None:
        with file.open("wb") as out:
            torch.save(checkpoint, out)
            if flushed:
                out.flush()
                os.fsync(out.fileno())

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: stage.stage(checkpoint),
        "torch_save": lambda: save(flushed=False),
        "torch_save_fsync": lambda: save(flushed=True),
    }
    repeats = 3 if settings.quick else 5
    timings = measure(calls, repeats=repeats, warmup=2, min_sample_ms=0.0)
    file.unlink()
    for peer in ("torch_save", "torch_save_fsync"):
        yield compare(case.name, "blocked_ms", timings["ours"], peer=peer, theirs=timings[peer])


def run(settings: Settings) -> Iterator[Row]:
    """Rows for every run, regime, metric and peer."""
    for name, run_settings in (QUICK if settings.quick else CASES).items():
        case = Case(name, replace(run_settings, seed=settings.seed))
        every = COMPARED.get(name, 1)
        for regime in ALPHAS:
            paper = case.paper(regime, every=every)
            momenta = [numbers.momentum_error for numbers in paper]
            equal = case.ours(f"{regime} equal-error", equal_error(paper), momenta, every=every)
            yield from _against_paper(f"{name}{regime} equal-error", equal, paper)
            yield from _speed_rows(f"{name}{regime} equal-error", equal, paper)
            if every == 1:
                same = case.ours(f"{regime} paper-settings", case.always(paper_settings(regime)))
                yield from _against_paper(f"{name}{regime} paper-settings", same, paper)
        ours = case.ours("", case.always(ExCPOptions()))
        paper = case.paper("", every=every)
        yield from _against_paper(name, ours, paper)
        yield from _speed_rows(name, ours, paper)
        updates = [n.update_ratio for n in ours[1:] if n.update_ratio is not None]
        if updates and all(map(math.isfinite, updates)):
            yield Row(name, "first_update_ratio", max(updates), "x exact", bound="update_target", bound_value=1.5)
        yield from _lossless_rows(case, ours)
        yield from _blocked_rows(case, settings)
