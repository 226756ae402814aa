"""The benchmarks by name.

To add one, write a module here with `run(settings: Settings) -> Iterator[Row]` and give it a line in `BENCHES`; see
`weighted_gather.py`. `run` builds its cases, lets `timing.require_same` compare every peer's result with ours, times
ours and the peers in one `timing.measure` call, and yields one `rows.compare` per metric and peer; a peer that can't
run here gets a `rows.missing_peer`.
"""

import difflib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .rows import Row

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Settings:
    """What the command line hands to a benchmark.

    Attributes:
        device: where to measure.
        quick: fewer repeats and cases, to see that it works.
        seed: for the random inputs.
    """

    device: Device = "cpu"
    quick: bool = False
    seed: int = 0

    @property
    def repeats(self) -> int:
        """Timed samples per callable."""
        return 5 if self.quick else 25


class Bench(NamedTuple):
    """A registered benchmark.

    Attributes:
        module: module in this package with `run`.
        help: what it measures, one line.
    """

    module: str
    help: str


BENCHES: dict[str, Bench] = {
    "mole": Bench("mole", "decoding from MoLE's table against dense and MoE, de-duplicated training, table building"),
    "mole-quality": Bench("mole_quality", "loss and scores of MoLE, MoE, dense and table decoders on the same tokens"),
    "mole-adapter": Bench("mole_adapter", "experts added to SmolLM2-135M against fine-tuning it, at equal compute"),
    "excp": Bench("excp", "checkpoints of real training runs: ratio and error, speed, blocked time, memory"),
    "excp-downstream": Bench("excp_downstream", "scores of a fine-tuned model before and after its saves were coded"),
    "excp-resume": Bench("excp_resume", "training resumed three times from coded saves: loss and first update"),
    "slab": Bench(
        "slab", "fused norms against LayerNorm and RMSNorm, eager and compiled; linear against softmax attention"
    ),
    "slab-quality": Bench("slab_quality", "accuracy and bits per byte of PRepBN, RepBN, batch norm and ordinary norms"),
    "slab-detection": Bench(
        "slab_detection", "average precision of detectors with LayerNorm, PRepBN and fused PRepBN on the same scenes"
    ),
    "specache": Bench("specache", "decoding with SpeCache: device bytes, tokens per second, exposed waits"),
    "specache-quality": Bench(
        "specache_quality", "SpeCache and other caches of its size: recall of symbols, needle, longbench-local"
    ),
    "memoryformer": Bench("memoryformer", "hash-and-gather layers and blocks against dense ones, by tokens and width"),
    "memoryformer-quality": Bench(
        "memoryformer_quality", "bits per byte and bucket use of MemoryFormers and dense decoders on the same tokens"
    ),
    "weighted-gather": Bench("weighted_gather", "weighted sums of table rows, forward and backward"),
}


def resolve(names: list[str]) -> list[str]:
    """Expand `all` and drop repetitions.

    Raises:
        ValueError: a name is not registered; the message offers the nearest ones.
    """
    chosen: dict[str, None] = {}
    for name in names:
        if name == "all":
            chosen |= dict.fromkeys(BENCHES)
        elif name in BENCHES:
            chosen[name] = None
        else:
            near = difflib.get_close_matches(name, BENCHES, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"choose from all, {', '.join(BENCHES)}"
            raise ValueError(f"unknown benchmark {name!r}; {hint}")
    return list(chosen)


def load(name: str) -> Callable[[Settings], Iterator[Row]]:
    """The `run` function of a registered benchmark; imports what it needs."""
    return importlib.import_module(f".{BENCHES[name].module}", __package__).run
