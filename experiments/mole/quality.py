"""Small-scale science: decoders of one activated size on the same tokens, several seeds, what MoLE's paper leaves out.

Runs are kept by `experiments/kept_runs.py`: a study that was stopped goes on where it was, and several processes may
work on one.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...lightning_modules.decoder import DecoderForCausalLM, decoder_config
from ...lightning_modules.language_model import cosine_with_warmup
from ...lightning_modules.mole.adapter import AdapterConfig, add_lookup_experts
from ..kept_runs import KeptRuns, settings_digest
from ..text_scores import task_scores

SEEDS = (0, 1, 2)
# in the second one answer is right in five of eight questions, as in BoolQ, on which published comparisons lean
CHOICE_TASKS = ("wikipedia_title_cloze", "wikipedia_yes_no")


@dataclass(frozen=True)
class Study:
    """Settings that all runs share.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        learning_rate: peak.
        vocabulary: entries of the BPE tokenizer that is trained on the text.
        val_batches: held-out batches behind the loss.
        task_documents: first documents of each lm-eval task; a multiple of 8, over which answers are balanced.
        tasks: that lm-eval scores.
        hidden_size: width of the decoders, all else being the presets'.
    """

    steps: int = 150
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 3e-3
    vocabulary: int = 2048
    val_batches: int = 8
    task_documents: int = 120
    tasks: tuple[str, ...] = ("wikipedia_bits_per_byte", *CHOICE_TASKS)
    hidden_size: int = 64

    @property
    def digest(self) -> str:
        """Names the settings."""
        return settings_digest(self)


QUICK = Study(
    steps=3, batch_size=2, sequence_length=64, vocabulary=300, val_batches=1, task_documents=8, hidden_size=32
)


def _build(preset: str, *, adapter: AdapterConfig | None = None, widening: int = 1, **fields: Any) -> Any:
    def build(vocab_size: int, hidden_size: int) -> Any:
        sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size}
        model = DecoderForCausalLM(
            decoder_config(preset, **sizes, intermediate_size=widening * 4 * hidden_size, **fields)
        )
        if adapter is not None:
            add_lookup_experts(model, replace(adapter, intermediate_size=4 * hidden_size), freeze=False)
        return model

    return build


# the first is what the others are compared with
VARIANTS: dict[str, Callable[[int, int], Any]] = {
    "dense": _build("dense-tiny"),
    # as many multiply-adds per training token as MoLE-4E without de-duplication
    "dense-5x-wide": _build("dense-tiny", widening=5),
    "moe-top2": _build("moe-tiny-10e"),
    "moe-all-active": _build("moe-tiny-10e", feed_forward_options={"num_experts": 10, "num_experts_per_token": 10}),
    "mole-4e": _build("mole-tiny-4e"),
    "mole-16e": _build("mole-tiny-16e"),
    # rows of the size of MoLE-4E's, learned directly
    "token-table-4e": _build("dense-tiny", adapter=AdapterConfig(num_experts=4, values="table")),
    "bigram-4e": _build(
        "dense-tiny", adapter=AdapterConfig(num_experts=4, key="ngram_hash", num_keys=49152, ngram_order=2)
    ),
}


def runs(study: Study, folder: Path) -> KeptRuns:
    """The study's runs, kept in `folder`."""
    return KeptRuns(folder, study, partial(result_of, study=study))


def run_one(variant: str, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """The result of a run: what lies in the folder, or of training it now.

    Raises:
        ValueError: an unknown variant, or a loss that is no number.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    return runs(study, folder).get(variant, seed)


def result_of(variant: str, seed: int, study: Study) -> dict[str, Any]:
    """Train a variant and measure it.

    Raises:
        ValueError: a loss that is no number.
    """
    from ...datamodules import TextDataModule

    data = TextDataModule(
        tokenizer=f"bpe:{study.vocabulary}",
        sequence_length=study.sequence_length,
        batch_size=study.batch_size,
        seed=seed,
    )
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(seed)
    model = VARIANTS[variant](data.vocab_size, study.hidden_size).train()
    begin = time.perf_counter()
    train(model, data.train_dataloader(), study)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": round(time.perf_counter() - begin, 1),
        "val_loss": held_out_loss(model.eval(), data.val_dataloader(), study.val_batches),
        "scores": task_scores(model, data, study.task_documents, study.tasks),
    }


def train(model: Any, batches: Any, study: Study) -> None:
    """AdamW with a warm-up and a cosine, gradients clipped at 1; the settings of `tiny.yaml`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=study.learning_rate, betas=(0.9, 0.95), fused=True)
    rate = partial(cosine_with_warmup, warmup_steps=max(1, study.steps // 10), total_steps=study.steps, min_ratio=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    source = iter(batches)
    for step in range(study.steps):
        try:
            batch = next(source)
        except StopIteration:
            source = iter(batches)
            batch = next(source)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss is {loss.item()} at step {step}: the training diverged; lower the learning rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def held_out_loss(model: Any, batches: Any, num_batches: int) -> float:
    """Next-token loss in nats, without auxiliary losses, over the first batches."""
    nats, count = 0.0, 0
    for number, batch in enumerate(batches):
        if number == num_batches:
            break
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
        count += int((labels != -100).sum())
    return nats / count
