"""Next-token training of any causal language model: loss, bits per byte, optimiser and schedule. Wiring only."""

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import SumMetric
from transformers import AutoModelForCausalLM

from .decoder import DecoderConfig, DecoderForCausalLM, decoder_config
from .decoder.presets import check_fields
from .scheduled_adamw import scheduled_adamw

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def cosine_with_warmup(step: int, *, warmup_steps: int, total_steps: int, min_ratio: float) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to `min_ratio` at `total_steps`.

    >>> [round(cosine_with_warmup(s, warmup_steps=2, total_steps=6, min_ratio=0.1), 3) for s in (0, 1, 2, 4, 6, 9)]
    [0.5, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class CausalLMModule(LightningModule):
    """Trains a causal language model on packed sequences.

    A batch holds `input_ids` and `labels` (B, T) with -100 where nothing is predicted, and, for bits per byte,
    `num_bytes` (B,): UTF-8 bytes of the predicted tokens. Logged: `train/loss` (next-token loss in nats, without
    auxiliary losses), `train/<auxiliary loss>`, `train/learning_rate`; `val/loss`, `val/perplexity`,
    `val/bits_per_byte`, and the same under `test/`.

    Args:
        model: name of a preset (`dense-160m`, `mole-160m-4e`, ...), or the fields of a `DecoderConfig`; a key `preset`
            among them names the preset that the other fields change.
        pretrained: a model folder to start from, in place of `model`.
        vocab_size: rows of the embedding; by default the preset's, or the tokenizer's where the data module has one
            and `model` does not say.
        pad_vocab_to_multiple_of: round the tokenizer's size up to a multiple.
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay on matrices; vectors (norms, biases) have none.
        betas: Adam's betas.
        eps: Adam's epsilon.
        warmup_ratio: share of all steps (0 to 1) over which the learning rate rises.
        min_learning_rate_ratio: last learning rate as a share of the peak (0 to 1).
        total_steps: length of the schedule in optimiser steps; the trainer's own estimate by default.
        gradient_checkpointing: recompute activations in the backward pass.
        compile: compile the network in place.

    Raises:
        ValueError: an unknown preset or field; a vocabulary smaller than the tokenizer's.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "dense-160m",
        *,
        pretrained: str | None = None,
        vocab_size: int | None = None,
        pad_vocab_to_multiple_of: int = 1,
        learning_rate: float = 6e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        warmup_ratio: float = 0.01,
        min_learning_rate_ratio: float = 0.1,
        total_steps: int | None = None,
        gradient_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # built in configure_model, when strategy and data are known
        self.model: Any = None
        for split in ("val", "test"):
            for quantity in ("nats", "tokens", "bytes"):
                # double precision: sums over a large set would lose the digits that are reported
                setattr(self, f"{split}_{quantity}", SumMetric().set_dtype(torch.float64))

    def decoder_config(self) -> DecoderConfig:
        """The decoder's configuration from the arguments and, for the vocabulary, the data module's tokenizer."""
        hparams: Any = self.hparams
        fields = {"preset": hparams.model} if isinstance(hparams.model, str) else dict(hparams.model)
        datamodule = getattr(self._trainer, "datamodule", None)
        needed = getattr(datamodule, "vocab_size", None)
        if hparams.vocab_size is not None:
            fields["vocab_size"] = hparams.vocab_size
        elif needed is not None and "vocab_size" not in fields:
            multiple = hparams.pad_vocab_to_multiple_of
            fields["vocab_size"] = -(-needed // multiple) * multiple
        tokenizer = getattr(datamodule, "tokenizer", None)
        for name in SPECIAL_IDS:
            if tokenizer is not None and name not in fields:
                fields[name] = getattr(tokenizer, name)
        preset = fields.pop("preset", None)
        check_fields(fields)
        config = decoder_config(preset, **fields) if preset else DecoderConfig(**fields)
        self._check_vocabulary(config.vocab_size, needed)
        return config

    @staticmethod
    def _check_vocabulary(rows: int, needed: int | None) -> None:
        if needed is not None and rows < needed:
            raise ValueError(
                f"the model's vocabulary has {rows} rows, the tokenizer has {needed} entries; "
                f"raise vocab_size or use the model's own tokenizer"
            )

    def configure_model(self) -> None:
        """Build the network, or load the pretrained one, once."""
        if self.model is not None:
            return
        hparams: Any = self.hparams
        if hparams.pretrained:
            model: Any = AutoModelForCausalLM.from_pretrained(hparams.pretrained, dtype=torch.float32)
            needed = getattr(getattr(self._trainer, "datamodule", None), "vocab_size", None)
            self._check_vocabulary(model.get_input_embeddings().weight.shape[0], needed)
            model.train()
        else:
            config = self.decoder_config()
            # a checkpoint then says the size without the data
            hparams.vocab_size = config.vocab_size
            model = DecoderForCausalLM(config)
        if hparams.gradient_checkpointing:
            # newer releases of transformers deprecate the other name, older ones have only that
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        if hparams.compile:
            # compiling the LightningModule itself breaks self.log; in place keeps the state dict's keys
            model.compile()
        self.model = model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what `tenfold export` needs: the network's whole configuration, and where the tokenizer is."""
        checkpoint["model_config"] = json.loads(self.model.config.to_json_string(use_diff=False))
        folder = getattr(getattr(self._trainer, "datamodule", None), "tokenizer_folder", None)
        checkpoint["tokenizer_folder"] = None if folder is None else str(folder)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the special ids that training had from its tokenizer, where nothing else says them."""
        stored = checkpoint.get("model_config", {})
        for name in SPECIAL_IDS:
            for config in (self.model.config, self.model.generation_config):
                if getattr(config, name, None) is None and stored.get(name) is not None:
                    setattr(config, name, stored[name])

    def forward(self, **inputs: Tensor) -> Any:
        """The network's output for transformers' keyword arguments."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        output = self(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False)
        auxiliary = getattr(output, "auxiliary_losses", None) or {}
        next_token = output.loss.detach() - sum(value.detach() for value in auxiliary.values())
        self.log("train/loss", next_token, prog_bar=True, on_step=True, on_epoch=False)
        for name, value in auxiliary.items():
            self.log(f"train/{name}", value.detach(), on_step=True, on_epoch=False)
        learning_rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log("train/learning_rate", learning_rate, on_step=True, on_epoch=False)
        return output.loss

    def _evaluation_step(self, split: str, batch: dict[str, Tensor]) -> None:
        logits = self(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
        if not torch.isfinite(nats):
            raise ValueError(f"the {split} loss is {nats.item()}: the training diverged; lower the learning rate")
        getattr(self, f"{split}_nats").update(nats.double())
        getattr(self, f"{split}_tokens").update((labels != -100).sum().double())
        if "num_bytes" in batch:
            getattr(self, f"{split}_bytes").update(batch["num_bytes"].sum().double())

    def _evaluation_end(self, split: str) -> None:
        nats, tokens, num_bytes = (getattr(self, f"{split}_{name}").compute() for name in ("nats", "tokens", "bytes"))
        loss = nats / tokens
        self.log(f"{split}/loss", loss.float(), prog_bar=True)
        self.log(f"{split}/perplexity", loss.exp().float())
        if num_bytes > 0:
            self.log(f"{split}/bits_per_byte", (nats / math.log(2) / num_bytes).float(), prog_bar=True)
        for name in ("nats", "tokens", "bytes"):
            getattr(self, f"{split}_{name}").reset()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._evaluation_step("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add one batch to the sums."""
        self._evaluation_step("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte over the whole set and all processes."""
        self._evaluation_end("val")

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and bits per byte over the whole set and all processes."""
        self._evaluation_end("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Next-token log-probabilities of the labels: (B, T - 1), 0 where nothing is predicted."""
        logits = self(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].float()
        labels = batch["labels"][:, 1:]
        return -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none").view_as(
            labels
        )

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameters with and without weight decay. A method that treats its tables differently overrides this."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def configure_optimizers(self) -> Any:
        """AdamW with a warm-up and a cosine, stepped once per optimiser step."""
        hparams: Any = self.hparams
        groups = [group for group in self.optimizer_groups() if group["params"]]
        return scheduled_adamw(
            self,
            groups,
            lambda step, warmup, total: cosine_with_warmup(
                step, warmup_steps=warmup, total_steps=total, min_ratio=hparams.min_learning_rate_ratio
            ),
        )


def num_parameters(modules: Iterable[nn.Module]) -> int:
    """Parameters of several modules, shared ones once."""
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})
