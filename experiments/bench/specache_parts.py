"""Where a SpeCache step's time goes, what it moves, and device bytes at published sizes without the memory for them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

import torch

from ...inference.specache import CacheShape, SpeCache, SpeCacheOptions
from ...inference.specache.attention import LayerAttention
from ...inference.specache.device_store import DeviceStore
from ...inference.specache.prefetch import Prefetcher
from .rows import Row

# parts of a step outside the model's own projections and feed-forward layers
PARTS: dict[str, tuple[type, str]] = {
    "scores": (LayerAttention, "weights"),
    "choice": (LayerAttention, "choose"),
    "values": (LayerAttention, "output"),
    "store": (DeviceStore, "append_token"),
    "fetch": (Prefetcher, "advance"),
    "wait": (Prefetcher, "wait"),
}
# keys and values of published decoders, with the longest contexts of the paper's table
PUBLISHED = {
    "llama-2-7b": (CacheShape(32, 32, 128, 2), 4096),
    "llama-3-8b": (CacheShape(32, 8, 128, 2), 8192),
    "mistral-7b": (CacheShape(32, 8, 128, 2), 32768),
    "qwen2.5-0.5b": (CacheShape(24, 2, 64, 2), 32768),
}


@contextmanager
def timed_parts(device: str) -> Iterator[dict[str, float]]:
    """Seconds spent in each of `PARTS` within it; on CUDA every part waits for the device, so parts do not overlap."""
    seconds = dict.fromkeys(PARTS, 0.0)
    originals = {name: getattr(owner, method) for name, (owner, method) in PARTS.items()}

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name] += time.perf_counter() - start
            return result

        return run

    try:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, clocked(name, originals[name]))
        yield seconds
    finally:
        for name, (owner, method) in PARTS.items():
            setattr(owner, method, originals[name])


def part_rows(case: str, cache: SpeCache, step: Callable[[], Any], *, repeats: int, device: str) -> Iterator[Row]:
    """Rows `step_ms_PART` (medians over steps), and the transfers of a step.

    Args:
        case: Of the rows.
        cache: The cache that `step` decodes with.
        step: Decodes one token per sequence.
        repeats: Steps.
        device: Type of the device.
    """
    samples: dict[str, list[float]] = {name: [] for name in (*PARTS, "model", "all")}
    step()
    before = (cache.statistics.bytes_to_device, cache.statistics.bytes_to_host, cache.statistics.steps)
    for _ in range(repeats):
        with timed_parts(device) as seconds:
            start = time.perf_counter()
            step()
            whole = time.perf_counter() - start
        for name, value in seconds.items():
            samples[name].append(1000 * value)
        samples["all"].append(1000 * whole)
        samples["model"].append(1000 * (whole - sum(seconds.values())))
    for name, values in samples.items():
        yield Row(case, f"step_ms_{name}", median(values), "ms", repeats=repeats)
    steps = cache.statistics.steps - before[2]
    shape, batch = CacheShape.of(cache.config, cache.layers[0].store.fetched.dtype), len(cache.lengths)
    formula = shape.fetched_bytes_per_step(cache.options, batch, cache.capacity)
    yield Row(
        case, "bytes_to_device_per_step", (cache.statistics.bytes_to_device - before[0]) / steps, "bytes",
        bound="formula", bound_value=formula, repeats=steps,
    )  # fmt: skip
    heads = shape.num_layers * shape.num_heads * batch
    stored = heads * (2 * shape.head_dim * shape.itemsize + 4 * min(cache.options.num_fetched, cache.capacity))
    yield Row(
        case, "bytes_to_host_per_step", (cache.statistics.bytes_to_host - before[1]) / steps, "bytes",
        bound="formula", bound_value=stored, repeats=steps,
    )  # fmt: skip
    # one gather and one copy of rows per layer
    yield Row(case, "row_copies_per_step", shape.num_layers, "copies")


def published_rows() -> Iterator[Row]:
    """Bytes per sequence at published sizes, counted over tensors without storage, against the formula."""
    for name, (shape, context) in PUBLISHED.items():
        for bits in (2, 1):
            options = SpeCacheOptions(bits=bits)
            store = DeviceStore(
                options, 1, shape.num_heads, shape.head_dim, context, dtype=torch.float16, device=torch.device("meta")
            )
            value, full = shape.num_layers * store.nbytes, shape.full_bytes(1, context)
            yield Row(
                f"{name} context={context} bits={bits} meta", "device_bytes", value, "bytes", peer="full",
                peer_value=full, ratio=full / value, bound="formula",
                bound_value=shape.device_bytes(options, 1, context),
            )  # fmt: skip
