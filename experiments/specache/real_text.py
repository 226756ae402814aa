"""What a pretrained model finds in real text with each cache: needle, longbench-local, and decoded perplexity.

A prompt is read once and all caches start from it, so that differences are the caches' alone. Answers are greedy and
scored by the tasks' own code. Finished batches are kept in a file; a run that was stopped goes on after the last one.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch.nn import functional as F

from ...inference.evals.long_context.catalogue import plan_long_context
from ...inference.evals.long_context.options import LongContextOptions
from ...inference.specache import (
    CacheShape,
    SpeCache,
    SpeCacheOptions,
    decode_recorded,
    record_prompt,
    tensor_bytes,
)
from ...inference.specache.decoding_cache import DecodingCache
from .methods import Method, methods

PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Sizes of the study.

    Attributes:
        model: Model by name.
        dtype: Of the weights and of everything that is kept in full precision.
        lengths: Tokens of prompt and answer together, of `longbench_local` and of perplexity; all but the first have
            one round.
        needle_lengths: The same for the needle, whose batches are few.
        depths: Where needles lie, in percent.
        rounds: Batches per task at the shortest length, each with other prompts; the needle has as many tokens at each
            length. More rounds go on where fewer ended.
        batch_size: Prompts per batch of `longbench_local` and of perplexity; the needle has one per depth.
        scored_tokens: Tokens after each prompt behind the perplexity.
        seed: Of all prompts.
        top_k: SpeCache's exact rows.
        residual_length: SpeCache's residual.
        group_size: Values that share a scale.
    """

    model: str = "asset:smollm2-135m"
    dtype: str = "bfloat16"
    lengths: tuple[int, ...] = (2048, 4096)
    needle_lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (10.0, 50.0, 90.0)
    rounds: int = 3
    batch_size: int = 2
    scored_tokens: int = 16
    seed: int = 0
    top_k: int = 64
    residual_length: int = 64
    group_size: int = 64

    def options(self, bits: int) -> SpeCacheOptions:
        """The SpeCache that sets the budget at so many bits."""
        return SpeCacheOptions(
            bits=bits, top_k=self.top_k, residual_length=self.residual_length, group_size=self.group_size
        )

    @property
    def digest(self) -> str:
        """Names what one batch depends on: not how many there are."""
        settings = asdict(replace(self, lengths=(), needle_lengths=(), rounds=0))
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


QUICK = Study(lengths=(512,), needle_lengths=(512,), depths=(50.0,), rounds=1, batch_size=1, scored_tokens=8)


@dataclass(frozen=True)
class Batch:
    """Prompts that are read together.

    Attributes:
        suite: `needle`, `longbench_local` or `perplexity`.
        task: The task.
        length: Tokens that its prompts were made for.
        number: Which round.
        texts: Prompts.
        new_tokens: Longest answers in tokens, or tokens that are scored.
        score: Scores an answer, 0 to 1, of the prompt with this number; None for perplexity.
        depths: Where the needles lie.
    """

    suite: str
    task: str
    length: int
    number: int
    texts: tuple[str, ...]
    new_tokens: int
    score: Callable[[int, str], float] | None
    depths: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.task}/{self.length}/{self.number}"


def batches(study: Study, tokenizer: Any, documents: list[dict[str, Any]]) -> Iterator[Batch]:
    """All batches, round by round, so that an unfinished study is balanced."""
    shortest = study.needle_lengths[0]
    for number in range(study.rounds):
        for length in sorted({*study.lengths, *study.needle_lengths}):
            if length in study.needle_lengths and (not number or number * length < study.rounds * shortest):
                yield from _tasks("needle", study, tokenizer, documents, length, number)
            if length in study.lengths and (not number or length == study.lengths[0]):
                yield from _tasks("longbench_local", study, tokenizer, documents, length, number)
                yield _text(study, tokenizer, documents, length, number)


