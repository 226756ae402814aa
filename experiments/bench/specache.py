"""Decoding with SpeCache against other caches: bytes on the device, tokens per second, waiting for rows.

Every cache is prefilled with the same prompt, then all decode turn by turn, one greedy token per sequence and call; the
prefill is not timed. The model has random weights: times do not depend on them, quality is measured elsewhere. On a GPU
each cache also runs alone at the largest batch that fits. A picture of some steps goes to `runs/bench/specache`.
"""

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import Cache

from ...inference.specache import (
    CacheShape,
    DecodingCache,
    SpeCache,
    SpeCacheOptions,
    SpeCacheSession,
    build_cache,
    equal_bytes_options,
    tensor_bytes,
)
from .registry import Settings
from .rows import Row, missing_peer, ratio
from .specache_parts import part_rows, published_rows
from .specache_trace import draw_trace, record_steps
from .timing import Timing, measure, require_same

FOLDER = Path("runs", "bench", "specache")
PEERS = ("full", "offloaded", "quantized", "kivi", "exact-fetch", "window", "h2o")
# tokens that there must be room for after the prompt: warm-up and timed steps
_ROOM = 512
_PREFILL_CHUNK = 4096


class Size(NamedTuple):
    """The model that decodes, and how much."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    batch: int
    contexts: tuple[int, ...]


CPU_QUICK = Size(128, 2, 4, 2, 128, 512, 2, (512,))
CPU = Size(256, 4, 4, 2, 512, 1024, 2, (2048, 8192))
# Qwen2.5-0.5B, but for its vocabulary: the output layer is no part of what is compared
CUDA = Size(896, 24, 14, 2, 4864, 32768, 4, (2048, 8192, 32768))
CUDA_QUICK = CUDA._replace(contexts=(2048,))


def make_model(size: Size, settings: Settings) -> Qwen2ForCausalLM:
    """A decoder of that size with random weights."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=max(size.contexts) + _ROOM + 1,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if settings.device == "cuda" else torch.float32
    with torch.device(settings.device):
        return Qwen2ForCausalLM(config).to(dtype=dtype).eval()  # type: ignore[call-arg]


@dataclass
class Decoding:
    """A cache that holds a prompt and decodes on.

    Attributes:
        cache: The cache.
        logits: Logits (B, V) of the prompt's last token.
        step: Decodes one token per sequence.
    """

    cache: Cache
    logits: torch.Tensor
    step: Callable[[], torch.Tensor]


