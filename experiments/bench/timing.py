"""Timing of several callables side by side: same process, same work, turn by turn."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch


class WrongResult(RuntimeError):
    """A peer computes something else than ours: a comparison of their times would mean nothing."""


class Timing(NamedTuple):
    """Samples of one callable, summed up.

    Attributes:
        median_ms: median time of one call.
        spread_ms: interquartile range of the samples.
        repeats: number of samples.
    """

    median_ms: float
    spread_ms: float
    repeats: int


def summarise(samples_ms: Sequence[float]) -> Timing:
    """Median and interquartile range (linear between samples); the range of a single sample is 0."""
    if len(samples_ms) < 2:
        return Timing(samples_ms[0], 0.0, 1)
    quartiles = statistics.quantiles(samples_ms, n=4, method="inclusive")
    return Timing(statistics.median(samples_ms), quartiles[2] - quartiles[0], len(samples_ms))


def _sample_ms(call: Callable[[], Any], calls: int, device: str) -> float:
    """Mean time of one call over `calls` calls in a row."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) * 1e3 / calls


def measure(
    calls: Mapping[str, Callable[[], Any]],
    *,
    device: str = "cpu",
    repeats: int = 25,
    warmup: int = 3,
    min_sample_ms: float = 2.0,
    single_calls: bool = False,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time callables turn by turn, each round in another random order, so that drift and caches hit all alike.

    Args:
        calls: the callables by name.
        device: `cuda` times with device events, anything else with the process clock.
        repeats: samples per callable.
        warmup: untimed calls of each before.
        min_sample_ms: a sample repeats calls until it lasts about this long.
        single_calls: a sample is one call, and none is spent to find out how long it takes; for calls of seconds.
        seed: of the order.

    Returns:
        The timings by name.
    """
    inner = {}
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        if single_calls:
            inner[name] = 1
            continue
        once = min(_sample_ms(call, 1, device) for _ in range(3))
        inner[name] = max(1, min(1000, round(min_sample_ms / max(once, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(seed)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(_sample_ms(calls[name], inner[name], device))
    finally:
        if collecting:
            gc.enable()
    return {name: summarise(values) for name, values in samples.items()}


def copying(num_bytes: int, device: str) -> Callable[[], Any]:
    """A plain copy that moves `num_bytes` over the memory bus, read and written bytes counted together."""
    source = torch.ones(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of the expected values; infinite for NaN or another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    difference = (actual.detach().double() - expected.detach().double()).square().sum().sqrt()
    scale = expected.detach().double().square().sum().sqrt()
    error = float(difference / scale) if float(scale) else float(difference)
    return error if error == error else float("inf")


def require_same(
    case: str, peer: str, theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor], limit: float
) -> None:
    """Check a peer's results against ours before anything is timed.

    Args:
        case: for the message.
        peer: for the message.
        theirs: the peer's tensors.
        ours: our tensors, in the same order.
        limit: largest relative root-mean-square difference.

    Raises:
        WrongResult: a tensor differs by more, or there are more or fewer of them.
    """
    if len(theirs) != len(ours):
        raise WrongResult(f"{case}: {peer} gives {len(theirs)} results, ours {len(ours)}; nothing is reported")
    for index, (actual, expected) in enumerate(zip(theirs, ours, strict=True)):
        error = relative_error(actual, expected)
        if not error <= limit:
            raise WrongResult(
                f"{case}: result {index} of {peer} differs from ours by {error:.2e} (relative), allowed {limit:.0e}; "
                "nothing is reported"
            )
