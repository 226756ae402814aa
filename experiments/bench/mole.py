"""Decoding with MoLE's table in every storage, against dense and MoE decoders; de-duplicated training; table building.

160M shapes with random weights; weights, tables and experts are all bfloat16, or float32 on a CPU without instructions
for bfloat16, as each case says. A step feeds one token per sequence after a prompt of 32, with ids drawn evenly from
the vocabulary, the same for all. `cache=cold` lets the system forget the table's (or the experts') file before every
step; what a method keeps in its own memory it keeps, and dense and resident models take their turns in between, since
what the others read slows them too. `cache=warm` reads files that are in the file cache;
`storage=direct` never uses it. Rows of the table are checked against their checksums when they are first read, within
the timed step.

Peer `moe_offloaded` is the faster of two: experts read into an LRU cache of two per layer (as many as the dense model
has parameters for), with reads for the next layer's likely experts; or used in place through a memory map.
"""

import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...kernels.row_storage.direct import aligned_buffer
from .mole_models import Rival, dense_model, lookup_model, moe_model, offloaded_model, write_random_table
from .mole_training import building_rows, training_rows
from .number_formats import dtype_name
from .registry import Settings
from .rows import Row, compare, ratio
from .timing import Timing, require_same, summarise

PROMPT_TOKENS = 32
STORAGES = ("memory", "mmap", "direct")
PEERS = ("dense", "moe_resident", "moe_offloaded")


def run(settings: Settings) -> Iterator[Row]:
    """Rows of table building, of decoding and of training."""
    size = "tiny" if settings.quick else "160m"
    # first: memory that the others have freed, and the process has kept, would hide what it takes
    with tempfile.TemporaryDirectory(prefix="tenfold-bench-", dir=Path.cwd()) as folder:
        yield from building_rows(size, Path(folder), settings)
    with tempfile.TemporaryDirectory(prefix="tenfold-bench-", dir=Path.cwd()) as folder:
        yield from _decoding_rows(size, Path(folder), settings)
    yield from training_rows(size, settings)