def _tasks(
    suite: str, study: Study, tokenizer: Any, documents: list[dict[str, Any]], length: int, number: int
) -> Iterator[Batch]:
    def wrap(prompt: str, chat: bool) -> str:
        if not chat:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    options = LongContextOptions(
        lengths=(length,), depths=study.depths, seed=study.seed + number, documents=documents,
        num_samples=1 if suite == "needle" else study.batch_size,
    )  # fmt: skip
    plan = plan_long_context([suite], options=options, data_dirs=[])
    for name, task in plan.build(tokenizer, window=length, wrap=wrap).tasks.items():
        docs = list(task.eval_docs)
        yield Batch(
            suite=suite,
            task=name,
            length=length,
            number=number,
            texts=tuple(task.fewshot_context(doc) for doc in docs),
            new_tokens=task.config.generation_kwargs["max_gen_toks"],
            score=partial(_score, task, docs),
            depths=tuple(doc["depth"] for doc in docs) if suite == "needle" else (),
        )


def _score(task: Any, docs: list[dict[str, Any]], place: int, answer: str) -> float:
    return float(task.process_results(docs[place], [answer])["score"])


def _text(study: Study, tokenizer: Any, documents: list[dict[str, Any]], length: int, number: int) -> Batch:
    """Articles one after the other, from another place for each text."""
    texts = []
    for place in range(study.batch_size):
        start = (number * study.batch_size + place + study.seed * 1009) * 97 % len(documents)
        # about four characters per token; what is too much is cut by tokens
        text, index = "", start
        while len(text) < 6 * length:
            document = documents[index % len(documents)]
            text += f"{document['title']}\n{document['text']}\n\n"
            index += 1
        texts.append(text)
    return Batch(PERPLEXITY, PERPLEXITY, length, number, tuple(texts), study.scored_tokens, None)


