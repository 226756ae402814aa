"""What a model recalls from far back with each cache: the ordering of the methods, rows, bits and levels, by seed.

Each prompt holds many chains of symbols, no two alike, and asks for one: its first symbol is repeated, and the rest has
to be looked up. The answers are fed token by token, and counted where the model would have said the same, so that all
caches are asked the same. The first token after the prompt comes from the prefill and does not count.

`WORDS` asks SmolLM2-135M with words of its own vocabulary. `TRAINED` asks `recall_decoder`, a small decoder that was
trained on such chains and looks symbols up nearly without mistakes: `tiny.yaml`, commands in README.md.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers.cache_utils import Cache

from ...datamodules import recall_prompts
from ...datamodules.retrieval import FIRST_SYMBOL
from ...inference.specache import (
    CacheShape,
    DecodingCache,
    RecordedPrompt,
    SpeCache,
    SpeCacheOptions,
    build_cache,
    decode_recorded,
    equal_bytes_options,
    record_prompt,
    tensor_bytes,
)
from ..model_source import load_source, source_tokenizer


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Sizes of the study.

    Attributes:
        model: Model by name.
        dtype: Of the model and of what caches keep in full.
        seeds: Of the prompts.
        words: Symbols are words of the tokenizer; otherwise the ids 0 to `vocab_size`.
        num_prompts: Prompts per seed.
        num_keys: Chains per prompt.
        value_length: Symbols per chain after the first.
        vocab_size: Symbols to draw from, and two more.
        top_k: Exact rows.
        rows: Numbers of exact rows whose trend is shown.
        residual_length: SpeCache's residual.
        group_size: Values that share a scale.
    """

    model: str = "asset:smollm2-135m"
    dtype: str = "bfloat16"
    seeds: tuple[int, ...] = (0, 1, 2)
    words: bool = True
    num_prompts: int = 6
    num_keys: int = 40
    value_length: int = 7
    vocab_size: int = 1024
    top_k: int = 32
    rows: tuple[int, ...] = (0, 16, 32, 64, 128, 256)
    residual_length: int = 32
    group_size: int = 32

    def options(self, bits: int) -> SpeCacheOptions:
        """The SpeCache that sets the budget at so many bits."""
        return SpeCacheOptions(
            bits=bits, top_k=self.top_k, residual_length=self.residual_length, group_size=self.group_size
        )


WORDS = Recall()
DECODER = Path(__file__).with_name("recall_decoder")
TRAINED = Recall(
    model=str(DECODER), dtype="float32", words=False, num_prompts=32, num_keys=22, vocab_size=256, top_k=16,
    rows=(0, 8, 16, 32, 64, 128), residual_length=16, group_size=16,
)  # fmt: skip


@dataclass(frozen=True)
class Recalled:
    """One cache on the prompts of one seed.

    Attributes:
        tokens: Share of looked-up symbols that the model would have said, 0 to 1.
        nats: Mean negative log-likelihood of the looked-up symbols.
        divergence: Mean Kullback-Leibler divergence from the full cache, in nats.
        device_bytes: Per sequence.
        hit_ratio: Share of guesses that were right, of a SpeCache.
        coverage_ratio: Share of each token's own rows that were there, of a SpeCache.
    """

    tokens: float
    nats: float
    divergence: float
    device_bytes: int
    hit_ratio: float | None = None
    coverage_ratio: float | None = None


