"""A chain of saves through a coder: sizes, errors, CPU time and memory of every save, kept on disk once measured."""

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...callbacks.excp import ExCPOptions, Reference, decode, encode
from ...callbacks.excp.container import Identity, write_save
from . import excp_paper
from .excp_paper import at, flat, parameters_of, raw_bytes

# LZMA sees every fourth block of larger saves
LARGE_BYTES = 1 << 27
_HERE = Path(__file__).parent
_CODEC = Path(_HERE.parent.parent, "callbacks", "excp")


@dataclass(frozen=True, kw_only=True)
class SaveNumbers:
    """One coded save.

    Attributes:
        raw_bytes: all tensors as they are in memory; those that share their memory count once.
        coded_bytes: of the file.
        bound_bytes: order-0 bound of the coder's own index streams, everything else as stored.
        error_over_step: norm of rebuilt minus true weights over that of the true step since the last save; 0 for a
            key frame.
        relative_error: norm of rebuilt minus true weights over that of the weights.
        momentum_error: norm of rebuilt minus true first moments over that of the first moments.
        encode_s: CPU seconds of all threads.
        decode_s: the same; None for a save that is not coded.
        peak_bytes: most memory while encoding above what was in use before; None where the system does not tell.
        update_ratio: largest first Adam update after a resume over that from the exact state, as the codec judges it.
    """

    raw_bytes: int
    coded_bytes: int
    bound_bytes: float
    error_over_step: float
    relative_error: float
    momentum_error: float
    encode_s: float
    decode_s: float | None = None
    peak_bytes: int | None = None
    update_ratio: float | None = None

    @property
    def ratio(self) -> float:
        """Raw over coded bytes."""
        return self.raw_bytes / self.coded_bytes


def load(path: Path) -> dict[str, Any]:
    """A save of the run."""
    return torch.load(path, weights_only=True)


@contextlib.contextmanager
def one_thread() -> Any:
    """One thread for torch: speeds are per core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _memory(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return None


def _peak_of(work: Callable[[], Any]) -> tuple[Any, float, int | None]:
    """A call's result, CPU seconds, and the most memory above what was in use before."""
    before = None
    gc.collect()
    with contextlib.suppress(OSError, TypeError, AttributeError):
        # memory that was freed but not given back would count as in use, and hide what the call needs
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmRSS")
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    after = _memory("VmHWM")
    return result, seconds, None if before is None or after is None else max(0, after - before)


def _squared(values: Any) -> float:
    return float(np.square(values, dtype=np.float64).sum())


class Truth:
    """Norms of a save's true values, and of its step from the save before."""

    def __init__(self, checkpoint: dict[str, Any], previous: dict[str, Any] | None) -> None:
        self.parameters = list(parameters_of(checkpoint))
        self.weight = self.momentum = self.step = 0.0
        for parameter in self.parameters:
            weight = flat(at(checkpoint, parameter.weight))
            self.weight += _squared(weight)
            self.momentum += _squared(flat(at(checkpoint, parameter.exp_avg)))
            if previous is not None:
                self.step += _squared(weight - flat(at(previous, parameter.weight)))

    def errors(self, squared_error: float, momentum_squared_error: float) -> dict[str, float]:
        """Fields of `SaveNumbers`."""
        return {
            "error_over_step": (squared_error / self.step) ** 0.5 if self.step else 0.0,
            "relative_error": (squared_error / self.weight) ** 0.5,
            "momentum_error": (momentum_squared_error / self.momentum) ** 0.5,
        }


# shares of the first moment that are kept, tried in this order until its error is small enough
MOMENTUM_SHARES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.19, 0.25, 0.32, 0.4, 0.5, 0.6, 0.75)