def run_study(study: Study, folder: Path, report: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not in the folder yet, and give everything back.

    Args:
        study: Sizes.
        folder: Where finished batches are kept, in a file named by the study's digest.
        report: Told about every batch.

    Raises:
        ValueError: The model or the articles are not there.
    """
    from ...datamodules.assets import resolve
    from ...datamodules.documents import list_files, read_documents
    from ..model_source import load_source, source_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{study.digest}.jsonl"
    done = _finished(path)
    source = load_source(study.model, dtype=study.dtype)  # type: ignore[arg-type]
    tokenizer = source_tokenizer(source)
    tokenizer.padding_side = "left"
    documents = [
        {"title": row["title"], "text": row["text"]}
        for file in list_files(Path(resolve("asset:wikipedia-summaries")))
        for row in read_documents(file)
    ]
    reasons: dict[str, str] = {}
    wanted = []
    for batch in batches(study, tokenizer, documents):
        if batch.key in done:
            wanted.append(done[batch.key])
            continue
        start = time.perf_counter()
        part = path.with_suffix(".part.json")
        kept = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        found: dict[str, Any] = kept.get("methods", {}) if kept.get("key") == batch.key else {}
        for label, values in _run_batch(study, source.model, tokenizer, batch, reasons, skip=set(found)):
            found[label] = values
            # method by method: a run that is stopped loses one
            part.with_suffix(".tmp").write_text(json.dumps({"key": batch.key, "methods": found}), encoding="utf-8")
            part.with_suffix(".tmp").replace(part)
        record = {"key": batch.key, "suite": batch.suite, "task": batch.task, "length": batch.length,
                  "number": batch.number, "depths": batch.depths, "methods": found}  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        wanted.append(record)
        report(f"{batch.key}: {len(batch.texts)} prompts in {time.perf_counter() - start:.0f} s")
    return {"study": asdict(study), "missing": reasons, "batches": wanted}


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """Records of a file by key; half a line, which a run that was killed has left, is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return {record["key"]: record for record in map(json.loads, whole.splitlines())}


def _run_batch(
    study: Study, model: Any, tokenizer: Any, batch: Batch, reasons: dict[str, str], *, skip: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What every method gives, with its label; those that cannot run here leave their reason."""
    continuation = None
    if batch.score is None:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"][: batch.length] for text in batch.texts]
        ids = torch.tensor(rows)
        ids, continuation = ids[:, : -batch.new_tokens], ids[:, -batch.new_tokens :]
        mask = torch.ones_like(ids)
    else:
        encoded = tokenizer(list(batch.texts), return_tensors="pt", padding=True)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
    prompt = record_prompt(model, ids, attention_mask=mask)
    shape, capacity = CacheShape.of(model.config, model.dtype), ids.shape[1] + batch.new_tokens - 1
    for method in methods():
        if method.label in skip:
            continue
        try:
            cache = method.build(model.config, shape, study.options(method.bits or 2), capacity)
        except ValueError as error:
            reasons[method.label] = str(error)
            continue
        start = time.perf_counter()
        tokens, logits = decode_recorded(
            model,
            prompt,
            cache,
            num_tokens=None if continuation is not None else batch.new_tokens,
            stop_ids=() if continuation is not None else _stop_ids(model, tokenizer),
            continuation=continuation,
        )
        yield (
            method.label,
            {
                "device_bytes": _device_bytes(method, cache, shape, len(ids), capacity),
                "seconds": round(time.perf_counter() - start, 2),
                **_scores(batch, tokenizer, tokens, logits),
                **_hits(cache),
            },
        )


def _scores(batch: Batch, tokenizer: Any, tokens: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    if batch.score is None:
        # the first token comes from the prefill, which is the same for all
        nats = F.cross_entropy(logits[:, 1:].float().transpose(1, 2), tokens[:, 1:], reduction="none")
        return {"nats": [round(value, 6) for value in nats.mean(1).tolist()]}
    answers = []
    for row in tokens.tolist():
        stops = [place for place, token in enumerate(row) if token in tokenizer.all_special_ids]
        answers.append(tokenizer.decode(row[: min(stops, default=len(row))], skip_special_tokens=True))
    return {
        "scores": [round(batch.score(place, answer), 6) for place, answer in enumerate(answers)],
        "answers": answers,
    }


def _stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    named = model.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}
    return tuple(sorted(token for token in found if token is not None))


def _device_bytes(method: Method, cache: Any, shape: CacheShape, batch: int, capacity: int) -> int:
    """Per sequence, with room for the whole answer."""
    if method.cache == "full":
        return shape.full_bytes(1, capacity)
    return (cache.device_bytes if isinstance(cache, DecodingCache) else tensor_bytes(cache, "cpu")) // batch


def _hits(cache: Any) -> dict[str, Any]:
    if not isinstance(cache, SpeCache) or cache.options.mode != "speculative":
        return {}
    statistics = cache.statistics
    return {"hit_ratio": statistics.speculation_hit_ratio, "coverage_ratio": statistics.coverage_ratio}


@dataclass(frozen=True)
class Score:
    """A method's result over all prompts of a suite and length.

    Attributes:
        mean: In points of 100; nats per token for perplexity.
        error: Standard error over prompts.
        gap: Mean difference to the full cache, prompt by prompt.
        gap_error: Its standard error.
        count: Prompts.
        device_bytes: Per sequence, on average.
    """

    mean: float
    error: float
    gap: float
    gap_error: float
    count: int
    device_bytes: float


def summary(
    result: dict[str, Any], suite: str, *, length: int | None = None, task: str | None = None
) -> dict[str, Score]:
    """Scores by method; `longbench_local` is the mean over prompts, of which every set has as many."""
    values: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for record in result["batches"]:
        if record["suite"] != suite or length not in (None, record["length"]) or task not in (None, record["task"]):
            continue
        for label, found in record["methods"].items():
            numbers = found["nats"] if suite == PERPLEXITY else [100 * value for value in found["scores"]]
            values.setdefault(label, []).extend(numbers)
            sizes.setdefault(label, []).append(found["device_bytes"])
    scores = {}
    for label, numbers in values.items():
        full = values["full"]
        gaps = [a - b for a, b in zip(numbers, full, strict=True)] if len(numbers) == len(full) else [math.nan]
        scores[label] = Score(
            fmean(numbers), _error(numbers), fmean(gaps), _error(gaps), len(numbers), fmean(sizes[label])
        )
    return scores


def _error(values: list[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
