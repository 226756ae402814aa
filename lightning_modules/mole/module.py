"""Lightning wiring of MoLE: the recipes in which paper and released code differ, and how often ids repeat."""

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ..decoder import DecoderConfig
from ..language_model import CausalLMModule
from .memory_plan import training_plan
from .presets import RECIPES


class MoLELightning(CausalLMModule):
    """`CausalLMModule` for MoLE; the loss is cross-entropy alone (section 4.3 of arXiv 2503.15798).

    Also logs `train/tokens_per_distinct_id`: tokens of the micro-batch over distinct ids, the factor that evaluating
    experts once per id saves.

    Args:
        model: a MoLE preset or the fields of a `DecoderConfig`, see `CausalLMModule`.
        recipe: `code` for the released training command (weight decay 0.1, all of each head rotated), `paper` for the
            appendix (0.01, a quarter). An explicit `weight_decay` or `rope_parameters` wins.
        weight_decay: the recipe's by default.
        **options: as for `CausalLMModule`.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "mole-160m-4e",
        *,
        recipe: Literal["code", "paper"] = "code",
        weight_decay: float | None = None,
        **options: Any,
    ) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
        chosen = RECIPES[recipe]["weight_decay"] if weight_decay is None else weight_decay
        super().__init__(model, weight_decay=chosen, **options)
        self.hparams["weight_decay"] = chosen

    def decoder_config(self) -> DecoderConfig:
        """The configuration with the recipe's rotary fraction."""
        model: str | dict[str, Any] = self.hparams["model"]
        fields: dict[str, Any] = {"preset": model} if isinstance(model, str) else dict(model)
        rope = {"partial_rotary_factor": RECIPES[self.hparams["recipe"]]["partial_rotary_factor"]}
        fields["rope_parameters"] = rope | (fields.get("rope_parameters") or {})
        self.hparams["model"] = fields
        config = super().decoder_config()
        if config.feed_forward != "mole":
            raise ValueError(f"MoLELightning needs feed_forward 'mole', {model!r} has {config.feed_forward!r}")
        return config

    def on_fit_start(self) -> None:
        """Say what the preset takes before training starts."""
        data = getattr(self.trainer, "datamodule", None)
        tokens = (getattr(data, "batch_size", None) or 0) * (getattr(data, "sequence_length", None) or 0)
        plan = training_plan(self.model, tokens_per_micro_batch=tokens)
        rank_zero_info(plan.describe(self.trainer.world_size))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, and how often its ids repeat."""
        ids = batch["input_ids"]
        self.log("train/tokens_per_distinct_id", ids.numel() / len(torch.unique(ids)), on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)