def run_recall(study: Recall, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not in the folder yet.

    Args:
        study: Sizes.
        folder: Where finished seeds are kept.
        report: Told about every seed.

    Returns:
        The study's sizes, and by label one `Recalled` per seed, as plain dictionaries.

    Raises:
        ValueError: The model is not there, or has too few words of one token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # a folder by its name: where it lies changes nothing
    settings = asdict(replace(study, seeds=(), model=Path(study.model).name))
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    source, symbols = None, None
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in study.seeds:
        path = folder / f"recall-{digest}-{seed}.json"
        seen = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not seen.get("complete"):
            if source is None:
                source = load_source(study.model, dtype=study.dtype)  # type: ignore[arg-type]
                symbols = symbol_ids(source_tokenizer(source), study.vocab_size) if study.words else None
            for label, recalled in recall_of_seed(study, source.model, seed, symbols, skip=set(seen)):
                seen[label] = asdict(recalled)
                # cache by cache: a run that is stopped loses one
                _replace(path, seen)
            seen["complete"] = True
            _replace(path, seen)
            report(f"recall, seed {seed}")
        for label, values in seen.items():
            if label != "complete":
                found.setdefault(label, []).append(values)
    return {"study": asdict(study), "caches": found}


def _replace(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def symbol_ids(tokenizer: Any, count: int) -> torch.Tensor:
    """(count,) token ids: an end of line twice, then words of one token, the most frequent first.

    Raises:
        ValueError: There are too few.
    """
    line = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    # byte-level vocabularies write a space in front of a word as this letter
    words = [number for text, number in vocabulary if text[:1] == "\u0120" and len(text) > 4 and text[1:].islower()]
    words = [number for number in words if tokenizer.convert_ids_to_tokens(number)[1:].isascii()]
    if len(words) < count - FIRST_SYMBOL:
        raise ValueError(f"the tokenizer has {len(words)} words of one token, {count - FIRST_SYMBOL} are needed")
    return torch.tensor([line, line, *words[: count - FIRST_SYMBOL]])


def recall_of_seed(
    study: Recall, model: Any, seed: int, symbols: torch.Tensor | None = None, *, skip: Collection[str] = ()
) -> Iterator[tuple[str, Recalled]]:
    """All caches on the prompts of one seed, with their labels.

    Args:
        study: Sizes.
        model: The model.
        seed: Of the prompts.
        symbols: (vocab_size,) token ids of the symbols; the symbols' own numbers when None.
        skip: Labels of caches that are not asked for.
    """
    prompts = recall_prompts(
        num_prompts=study.num_prompts,
        num_keys=study.num_keys,
        value_length=study.value_length,
        vocab_size=study.vocab_size,
        seed=seed,
    )
    ids, answers = prompts.input_ids, prompts.answers
    if symbols is not None:
        ids, answers = symbols[ids], symbols[answers]
    prompt = record_prompt(model, ids)
    _, full = decode_recorded(model, prompt, build_cache("full", model.config)[0], continuation=answers)
    capacity = ids.shape[1] + study.value_length - 1
    for label, build in caches(study, model, capacity).items():
        if label not in skip:
            yield label, _recalled(model, prompt, build(), answers, full)


def caches(study: Recall, model: Any, capacity: int) -> dict[str, Any]:
    """What makes a cache, by label."""
    shape = CacheShape.of(model.config, model.dtype)

    def make(name: str, **options: Any) -> Any:
        return lambda: build_cache(name, model.config, **options)[0]

    found = {"full": make("full")}
    for bits in (2, 1):
        base = {"bits": bits, "residual_length": study.residual_length, "group_size": study.group_size}
        found[f"exact-fetch-{bits}"] = make("exact-fetch", top_k=study.top_k, **base)
        found[f"specache-{bits}"] = make("specache", top_k=study.top_k, measure=True, **base)
        for name in ("kivi", "window", "h2o"):
            budget = equal_bytes_options(
                name,
                shape=shape,
                options=study.options(bits),
                capacity_tokens=capacity,
            )
            found[f"{name}-{bits}"] = make(name, **budget)
            if name == "kivi":
                # the other levels: at 1 bit the paper's, which the method has of itself
                found[f"kivi-{bits}-centred"] = make(name, rule="centred", **budget)
        if bits == 1:
            found["specache-1-kivi-levels"] = make("specache", top_k=study.top_k, rule="kivi", **base)
        for rows in study.rows:
            found[f"specache-{bits} k={rows}"] = make("specache", top_k=min(rows, capacity), **base)
    return found


def _recalled(model: Any, prompt: RecordedPrompt, cache: Cache, answers: torch.Tensor, full: torch.Tensor) -> Recalled:
    _, logits = decode_recorded(model, prompt, cache, continuation=answers)
    hits: dict[str, Any] = {}
    if isinstance(cache, SpeCache) and cache.speculative:
        statistics = cache.statistics
        hits = {"hit_ratio": statistics.speculation_hit_ratio, "coverage_ratio": statistics.coverage_ratio}
    p, q = (values[:, 1:].double().log_softmax(-1) for values in (full, logits))
    wanted = answers[:, 1:]
    return Recalled(
        tokens=(q.argmax(-1) == wanted).double().mean().item(),
        nats=-q.gather(2, wanted.unsqueeze(2)).mean().item(),
        divergence=(p.exp() * (p - q)).sum(-1).mean().item(),
        device_bytes=(cache.device_bytes if isinstance(cache, DecodingCache) else tensor_bytes(cache, "cpu"))
        // len(answers),
        **hits,
    )


def mean_and_spread(result: dict[str, Any], label: str, name: str = "tokens") -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [each[name] for each in result["caches"][label]]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
