"""Training runs in plain PyTorch that can be stopped, coded and continued at any step: what the studies measure on.

Batch, learning rate and everything else of a step depend on its number and the seed alone, so a run that continues from
exact state gives the same bits as one that was never stopped, and any difference after a lossy resume is the codec's.
"""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...datamodules import TextDataModule

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """A training run and its saves.

    Attributes:
        model: `asset:NAME`, or a preset of this project's decoder whose sizes `overrides` replace.
        overrides: fields of the decoder's configuration, as pairs.
        tokenizer: as `TextDataModule` takes it.
        sequence_length: tokens per sequence.
        batch_size: sequences per step.
        learning_rate: after the warm-up; constant from there on, or following a cosine down to a tenth.
        cosine_steps: length of the cosine; 0 for a constant rate.
        warmup_steps: linear warm-up.
        betas: Adam's decay rates.
        weight_decay: of matrices.
        first_save: step of the first save.
        steps_per_save: steps between saves.
        num_saves: all saves, the first included.
        bfloat16: matrix products in bfloat16; weights and Adam state stay float32.
        seed: of initialisation and data order.
    """

    model: str
    overrides: tuple[tuple[str, Any], ...] = ()
    tokenizer: str = "bpe:4096"
    sequence_length: int = 128
    batch_size: int = 8
    learning_rate: float = 1e-3
    cosine_steps: int = 0
    warmup_steps: int = 20
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    first_save: int = 40
    steps_per_save: int = 40
    num_saves: int = 11
    bfloat16: bool = False
    seed: int = 0

    def step_of(self, save: int) -> int:
        """Optimiser steps done at a save."""
        return self.first_save + save * self.steps_per_save

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.batch_size * self.sequence_length


class Text:
    """Batches of the training and validation split by number."""

    def __init__(self, settings: RunSettings) -> None:
        self.module = TextDataModule(
            tokenizer=settings.tokenizer, sequence_length=settings.sequence_length, batch_size=settings.batch_size
        )
        self.module.prepare_data()
        self.module.setup("fit")
        self.sequences = self.module.train_dataloader().dataset
        self.held_out = self.module.val_dataloader().dataset
        self.batch_size, self.seed = settings.batch_size, settings.seed
        self._orders: dict[int, Tensor] = {}

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        assert self.module.vocab_size is not None
        return self.module.vocab_size

    def batch(self, step: int) -> Tensor:
        """Token ids of a step, shape (batch, sequence): every sequence once per epoch, each epoch in another order."""
        per_epoch = len(self.sequences) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
            self._orders[epoch] = torch.randperm(len(self.sequences), generator=generator)
        numbers = self._orders[epoch][place * self.batch_size : (place + 1) * self.batch_size]
        return torch.stack([self.sequences[int(number)]["input_ids"] for number in numbers])

    def held_out_batches(self, count: int) -> list[Tensor]:
        """The first batches of the validation split."""
        whole = min(len(self.held_out) - 1, count * self.batch_size) // self.batch_size
        return [
            torch.stack([self.held_out[batch * self.batch_size + i]["input_ids"] for i in range(self.batch_size)])
            for batch in range(whole)
        ]


def make_model(settings: RunSettings, vocab_size: int) -> nn.Module:
    """The model at step 0, float32."""
    torch.manual_seed(settings.seed)
    if settings.model.startswith("asset:"):
        from transformers import AutoModelForCausalLM

        from ...datamodules import resolve

        return AutoModelForCausalLM.from_pretrained(resolve(settings.model), dtype=torch.float32).train()
    from ...lightning_modules.decoder.modeling import DecoderForCausalLM
    from ...lightning_modules.decoder.presets import decoder_config

    config = decoder_config(settings.model, vocab_size=vocab_size, **dict(settings.overrides))
    return DecoderForCausalLM(config).train()


class Training:
    """A model, its optimiser and how many steps they have done.

    Args:
        settings: the run.
        text: its data; several runs on the same data may share one.
    """

    def __init__(self, settings: RunSettings, text: Text) -> None:
        self.settings, self.text = settings, text
        self.model = make_model(settings, text.vocab_size)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, fused=True)
        self.step = 0

    def learning_rate(self, step: int) -> float:
        """Of the update that follows `step` updates."""
        settings = self.settings
        if step < settings.warmup_steps:
            return settings.learning_rate * (step + 1) / settings.warmup_steps
        if not settings.cosine_steps:
            return settings.learning_rate
        share = min(1.0, (step - settings.warmup_steps) / max(1, settings.cosine_steps - settings.warmup_steps))
        return settings.learning_rate * (0.55 + 0.45 * math.cos(math.pi * share))

    def loss(self, batch: Tensor) -> Tensor:
        """Mean next-token loss, nats per token."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16):
            return self.model(input_ids=batch, labels=batch).loss

    def train(self, until: int) -> list[float]:
        """Trains up to a step; returns each step's loss before its update."""
        losses = []
        while self.step < until:
            for group in self.optimiser.param_groups:
                group["lr"] = self.learning_rate(self.step)
            self.optimiser.zero_grad(set_to_none=True)
            loss = self.loss(self.text.batch(self.step))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimiser.step()
            losses.append(float(loss.detach()))
            self.step += 1
        return losses

    def state(self) -> dict[str, Any]:
        """A checkpoint in Lightning's layout; its tensors are the training's own."""
        return {
            "state_dict": self.model.state_dict(),
            "optimizer_states": [self.optimiser.state_dict()],
            "global_step": self.step,
        }

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continues from a checkpoint; nothing of it is shared afterwards."""
        self.model.load_state_dict(checkpoint["state_dict"])
        self.optimiser.load_state_dict(copy.deepcopy(checkpoint["optimizer_states"][0]))
        self.step = checkpoint["global_step"]

    @torch.no_grad()
    def largest_update(self) -> float:
        """Largest |update| over the learning rate of the update done last, weight decay not counted."""
        largest = 0.0
        for group in self.optimiser.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.optimiser.state[parameter]
                done = float(state["step"])
                root = (state["exp_avg_sq"] / (1 - beta2**done)).sqrt_().add_(group["eps"])
                update = (state["exp_avg"] / (1 - beta1**done)).div_(root)
                largest = max(largest, float(update.abs().max()))
        return largest

    @torch.no_grad()
    def held_out_loss(self, batches: list[Tensor]) -> float:
        """Mean loss on given batches, nats per token."""
        self.model.eval()
        total = sum(float(self.loss(batch)) for batch in batches) / len(batches)
        self.model.train()
        return total


def make_saves(settings: RunSettings, folder: Path, report: Report = print) -> list[Path]:
    """The saves of a run as plain torch files, trained where they are missing; a broken-off run goes on.

    Args:
        settings: the run.
        folder: one folder per run; other settings need another.
        report: told about progress, one line per save.
    """
    paths = [folder / f"save-{number:02}.pt" for number in range(settings.num_saves)]
    done = next((number for number, path in enumerate(paths) if not path.exists()), len(paths))
    if done == len(paths):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    training = Training(settings, Text(settings))
    if done:
        training.load(torch.load(paths[done - 1], weights_only=True))
    for number in range(done, len(paths)):
        losses = training.train(settings.step_of(number))
        partial = paths[number].with_suffix(".partial")
        torch.save(training.state() | {"train_loss": sum(losses) / len(losses)}, partial)
        os.replace(partial, paths[number])
        report(f"save {number + 1} of {len(paths)} at step {training.step}: loss {sum(losses) / len(losses):.3f}")
    return paths