@torch.no_grad()
def start(model: Qwen2ForCausalLM, ids: torch.Tensor, name: str, **options: Any) -> Decoding:
    """Prefill a cache by name.

    Raises:
        ValueError: The cache cannot run here.
    """
    cache, _ = build_cache(name, model.config, **options)
    if isinstance(cache, DecodingCache):
        return _start_own(model, ids, cache)
    for chunk in ids.split(_PREFILL_CHUNK, dim=1):
        logits = model(chunk, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    state = [logits.argmax(-1)]

    @torch.no_grad()
    def step() -> torch.Tensor:
        output = model(state[0][:, None], past_key_values=cache).logits[:, -1]
        state[0] = output.argmax(-1)
        return state[0]

    return Decoding(cache, logits, step)


def _start_own(model: Qwen2ForCausalLM, ids: torch.Tensor, cache: DecodingCache) -> Decoding:
    # the same weights, attending through the cache for good: switching would be timed with every step
    with torch.device("meta"):
        twin = Qwen2ForCausalLM(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    twin.model.rotary_emb = model.model.rotary_emb
    session = SpeCacheSession(twin, cache)
    mask = torch.ones_like(ids)
    logits = session.prefill(
        ids,
        capacity=ids.shape[1] + _ROOM,
        chunk_size=_PREFILL_CHUNK if cache.takes_parts else None,
        attention_mask=mask,
        logits_to_keep=1,
    )
    twin.set_attn_implementation("specache")
    state = [torch.cat([ids[:, -1:], logits.argmax(-1)[:, None]], dim=1)]

    def draw(_: torch.Tensor, scores: torch.Tensor, __: bool) -> torch.Tensor:
        return scores.argmax(-1)

    @torch.no_grad()
    def step() -> torch.Tensor:
        token = session.step(state[0], draw).argmax(-1)
        state[0] = torch.cat([state[0][:, -1:], token[:, None]], dim=1)
        return token

    return Decoding(cache, logits, step)


def _budget(name: str, model: Qwen2ForCausalLM, context: int) -> dict[str, Any]:
    """Options with which a cache that drops tokens takes SpeCache's device bytes."""
    if name not in ("window", "h2o"):
        return {}
    shape = CacheShape.of(model.config, model.dtype)
    capacity = context + _ROOM
    return equal_bytes_options(name, shape=shape, options=SpeCacheOptions(), capacity_tokens=capacity)


def device_bytes(cache: Cache, device: str) -> int:
    """Bytes of all tensors on the device that can be reached from the cache's layers."""
    if isinstance(cache, DecodingCache):
        return cache.device_bytes
    return tensor_bytes(cache, device)


def tokens_per_second(timing: Timing, batch: int) -> float:
    """Rate of a timed step."""
    return batch * 1000 / timing.median_ms


def exposed_wait_pct(model: Qwen2ForCausalLM, ids: torch.Tensor, name: str, steps: int, device: str) -> float:
    """Share of the steps' time in which computation stood still for rows, in percent."""
    options = {"prefetch": "async"} | ({"measure": True} if name == "specache" else {})
    decoding = start(model, ids, name, **options)
    cache = decoding.cache
    assert isinstance(cache, SpeCache)
    for _ in range(3):
        decoding.step()
    before = cache.statistics.exposed_wait_seconds
    timing = measure({"step": decoding.step}, device=device, repeats=steps, warmup=0)["step"]
    # `measure` takes three steps of its own before its samples
    waited = (cache.statistics.exposed_wait_seconds - before) / (steps + 3)
    cache.close()
    return 100 * waited / (timing.median_ms / 1000)


def run(settings: Settings) -> Iterator[Row]:
    """Rows for every context and peer."""
    if settings.device == "cuda":
        size = CUDA_QUICK if settings.quick else CUDA
    else:
        size = CPU_QUICK if settings.quick else CPU
    yield from published_rows()
    model = make_model(size, settings)
    for context in size.contexts:
        yield from _rows(model, size, context, settings)
        if settings.device == "cuda" and not settings.quick:
            yield from _largest_batches(model, context, settings)


def _rows(model: Qwen2ForCausalLM, size: Size, context: int, settings: Settings) -> Iterator[Row]:
    case = f"context={context} batch={size.batch}"
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(3, size.vocabulary, (size.batch, context), generator=generator).to(settings.device)
    ours = start(model, ids, "specache")
    running, reasons = {"specache": ours}, {}
    for peer in PEERS:
        try:
            running[peer] = start(model, ids, peer, **_budget(peer, model, context))
        except ValueError as error:
            reasons[peer] = str(error)
            continue
        if peer == "quantized" and context > _PREFILL_CHUNK:
            # later chunks read earlier ones in few bits
            continue
        # nothing is lost in a prefill: all caches begin at the same logits
        limit = 1e-4 if model.dtype == torch.float32 else 3e-2
        require_same(f"{case} prefill", peer, [running[peer].logits], [ours.logits], limit)
    yield from _byte_rows(case, running, reasons, model, size.batch, settings.device)
    steps = min(settings.repeats, _ROOM // 4)
    calls = {name: decoding.step for name, decoding in running.items()}
    # a sample is one step: the caches' room is counted in steps
    timings = measure(calls, device=settings.device, repeats=steps, min_sample_ms=0.0, seed=settings.seed)
    yield from _rate_rows(case, timings, reasons, size.batch)
    own = ours.cache
    assert isinstance(own, SpeCache)
    yield from part_rows(case, own, ours.step, repeats=max(steps // 2, 3), device=settings.device)
    for decoding in running.values():
        if isinstance(decoding.cache, SpeCache):
            decoding.cache.close()
    running.clear()
    _picture(case, model, ids, settings.device)
    yield _wait_row(case, model, ids, steps, settings)


def _picture(case: str, model: Qwen2ForCausalLM, ids: torch.Tensor, device: str) -> None:
    decoding = start(model, ids, "specache", prefetch="async")
    for _ in range(3):
        decoding.step()
    spans, begins = record_steps(decoding.step, device=device)
    assert isinstance(decoding.cache, SpeCache)
    decoding.cache.close()
    draw_trace(spans, begins, FOLDER / f"trace {case}.png".replace(" ", "-"), title=f"SpeCache, {case}, {device}")


def _byte_rows(
    case: str, running: dict[str, Decoding], reasons: dict[str, str], model: Qwen2ForCausalLM, batch: int, device: str
) -> Iterator[Row]:
    cache = running["specache"].cache
    assert isinstance(cache, SpeCache)
    shape = CacheShape.of(model.config, model.dtype)
    formula = shape.device_bytes(cache.options, batch, cache.capacity)
    row = Row(case, "device_bytes", cache.device_bytes, "bytes", bound="formula", bound_value=formula)
    for peer in PEERS:
        if peer in reasons:
            yield missing_peer(row, peer, reasons[peer])
            continue
        theirs = running[peer].cache
        # a plain cache has taken no room for what is to come: compare at the same number of tokens
        full = peer == "full" and isinstance(theirs, DynamicCache)
        value = shape.full_bytes(batch, cache.capacity) if full else device_bytes(theirs, device)
        if not full and not isinstance(theirs, DecodingCache):
            value = round(value * cache.capacity / theirs.get_seq_length())
        yield Row(**{**row.__dict__, "peer": peer, "peer_value": value, "ratio": ratio(row.value, value)})
    yield Row(case, "host_bytes", cache.host_bytes, "bytes", bound="formula",
              bound_value=shape.host_bytes(batch, cache.capacity))  # fmt: skip
    yield Row(
        case, "fetched_bytes_per_step", shape.fetched_bytes_per_step(cache.options, batch, cache.capacity), "bytes"
    )


def _rate_rows(case: str, timings: dict[str, Timing], reasons: dict[str, str], batch: int) -> Iterator[Row]:
    ours = timings["specache"]
    rate = tokens_per_second(ours, batch)
    # of a rate: the spread of the time, relative
    row = Row(
        case, "tokens_per_s", rate, "tokens/s", repeats=ours.repeats, spread=rate * ours.spread_ms / ours.median_ms
    )
    for peer in PEERS:
        if peer in reasons:
            yield missing_peer(row, peer, reasons[peer])
            continue
        value = tokens_per_second(timings[peer], batch)
        quotient = ratio(rate, value, higher_is_better=True)
        yield Row(**{**row.__dict__, "peer": peer, "peer_value": value, "ratio": quotient})


def _wait_row(case: str, model: Qwen2ForCausalLM, ids: torch.Tensor, steps: int, settings: Settings) -> Row:
    ours, theirs = (exposed_wait_pct(model, ids, name, steps, settings.device) for name in ("specache", "exact-fetch"))
    return Row(
        case, "exposed_wait_pct", ours, "%", peer="exact-fetch", peer_value=theirs, ratio=ratio(ours, theirs),
        repeats=steps,
    )  # fmt: skip


def _largest_batches(model: Qwen2ForCausalLM, context: int, settings: Settings) -> Iterator[Row]:
    """Every cache alone at the largest batch of 1, 2, 4, … sequences that it can hold."""
    found: dict[str, tuple[float, int, Timing]] = {}
    reasons: dict[str, str] = {}
    for name in ("specache", *PEERS):
        for batch in itertools.takewhile(lambda batch: batch <= 256, (2**power for power in range(9))):
            ids = torch.randint(3, model.config.vocab_size, (batch, context), device=settings.device)
            try:
                decoding = start(model, ids, name, **_budget(name, model, context))
                timing = measure({"step": decoding.step}, device="cuda", repeats=10, min_sample_ms=0.0)["step"]
            except (ValueError, torch.cuda.OutOfMemoryError) as error:
                reasons[name] = str(error).splitlines()[0]
                break
            finally:
                decoding = None  # type: ignore[assignment]
                gc.collect()
                torch.cuda.empty_cache()
            found[name] = (tokens_per_second(timing, batch), batch, timing)
    if "specache" not in found:
        return
    rate, batch, timing = found["specache"]
    row = Row(f"context={context} largest-batch", "tokens_per_s", rate, "tokens/s", repeats=timing.repeats,
              bound="batch", bound_value=batch)  # fmt: skip
    for peer in PEERS:
        if peer not in found:
            yield missing_peer(row, peer, reasons.get(peer, "no batch fits"))
            continue
        value, peer_batch, _ = found[peer]
        quotient = ratio(rate, value, higher_is_better=True)
        reason = f"at batch {peer_batch}"
        yield Row(**{**row.__dict__, "peer": peer, "peer_value": value, "ratio": quotient, "reason": reason})