def likely_share(checkpoint: dict[str, Any], wanted: float) -> int:
    """Place in `MOMENTUM_SHARES` of the smallest share that may give an error of `wanted`, from a sample."""
    lost, total = np.zeros(len(MOMENTUM_SHARES)), 0.0
    for parameter in parameters_of(checkpoint):
        momentum, variance = flat(at(checkpoint, parameter.exp_avg)), flat(at(checkpoint, parameter.exp_avg_sq))
        stride = max(1, len(momentum) // 65_536) | 1
        momentum, variance = momentum[::stride], variance[::stride]
        order = np.argsort(np.abs(momentum) / np.sqrt(variance + 1e-30))
        below = np.cumsum(np.square(momentum[order], dtype=np.float64)) * stride
        places = [min(len(order) - 1, int(len(order) * (1 - share))) for share in MOMENTUM_SHARES]
        lost += below[places]
        total += below[-1]
    enough = np.flatnonzero(lost <= wanted**2 * total)
    # one less than the estimate, which has the true second moment to go by
    return max(0, int(enough[0]) - 1) if len(enough) else len(MOMENTUM_SHARES) - 1


class _Trial:
    """One save coded with some settings, and decoded again."""

    def __init__(
        self, checkpoint: dict[str, Any], base: Reference | None, options: ExCPOptions, weights: Any, truth: "Truth"
    ) -> None:
        with one_thread():
            self.encoded, self.encode_s, self.peak_bytes = _peak_of(
                partial(encode, checkpoint, base, options, previous_weights=weights)
            )
            start = time.process_time()
            rebuilt, _ = decode(self.encoded, base)
            self.decode_s = time.process_time() - start
        self.momentum_error = sum(
            _squared(flat(at(rebuilt, p.exp_avg)) - flat(at(checkpoint, p.exp_avg))) for p in truth.parameters
        )
        self.weight_error = sum(
            _squared(flat(at(rebuilt, p.weight)) - flat(at(checkpoint, p.weight))) for p in truth.parameters
        )


class Progress:
    """What a chain has got to, on disk after every save, so that a broken-off one goes on.

    Args:
        path: of the files, without their endings.
        digest: of the code and settings; what was kept with another is forgotten.
        every: 1, or n to look at every n-th parameter alone.
        report: told about each save.
    """

    def __init__(self, path: Path, digest: str, *, every: int = 1, report: Callable[[str], None] = print) -> None:
        self.path, self.digest, self.every, self.report = path, digest, every, report

    def load(self, save: Path) -> dict[str, Any]:
        """A save of the run, or those of its parameters that are looked at."""
        return thin(load(save), self.every)

    def start(self) -> tuple[list[SaveNumbers], Any]:
        """Saves done, and the state that the last of them led to."""
        if not self.path.with_suffix(".state").exists():
            return [], None
        stored = torch.load(self.path.with_suffix(".state"), weights_only=True)
        if stored["digest"] != self.digest:
            return [], None
        return [SaveNumbers(**numbers) for numbers in stored["saves"]], stored["state"]

    def keep(self, numbers: list[SaveNumbers], state: Any, total: int) -> None:
        """Keeps what was done."""
        unfinished = self.path.with_suffix(".partial")
        saves = [asdict(each) for each in numbers]
        torch.save({"digest": self.digest, "saves": saves, "state": state}, unfinished)
        os.replace(unfinished, self.path.with_suffix(".state"))
        self.report(_line(len(numbers) - 1, total, numbers[-1]))

    def finish(self) -> None:
        """Forgets the state: the numbers are all that is wanted of it."""
        self.path.with_suffix(".state").unlink(missing_ok=True)


def thin(checkpoint: dict[str, Any], every: int) -> dict[str, Any]:
    """A checkpoint of every n-th parameter, in the order of the state dict, with its Adam state."""
    if every == 1:
        return checkpoint
    chosen = list(parameters_of(checkpoint))[::every]
    groups: list[list[Any]] = [[], []]
    state, weights = {}, {}
    for number, parameter in enumerate(chosen):
        assert parameter.exp_avg is not None
        weights[parameter.name] = weight = at(checkpoint, parameter.weight)
        state[number] = at(checkpoint, parameter.exp_avg[:-1])
        groups[weight.dim() <= 1].append(number)
    settings = checkpoint["optimizer_states"][0]["param_groups"]
    optimiser = {
        "state": state,
        "param_groups": [{**old, "params": new} for old, new in zip(settings, groups, strict=True)],
    }
    return {"state_dict": weights, "optimizer_states": [optimiser], "global_step": checkpoint["global_step"]}


def code_ours(
    paths: Sequence[Path],
    options_of: Callable[[int], ExCPOptions],
    *,
    progress: Progress,
    momentum_errors: Sequence[float] | None = None,
) -> list[SaveNumbers]:
    """The chain through our codec, a key frame first; each save is decoded.

    Args:
        paths: saves of the run.
        options_of: settings of each.
        progress: where the chain's state is kept.
        momentum_errors: largest error of the first moments of each save, over their norm; as many of them are kept as
            that takes, with a mask of their own.
    """
    numbers, state = progress.start()
    reference = identity = None
    if state is not None:
        classes = {name: values.numpy() for name, values in state["classes"].items()}
        reference = Reference(state["weights"], classes, state["squared_errors"], state["digest"])
        identity = Identity(**state["identity"])
    previous = progress.load(paths[len(numbers) - 1]) if numbers else None
    scratch = progress.path.with_suffix(".ckpt")
    for position in range(len(numbers), len(paths)):
        checkpoint = progress.load(paths[position])
        truth = Truth(checkpoint, previous)
        weights = None if previous is None else previous["state_dict"]
        options = options_of(position)
        if momentum_errors is None or position == 0:
            trial = _Trial(checkpoint, reference, options, weights, truth)
        else:
            for number in range(likely_share(checkpoint, momentum_errors[position]), len(MOMENTUM_SHARES)):
                options = replace(options, momentum_sparsity=1 - MOMENTUM_SHARES[number], momentum_mask="own")
                trial = _Trial(checkpoint, reference, options, weights, truth)
                if trial.momentum_error <= momentum_errors[position] ** 2 * truth.momentum:
                    break
        reference = trial.encoded.reference
        identity = write_save(trial.encoded, scratch, identity)
        coded_bytes = scratch.stat().st_size
        save = trial.encoded.report
        updates = [part.update_ratio for part in save.parameters if part.exact_update_max > 0]
        numbers.append(
            SaveNumbers(
                raw_bytes=raw_bytes(checkpoint),
                coded_bytes=coded_bytes,
                bound_bytes=save.total.bound_bytes + coded_bytes - save.total.coded_bytes,
                encode_s=trial.encode_s,
                decode_s=trial.decode_s,
                peak_bytes=trial.peak_bytes,
                update_ratio=max(updates, default=0.0),
                **truth.errors(trial.weight_error, trial.momentum_error),
            )
        )
        del trial
        previous = checkpoint
        scratch.unlink()
        kept = {**reference.__dict__, "identity": asdict(identity)}
        kept["classes"] = {name: torch.from_numpy(values) for name, values in reference.classes.items()}
        progress.keep(numbers, kept, len(paths))
    progress.finish()
    return numbers


def code_paper(paths: Sequence[Path], *, alpha: float, progress: Progress) -> list[SaveNumbers]:
    """The chain through the paper's pipeline, its first save uncompressed; `progress` keeps the chain's state."""
    numbers, state = progress.start()
    previous = progress.load(paths[max(0, len(numbers) - 1)])
    size = raw_bytes(previous)
    if not numbers:
        state = {p.name: torch.from_numpy(flat(at(previous, p.weight))) for p in parameters_of(previous)}
        numbers = [
            SaveNumbers(
                raw_bytes=size, coded_bytes=size, bound_bytes=size, error_over_step=0.0, relative_error=0.0,
                momentum_error=0.0, encode_s=0.0,
            )
        ]  # fmt: skip
    reference = {name: weight.numpy() for name, weight in state.items()}
    for position in range(len(numbers), len(paths)):
        checkpoint = progress.load(paths[position])
        truth = Truth(checkpoint, previous)
        with one_thread():
            save, encode_s, peak = _peak_of(
                partial(
                    excp_paper.encode, checkpoint, reference, alpha=alpha, archive_every=4 if size > LARGE_BYTES else 1
                )
            )
            encode_s += save.archive_s * (1 / save.archive_share - 1)
            start = time.process_time()
            values = excp_paper.decode(save, checkpoint, reference)
            decode_s = time.process_time() - start
            decode_s /= save.archive_share
        same = (
            np.array_equal(values[name][0], excp_paper.sampled(weight, save.archive_every))
            for name, weight in save.weights.items()
        )
        if not all(same):
            raise RuntimeError("the paper's pipeline did not decode what it encoded")
        del values
        numbers.append(
            SaveNumbers(
                raw_bytes=raw_bytes(checkpoint),
                coded_bytes=save.num_bytes,
                bound_bytes=save.bound_bytes,
                encode_s=encode_s,
                decode_s=decode_s,
                peak_bytes=peak,
                **truth.errors(save.squared_error, save.momentum_squared_error),
            )
        )
        reference, previous = save.weights, checkpoint
        progress.keep(numbers, {name: torch.from_numpy(weight) for name, weight in reference.items()}, len(paths))
    progress.finish()
    return numbers


def _line(position: int, count: int, numbers: SaveNumbers) -> str:
    return (
        f"  save {position + 1} of {count}: {numbers.ratio:.1f}x, error over step {numbers.error_over_step:.3f}, "
        f"{numbers.coded_bytes / max(numbers.bound_bytes, 1):.3f} of the bound, "
        f"{numbers.raw_bytes / 1e6 / max(numbers.encode_s, 1e-9):.0f} MB/s"
    )


def amortised_ratio(numbers: Sequence[SaveNumbers], group: int = 60) -> float:
    """Raw over coded bytes of `group` saves of which one is a key frame and the others are like those measured."""
    residual = sum(n.coded_bytes for n in numbers[1:]) / (len(numbers) - 1)
    return group * numbers[0].raw_bytes / (numbers[0].coded_bytes + (group - 1) * residual)


def digest_of_sources(*files: Path) -> str:
    """Digest of source files."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


CODEC_SOURCES = (
    *(
        _CODEC / f"{name}.py"
        for name in (
            "adam", "adam_state", "codec", "container", "decoding", "entropy", "exact", "first_moment", "histogram",
            "indices", "lookup", "options", "payload", "pruning", "quantiser", "saves", "second_moment", "tree",
            "weights",
        )
    ),
    _HERE / "excp_chain.py",
)  # fmt: skip
PAPER_SOURCES = (_HERE / "excp_paper.py",)


def measured(
    path: Path,
    sources: Sequence[Path],
    settings: Any,
    work: Callable[[Progress], list[SaveNumbers]],
    *,
    every: int = 1,
    report: Callable[[str], None] = print,
) -> list[SaveNumbers]:
    """What `work` gives, from disk where it was measured before with the same code.

    Args:
        path: of the record, without its ending.
        sources: code that the numbers depend on.
        settings: whatever else they depend on.
        work: measures.
        every: 1, or n to look at every n-th parameter alone.
        report: told about each save.
    """
    record = path.with_suffix(".json")
    digest = f"{digest_of_sources(*sources)}-{hashlib.sha256(repr((settings, every)).encode()).hexdigest()[:16]}"
    if record.exists():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["sources"] == digest:
            return [SaveNumbers(**numbers) for numbers in stored["saves"]]
    numbers = work(Progress(path, digest, every=every, report=report))
    unfinished = record.with_suffix(".partial")
    unfinished.write_text(json.dumps({"sources": digest, "saves": [asdict(n) for n in numbers]}), encoding="utf-8")
    os.replace(unfinished, record)
    return numbers
