"""What a lossy resume does to training: three in a row, against exact resumes and against a run that never stopped.

A small decoder is trained from scratch on Wikipedia text. Saves go through the codec as one chain; at three of them the
run goes on from what the codec gives back. At each of these the same state is also continued exactly, on the same
batches, so that every difference is the codec's. The chain goes on after a resume, as it does in practice.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...callbacks.excp import ExCPOptions, Reference, SaveReport, decode, encode
from .training import RunSettings, Text, Training

BETA2S = (0.95, 0.999)
SEEDS = (0, 1, 2)
EXACT = "uninterrupted"
MODES: dict[str, ExCPOptions] = {
    "rank1": ExCPOptions(),
    "log_kmeans": ExCPOptions(second_moment="log_kmeans"),
    # with its target the codec would leave this form wherever the first update grows too large
    "masked": ExCPOptions(second_moment="masked", update_target=None),
    "paper": ExCPOptions(mode="paper", second_moment="masked", error_target=None, update_target=None),
    "paper_clamp": ExCPOptions(mode="paper", alpha=1e9, second_moment="masked", error_target=None, update_target=None),
}
ERROR_TARGETS = (0.15, 0.25, 0.4, 0.6, 0.8, 1.0, 1.4)
# beside what is compared over seeds
_FIRST_SEED_ONLY = ("paper_clamp", "rate_distortion")
_SECOND_MOMENTS = ("rank1", "log_kmeans", "masked")
_RUN = RunSettings(
    model="dense-tiny", batch_size=8, sequence_length=64, learning_rate=2e-3, warmup_steps=20, cosine_steps=320,
    first_save=120, steps_per_save=20, num_saves=7,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of the study.

    Attributes:
        run: the training; saves 0 to `num_saves` - 1.
        resumes: saves from which training goes on with the decoded state.
        watched_steps: steps after a resume over which losses are compared.
        tail_steps: steps after the last save.
        held_out: batches of the validation split behind the final losses.
        seeds: of initialisation and data order.
        modes: names in `MODES`.
    """

    run: RunSettings = _RUN
    resumes: tuple[int, ...] = (2, 4, 6)
    watched_steps: int = 20
    tail_steps: int = 40
    held_out: int = 16
    seeds: tuple[int, ...] = SEEDS
    modes: tuple[str, ...] = tuple(MODES)


QUICK = Study(
    run=RunSettings(
        model="dense-tiny",
        overrides=(("num_hidden_layers", 2), ("hidden_size", 64), ("num_attention_heads", 2)),
        tokenizer="bpe:512", batch_size=4, sequence_length=32, warmup_steps=4, first_save=8, steps_per_save=4,
        num_saves=7,
    ),
    watched_steps=2, tail_steps=4, held_out=2, seeds=(0,), modes=("rank1", "paper"),
)  # fmt: skip


def settings_of(study: Study, beta2: float, seed: int) -> RunSettings:
    """The run of one cell of the study."""
    return replace(study.run, betas=(0.9, beta2), seed=seed)


class Chain:
    """Saves of one run through the codec, each against the one before."""

    def __init__(self, options: ExCPOptions) -> None:
        self.options = options
        self.reference: Reference | None = None
        self.weights: dict[str, Any] | None = None

    def add(self, state: dict[str, Any]) -> tuple[dict[str, Any], SaveReport]:
        """Codes a state; returns what a resume would get, and the report."""
        encoded = encode(state, self.reference, self.options, previous_weights=self.weights)
        decoded, following = decode(encoded, self.reference)
        self.reference = following
        self.weights = copy.deepcopy(state["state_dict"])
        return decoded, encoded.report

    def resumed(self, decoded: dict[str, Any]) -> None:
        """From here on steps are counted from the decoded weights: a new process knows no others."""
        self.weights = copy.deepcopy(decoded["state_dict"])


def resume_and_watch(training: Training, state: dict[str, Any], steps: int) -> tuple[list[float], float]:
    """Losses of the steps after a resume, and the first step's largest |update| over the learning rate."""
    training.load(state)
    losses = training.train(training.step + 1)
    update = training.largest_update()
    return losses + training.train(training.step + steps - 1), update


def start(study: Study, beta2: float, seed: int, text: Text) -> dict[str, Any]:
    """State at the first save, which all modes share."""
    training = Training(settings_of(study, beta2, seed), text)
    training.train(study.run.first_save)
    return copy.deepcopy(training.state())


def kept_start(study: Study, beta2: float, seed: int, text: Text, folder: Path) -> dict[str, Any]:
    """`start`, from `folder` where it was done before."""
    path = folder / f"start-{beta2}-{seed}.pt"
    if not path.exists():
        partial = path.with_suffix(".partial")
        torch.save(start(study, beta2, seed, text), partial)
        os.replace(partial, path)
    return torch.load(path, weights_only=True)


