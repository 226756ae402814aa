"""Scores of a language model on held-out Wikipedia text, for studies: loss, bits per byte, and lm-eval's tasks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

# the second has no majority class
TASKS = ("wikipedia_bits_per_byte", "wikipedia_title_cloze")


@torch.no_grad()
def held_out(model: Any, batches: Iterable[dict[str, torch.Tensor]], num_batches: int) -> dict[str, float]:
    """Next-token loss in nats, and bits per byte of text, over the first batches."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for _, batch in zip(range(num_batches), batches, strict=False):
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        num_tokens += int((labels != -100).sum())
        num_bytes += int(batch["num_bytes"].sum())
    return {"loss": nats / num_tokens, "bits_per_byte": nats / math.log(2) / num_bytes}


def task_scores(model: Any, data: Any, num_documents: int, tasks: Sequence[str] = TASKS) -> dict[str, dict[str, float]]:
    """lm-eval's numbers on held-out documents.

    Args:
        model: in evaluation mode.
        data: a `TextDataModule` that is set up; gives documents and tokenizer.
        num_documents: first documents of each task.
        tasks: of the Wikipedia tasks that are shipped.
    """
    from ..datamodules.assets import cache_dir
    from ..inference.evals import build_wikipedia_tasks, evaluate_model

    folder = cache_dir() / "tasks" / "wikipedia-summaries"
    build_wikipedia_tasks(data.documents("test"), folder)
    results = evaluate_model(
        model,
        tasks=list(tasks),
        tokenizer=data.tokenizer,
        limit=num_documents,
        shipped_data_dir=folder,
        device="cpu",
        progress="off",
    )
    assert results is not None
    return {
        task: {name: value for name, value in results["results"][task].items() if isinstance(value, float)}
        for task in tasks
    }