def _decoding_rows(size: str, folder: Path, settings: Settings) -> Iterator[Row]:
    torch.manual_seed(settings.seed)
    fields = {"vocab_size": 2000} if settings.quick else {}
    dense = dense_model(f"dense-{size}", **fields)
    write_random_table(folder / "table", dense.config, 4, seed=settings.seed)
    resident = moe_model(f"moe-{size}-10e", folder / "experts", **fields)
    rivals: dict[str, Rival] = {"dense": Rival(dense, None), "moe_resident": Rival(resident, None)}
    for storage in STORAGES:
        rivals[f"mole {storage}"] = lookup_model(dense, folder / "table", 4, storage)
    ways: dict[str, dict[str, Any]] = {
        "lru mmap": {"storage": "mmap"},
        "in place mmap": {"storage": "mmap", "in_place": True},
        "lru direct": {"storage": "direct"},
    }
    for name, options in ways.items():
        rivals[name] = offloaded_model(resident, folder / "experts", **options)[0]
    _check(rivals, settings)
    yield _device_row(rivals["lru direct"].source, f"{size}-10e experts {dtype_name()}", settings)
    for batch in (1, 8) if settings.quick else (1, 8, 32):
        steps = {name: _Stepper(rival, batch, settings.seed) for name, rival in rivals.items()}
        # warm steps differ by less than a machine's own noise, which more of them even out where they are short; a cold
        # step of the rival can take a second
        more = 1 if settings.quick or batch > 8 else 3
        warm = _time(steps, cold=False, repeats=more * settings.repeats, seed=settings.seed)
        # those that read no file take their turns too: what the others leave behind in caches and memory slows all
        cold = _time(steps, cold=True, repeats=settings.repeats // 2, seed=settings.seed)
        for storage, state, times in (
            ("memory", "warm", warm),
            ("mmap", "warm", warm),
            ("mmap", "cold", cold),
            ("direct", "cold", cold),
        ):
            cache = f" cache={state}" if storage != "memory" else ""
            case = f"{size}-4e batch={batch} storage={storage}{cache} {dtype_name()}"
            rival_names = ("lru direct",) if storage == "direct" else ("lru mmap", "in place mmap")
            best = min(rival_names, key=lambda name: times[name].median_ms)
            theirs = {**times, "moe_offloaded": times[best]}
            for peer in PEERS:
                yield compare(case, "decode_ms_per_step", times[f"mole {storage}"], peer=peer, theirs=theirs[peer])
            if storage != "memory":
                ours, other = steps[f"mole {storage}"].bytes_per_step, steps[best].bytes_per_step
                yield Row(
                    case,
                    "bytes_read_per_step",
                    ours,
                    "B",
                    peer="moe_offloaded",
                    peer_value=other,
                    ratio=ratio(ours, other),
                    repeats=steps[best].num_steps,
                )


def _device_row(source: Any, case: str, settings: Settings) -> Row:
    """How fast the device gives up to 2 GB of experts, all requested at once: a limit for every offloaded step."""
    region = source.region
    rows = np.arange(min(region.num_rows, max(1, 2**31 // region.row_bytes)))
    out = aligned_buffer(len(rows), region.row_bytes)
    rates = []
    for _ in range(min(5, settings.repeats)):
        source.drop_file_cache()
        begin = time.perf_counter()
        source.request(rows, out).wait()
        rates.append(out.nbytes / (time.perf_counter() - begin) / 1e6)
    return Row(case, "device_read_mb_s", statistics.median(rates), "MB/s", repeats=len(rates))


@torch.no_grad()
def _check(rivals: dict[str, Rival], settings: Settings) -> None:
    """All forms of a model must say the same before any of them is timed."""
    ids = torch.randint(1000, (2, 5), generator=torch.Generator().manual_seed(settings.seed))
    logits = {name: rival.model(ids).logits for name, rival in rivals.items()}
    for name, values in logits.items():
        if name != "dense":
            ours = logits["mole memory" if name.startswith("mole") else "moe_resident"]
            require_same("two prompts", name, [values], [ours], 1e-5)


class _Stepper:
    """One decoding step after a fixed prompt, repeated with other tokens."""

    def __init__(self, rival: Rival, batch: int, seed: int) -> None:
        self.model, self.source = rival
        self.num_steps = 0
        self._bytes = 0
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.config.vocab_size
        self._ids = torch.randint(vocabulary, (1000, batch, 1), generator=generator)
        prompt = torch.randint(vocabulary, (batch, PROMPT_TOKENS), generator=generator)
        with torch.no_grad():
            self._cache = self.model(prompt, use_cache=True).past_key_values

    @torch.no_grad()
    def step(self, *, cold: bool) -> float:
        """Milliseconds of a step; the cache is put back outside of the time."""
        if cold and self.source is not None:
            self.source.drop_file_cache()
        ids = self._ids[self.num_steps % len(self._ids)]
        before = self.source.bytes_read if self.source is not None else 0
        begin = time.perf_counter()
        self.model(ids, past_key_values=self._cache, use_cache=True)
        elapsed = (time.perf_counter() - begin) * 1e3
        self._cache.crop(-1)
        self.num_steps += 1
        self._bytes += (self.source.bytes_read if self.source is not None else 0) - before
        return elapsed

    @property
    def bytes_per_step(self) -> float:
        """Mean of what the steps so far took from the storage."""
        return self._bytes / max(1, self.num_steps)


def _time(steps: dict[str, _Stepper], *, cold: bool, repeats: int, seed: int) -> dict[str, Timing]:
    """Steps of all, taking turns in random order."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(seed)
    once: Callable[[str], Any] = lambda name: steps[name].step(cold=cold)  # noqa: E731
    for name in order:
        once(name)
        once(name)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(once(name))
    finally:
        gc.enable()
    return {name: summarise(values) for name, values in samples.items()}
