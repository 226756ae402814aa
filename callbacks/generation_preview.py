"""What the model writes so far: short continuations of fixed prompts after each validation."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override


class GenerationPreview(Callback):
    """Continues a few prompts after each validation and logs the text.

    Needs a module with a transformers model as `.model` and a data module with a `.tokenizer`. The text goes into a
    table where a W&B logger is on, into `generations.jsonl` beside the metrics of a CSV logger, and onto the console.
    Generation draws no random numbers from the training's generators, so it does not change the run.

    Args:
        prompts: texts to continue, one after the other.
        max_new_tokens: longest continuation, in tokens.
        temperature: 0 takes the most likely token; larger values sample.
        seed: seed of the sampling, the same at every preview.
        every_n_validations: validations between previews.
    """

    def __init__(
        self,
        prompts: Sequence[str] = ("The ",),
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        every_n_validations: int = 1,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(prompts):
            raise ValueError(f"prompts is {prompts!r}; give a list of one or more non-empty texts")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 token has to be written")
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; use 0 for the most likely token, or more to sample")
        if every_n_validations < 1:
            raise ValueError(f"every_n_validations is {every_n_validations}; use 1 or more")
        self.prompts = list(prompts)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed
        self.every_n_validations = every_n_validations
        self._validations = 0
        self._rows: list[list[Any]] = []  # a W&B table is written whole each time

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not hasattr(getattr(pl_module, "model", None), "generate"):
            raise ValueError(
                f"GenerationPreview needs a module whose `.model` can generate; {type(pl_module).__name__} has none,"
                " so leave the callback out"
            )
        # Lightning sets the data module up before its callbacks
        if getattr(getattr(trainer, "datamodule", None), "tokenizer", None) is None:
            raise ValueError("GenerationPreview needs a data module with a `.tokenizer`; leave the callback out")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        # every process takes part, as a sharded model can only generate together
        texts = self.generate(pl_module, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            self._log(trainer, texts)

    @torch.no_grad()
    def generate(self, pl_module: pl.LightningModule, tokenizer: Any) -> list[str]:
        """Continues the prompts.

        Args:
            pl_module: module with a transformers model as `.model`.
            tokenizer: a transformers tokenizer that fits the model.

        Returns:
            The continuations without their prompts, in the order of the prompts.
        """
        model: Any = pl_module.model
        training = model.training
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        sampling = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        texts = []
        model.eval()
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(self.seed)
                for prompt in self.prompts:
                    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(pl_module.device)  # (1, T)
                    out = model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=self.max_new_tokens,
                        pad_token_id=tokenizer.pad_token_id,
                        eos_token_id=tokenizer.eos_token_id,
                        **sampling,
                    )
                    texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        finally:
            model.train(training)
        return texts

    def _log(self, trainer: pl.Trainer, texts: list[str]) -> None:
        step = trainer.global_step
        new: list[tuple[int, str, str]] = [(step, *pair) for pair in zip(self.prompts, texts, strict=True)]
        self._rows += [list(row) for row in new]
        for _, prompt, text in new:
            # escaped, so that a text with line breaks stays one line of the log
            rank_zero_info(f"preview step {step}: {json.dumps(prompt + text, ensure_ascii=False)}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("val/generations", columns=["step", "prompt", "text"], data=self._rows, step=step)
            elif isinstance(logger, CSVLogger):
                _append_jsonl(Path(logger.log_dir) / "generations.jsonl", new)


def _append_jsonl(path: Path, rows: list[tuple[int, str, str]]) -> None:
    os.makedirs(path.parent, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for step, prompt, text in rows:
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
