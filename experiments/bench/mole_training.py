"""Training steps with experts once per distinct id against once per token, and the speed of building a table.

The training step is forward, backward and a fused AdamW step, under bfloat16 autocast where the machine computes in
that (`number_formats.py`), on packed Wikipedia summaries in SmolLM2's tokens, with the 160M widths and 4 of the 12
layers: the naive form would not fit into ordinary memory otherwise. Dense work (attention, shared expert, output layer,
optimiser) is in both.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...lightning_modules.decoder import DecoderForCausalLM, decoder_config
from ...lightning_modules.mole.convert import plan_table, write_table
from .number_formats import dtype_name, fast_bfloat16
from .registry import Settings
from .rows import Row, compare, missing_peer
from .timing import Timing, require_same, summarise

SEQUENCE_TOKENS = 512
NUM_LAYERS = 4


def real_tokens(count: int, *, vocab_size: int, seed: int) -> torch.Tensor | None:
    """(count / 512, 512) ids of packed real text, below `vocab_size`; None where text or tokenizer are missing."""
    from ...datamodules import TextDataModule
    from ...datamodules.assets import find_asset

    folder = find_asset("smollm2-135m")
    if folder is None or find_asset("wikipedia-summaries") is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents = TextDataModule(data="asset:wikipedia-summaries", tokenizer="bpe:300").documents("train")
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document["text"]).input_ids, tokenizer.eos_token_id]
        if len(ids) >= count:
            break
    return torch.tensor(ids[:count]).remainder(vocab_size).view(-1, SEQUENCE_TOKENS)


def training_rows(size: str, settings: Settings) -> Iterator[Row]:
    """A row per number of experts and tokens."""
    cases = [(4, 1024)] if settings.quick else [(16, 4096), (4, 4096), (4, 8192)]
    fields = (
        {"num_hidden_layers": 2, "vocab_size": 2000}
        if settings.quick
        else {"num_hidden_layers": NUM_LAYERS, "vocab_size": 49152}
    )
    for num_experts, num_tokens in cases:
        case = f"{num_experts}e tokens={num_tokens} real-text {dtype_name()}"
        config = decoder_config(f"mole-{size}-{num_experts}e", **fields)
        ids = real_tokens(num_tokens, vocab_size=config.vocab_size, seed=settings.seed)
        if ids is None:
            row = Row(case, "train_step_ms", float("nan"), "ms")
            yield missing_peer(
                row, "naive", "real text is missing: tenfold assets get smollm2-135m wikipedia-summaries"
            )
            continue
        yield Row(case, "tokens_per_distinct_id", ids.numel() / len(ids.unique()), "")
        torch.manual_seed(settings.seed)
        model = DecoderForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        times: dict[str, list[float]] = {"distinct": [], "naive": []}
        grads: dict[str, Any] = {}
        for repeat in range(1 + 2):
            for how in times:
                elapsed, grad = _step(model, optimizer, ids, how, keep=repeat == 0)
                if repeat:
                    times[how].append(elapsed)
                else:
                    grads[how] = grad
        # bfloat16 products of other shapes round differently
        require_same(case, "naive", [grads["naive"]], [grads["distinct"]], 5e-2)
        ours, theirs = (summarise(values) for values in times.values())
        yield compare(case, "train_step_ms", ours, peer="naive", theirs=theirs)
        del model, optimizer, grads


def _step(model: Any, optimizer: Any, ids: torch.Tensor, how: str, *, keep: bool) -> tuple[float, torch.Tensor | None]:
    """Milliseconds of one step, and on demand a gradient that all experts took part in."""
    for layer in model.model.layers:
        layer.feed_forward.expert_evaluation = how
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16()):
        loss = model(ids, labels=ids).loss
    loss.backward()
    grad = model.model.layers[0].feed_forward.lookup.experts.up.grad.clone() if keep else None
    optimizer.step()
    optimizer.zero_grad()
    return (time.perf_counter() - begin) * 1e3, grad


def building_rows(size: str, folder: Path, settings: Settings) -> Iterator[Row]:
    """Megabytes of table per second, computed, checked and on the disk, and the memory that it took."""
    num_rows = 256 if settings.quick else 4096
    torch.manual_seed(settings.seed)
    model = DecoderForCausalLM(decoder_config(f"mole-{size}-4e", vocab_size=num_rows)).eval()
    limit = 2**28
    for kind in ("none", "nf4"):
        plan = plan_table(model, "bfloat16", limit, quantisation=kind)
        with PeakMemory() as memory:
            begin = time.perf_counter()
            write_table(model, folder / kind, memory_limit_bytes=limit, quantisation=kind)
            elapsed = Timing((time.perf_counter() - begin) * 1e3, 0.0, 1)
        case = f"{size}-4e quantisation={kind} ids={num_rows}"
        yield Row(case, "build_mb_s", plan.file_bytes / elapsed.median_ms / 1e3, "MB/s")
        yield Row(
            case,
            "build_peak_bytes",
            memory.peak_bytes,
            "B",
            bound="stated working memory",
            bound_value=plan.working_bytes,
        )


class PeakMemory:
    """Largest resident memory of the process within a block, above what it was at the start, sampled."""

    def __enter__(self) -> "PeakMemory":
        self.peak_bytes = 0
        self._start = self._resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, self._resident() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
