"""What a small trained decoder recalls with each cache: the ordering of the methods, rows, bits and levels, by seed.

The model was trained by `tenfold fit -c experiments/specache/tiny.yaml`; it knows nothing but to look up the symbol
that followed. Each prompt holds many chains and asks for one; an answer counts when all its values are right.
The first value comes from the prefill, which is exact with every cache; the others are decoded.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from ... import lightning_modules as _lightning_modules  # noqa: F401 (registers the model type)
from ...datamodules import recall_prompts
from ...inference.specache import (
    CacheShape,
    RecordedPrompt,
    SpeCache,
    SpeCacheOptions,
    build_cache,
    decode_recorded,
    equal_bytes_options,
    record_prompt,
)

MODEL = Path(__file__).parent / "recall_model"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Sizes of the study.

    Attributes:
        seeds: Of the prompts.
        num_prompts: Prompts per seed.
        num_keys: Chains per prompt.
        value_length: Values per key.
        top_k: Exact rows.
        rows: Numbers of exact rows whose trend is shown.
        residual_length: SpeCache's residual.
        group_size: Values that share a scale.
        dtype: Of the model and of what caches keep in full.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_prompts: int = 32
    num_keys: int = 30
    value_length: int = 7
    top_k: int = 16
    rows: tuple[int, ...] = (0, 4, 8, 16, 32, 64, 256)
    residual_length: int = 16
    group_size: int = 16
    dtype: str = "bfloat16"

    def options(self, bits: int) -> SpeCacheOptions:
        """The SpeCache that sets the budget at so many bits."""
        return SpeCacheOptions(
            bits=bits, top_k=self.top_k, residual_length=self.residual_length, group_size=self.group_size
        )


@dataclass(frozen=True)
class Recalled:
    """One cache on the prompts of one seed.

    Attributes:
        answers: Share of answers that are right in all their values, 0 to 1.
        tokens: Share of decoded values that are right.
        divergence: Mean Kullback-Leibler divergence from the full cache along the right answers, in nats.
        device_bytes: Per sequence.
        hit_ratio: Share of guesses that were right, of a SpeCache.
        coverage_ratio: Share of each token's own rows that were there, of a SpeCache.
        by_chain: Share of right answers by fifth of the prompt in which the chain lies, first to last.
    """

    answers: float
    tokens: float
    divergence: float
    device_bytes: int
    hit_ratio: float | None = None
    coverage_ratio: float | None = None
    by_chain: list[float] = field(default_factory=list)


def load_recall_model(dtype: str = "bfloat16", folder: Path = MODEL) -> Any:
    """The trained decoder.

    Raises:
        FileNotFoundError: It is not there; the message says how to make it.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no model: make it with tenfold fit -c experiments/specache/tiny.yaml and tenfold export"
        )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def run_recall(study: Recall, *, folder: Path = MODEL) -> dict[str, Any]:
    """Run all caches on all seeds.

    Returns:
        The study's sizes, and by label one `Recalled` per seed, as plain dictionaries.
    """
    model = load_recall_model(study.dtype, folder)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in study.seeds:
        for label, recalled in recall_of_seed(study, model, seed).items():
            found.setdefault(label, []).append(asdict(recalled))
    return {"study": asdict(study), "parameters": model.num_parameters(), "caches": found}


def recall_of_seed(study: Recall, model: Any, seed: int) -> dict[str, Recalled]:
    """All caches on the prompts of one seed, by label."""
    prompts = recall_prompts(
        num_prompts=study.num_prompts,
        num_keys=study.num_keys,
        value_length=study.value_length,
        vocab_size=model.config.vocab_size,
        seed=seed,
    )
    prompt = record_prompt(model, prompts.input_ids)
    _, full = decode_recorded(model, prompt, build_cache("full", model.config)[0], continuation=prompts.answers)
    capacity = prompts.input_ids.shape[1] + study.value_length - 1
    fifths = prompts.asked * 5 // study.num_keys
    return {
        label: _recalled(model, prompt, build, prompts.answers, full, fifths)
        for label, build in _caches(study, model, capacity).items()
    }


def _caches(study: Recall, model: Any, capacity: int) -> dict[str, Any]:
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
                found[f"kivi-{bits}-centred"] = make(name, rule="centred", **budget)
        for rows in study.rows:
            found[f"specache-{bits} k={rows}"] = make("specache", top_k=min(rows, capacity), **base)
    return found


def _recalled(
    model: Any, prompt: RecordedPrompt, build: Any, answers: torch.Tensor, full: torch.Tensor, fifths: torch.Tensor
) -> Recalled:
    cache: Cache = build()
    tokens, _ = decode_recorded(model, prompt, cache, num_tokens=answers.shape[1])
    right = tokens == answers
    hits: dict[str, Any] = {}
    if isinstance(cache, SpeCache) and cache.speculative:
        statistics = cache.statistics
        hits = {"hit_ratio": statistics.speculation_hit_ratio, "coverage_ratio": statistics.coverage_ratio}
    # along the right answers, so that all caches are asked the same
    _, logits = decode_recorded(model, prompt, build(), continuation=answers)
    p, q = (values[:, 1:].double().log_softmax(-1) for values in (full, logits))
    divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    whole = right.all(1).double()
    return Recalled(
        answers=whole.mean().item(),
        tokens=right[:, 1:].double().mean().item(),
        divergence=divergence,
        device_bytes=getattr(cache, "device_bytes", 0) // len(answers),
        by_chain=[whole[fifths == fifth].mean().item() for fifth in range(5)],
        **hits,
    )


def mean_and_spread(result: dict[str, Any], label: str, name: str = "answers") -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    values = [each[name] for each in result["caches"][label]]
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