def one_run(study: Study, mode: str, beta2: float, seed: int, text: Text, first: dict[str, Any]) -> dict[str, Any]:
    """One run with its resumes.

    Returns:
        plain data: `losses` of every step after the first save, `held_out_loss` at the end, and for each resume mean
        losses over the watched steps (`loss`, `exact_loss`), first updates (`update`, `exact_update`), and the save's
        `bits_per_parameter`, `ratio` and `error_over_step`.
    """
    settings = settings_of(study, beta2, seed)
    training = Training(settings, text)
    training.load(first)
    chain = None if mode == EXACT else Chain(MODES[mode])
    if chain is not None:
        chain.add(training.state())
    losses: list[float] = []
    resumes = []
    for number in range(1, settings.num_saves):
        losses += training.train(settings.step_of(number))
        if chain is None:
            continue
        exact = copy.deepcopy(training.state())
        decoded, report = chain.add(exact)
        if number in study.resumes:
            exact_losses, exact_update = resume_and_watch(training, exact, study.watched_steps)
            watched, update = resume_and_watch(training, decoded, study.watched_steps)
            if study.watched_steps == study.run.steps_per_save:
                # those steps are the run's own
                losses += watched
            else:
                training.load(decoded)
            chain.resumed(decoded)
            resumes.append(
                {
                    "step": exact["global_step"],
                    "loss": fmean(watched),
                    "exact_loss": fmean(exact_losses),
                    "update": update,
                    "exact_update": exact_update,
                    "ratio": report.ratio,
                    "bits_per_parameter": bits_per_parameter(report),
                    "error_over_step": report.total.error_over_step,
                    "largest_error_over_step": report.largest_error_over_step,
                }
            )
    losses += training.train(settings.step_of(settings.num_saves - 1) + study.tail_steps)
    held_out = training.held_out_loss(text.held_out_batches(study.held_out))
    return {
        "mode": mode,
        "beta2": beta2,
        "seed": seed,
        "losses": [round(loss, 5) for loss in losses],
        "held_out_loss": held_out,
        "resumes": resumes,
    }


def bits_per_parameter(report: SaveReport) -> float:
    """Coded bits of weight and both moments for each weight."""
    return 8 * report.payload_bytes / max(report.total.numel, 1)


def rate_distortion(study: Study, beta2: float, text: Text, first: dict[str, Any]) -> list[dict[str, Any]]:
    """Bits per parameter against loss after a resume, for each way to keep the second moment; seed of `first`."""
    settings = settings_of(study, beta2, study.seeds[0])
    training = Training(settings, text)
    training.load(first)
    states = [copy.deepcopy(training.state())]
    for number in range(1, study.resumes[0] + 1):
        training.train(settings.step_of(number))
        states.append(copy.deepcopy(training.state()))
    exact_losses, exact_update = resume_and_watch(training, states[-1], study.watched_steps)
    points = []
    for second_moment in _SECOND_MOMENTS:
        for target in ERROR_TARGETS:
            update_target = None if second_moment == "masked" else 1.5
            chain = Chain(
                ExCPOptions(
                    sparsity=0.9999, error_target=target, second_moment=second_moment, update_target=update_target
                )
            )
            for state in states:
                decoded, report = chain.add(state)
            losses, update = resume_and_watch(training, decoded, study.watched_steps)
            points.append(
                {
                    "second_moment": second_moment,
                    "beta2": beta2,
                    "error_target": target,
                    "error_over_step": report.total.error_over_step,
                    "bits_per_parameter": bits_per_parameter(report),
                    "loss_excess": fmean(losses) - fmean(exact_losses),
                    "update_ratio": update / exact_update,
                }
            )
    return points


def run_study(study: Study, folder: Path, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Every run of the study; what was done before lies in `folder` and is taken from there.

    Returns:
        {"study": its settings, "runs": as `one_run`, "rate_distortion": as `rate_distortion`}.
    """
    folder = folder / hashlib.sha256(repr((study, MODES)).encode()).hexdigest()[:8]
    folder.mkdir(parents=True, exist_ok=True)
    runs, points = [], []
    for seed in study.seeds:
        text: Text | None = None
        for beta2 in BETA2S:
            first: dict[str, Any] | None = None
            names = [EXACT, *study.modes, "rate_distortion"]
            for name in names:
                if name in _FIRST_SEED_ONLY and seed != study.seeds[0]:
                    continue
                record = folder / f"{name}-{beta2}-{seed}.json"
                if not record.exists():
                    text = text or Text(settings_of(study, beta2, seed))
                    first = first or kept_start(study, beta2, seed, text, folder)
                    if name == "rate_distortion":
                        result: Any = rate_distortion(study, beta2, text, first)
                    else:
                        result = one_run(study, name, beta2, seed, text, first)
                    partial = record.with_suffix(".partial")
                    partial.write_text(json.dumps(result), encoding="utf-8")
                    os.replace(partial, record)
                    report(f"seed {seed}, beta2 {beta2}: {name} done")
                result = json.loads(record.read_text(encoding="utf-8"))
                if name == "rate_distortion":
                    points += result
                else:
                    runs.append(result)
    return {"study": asdict(study), "runs": runs, "rate_distortion": points}


def draw(result: dict[str, Any], path: Path) -> None:
    """Rate-distortion picture: bits per parameter against loss after a resume, one panel per beta2."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BETA2S), figsize=(10, 4), sharey=True)
    for beta2, panel in zip(BETA2S, panels, strict=True):
        for second_moment in _SECOND_MOMENTS:
            points = [
                point
                for point in result["rate_distortion"]
                if point["beta2"] == beta2 and point["second_moment"] == second_moment
            ]
            points.sort(key=lambda point: point["bits_per_parameter"])
            panel.plot(
                [point["bits_per_parameter"] for point in points],
                [point["loss_excess"] for point in points],
                marker="o",
                label=second_moment,
            )
        panel.axhline(0.02, color="grey", linestyle=":", linewidth=1)
        panel.set_xlabel("bits per parameter (weight and both moments)")
        panel.set_title(f"$\\beta_2$ = {beta2}")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
    steps = result["study"]["watched_steps"]
    panels[0].set_ylabel(f"loss over {steps} steps minus exact resume")
    panels[0].set_yscale("symlog", linthresh=1e-3)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def threads() -> int:
    """Threads that the study ran with; results depend on them in the last bits."""
    return torch.get_num_threads()
