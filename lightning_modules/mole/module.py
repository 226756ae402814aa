"""Lightning wiring of MoLE: the recipes in which paper and released code differ, and how often ids repeat."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ..decoder import DecoderConfig, DecoderForCausalLM
from ..language_model import CausalLMModule
from .divided_experts import Division, divide_experts
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
        expert_division: how experts are divided over the processes of `ModelParallelStrategy`'s tensor-parallel
            dimension, see `divide_experts`; each process takes batches of its own. Without effect elsewhere.
        **options: as for `CausalLMModule`.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "mole-160m-4e",
        *,
        recipe: Literal["code", "paper"] = "code",
        weight_decay: float | None = None,
        expert_division: Division = "experts",
        **options: Any,
    ) -> None:
        if recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
        if expert_division not in get_args(Division):
            raise ValueError(f"expert_division {expert_division!r} is neither 'experts' nor 'width'")
        chosen = RECIPES[recipe]["weight_decay"] if weight_decay is None else weight_decay
        super().__init__(model, weight_decay=chosen, **options)
        self.hparams["weight_decay"] = chosen
        # evaluation batches that other processes have and this one lacks
        self._missing_passes = 0

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

    def configure_model(self) -> None:
        """Say what the preset takes, then build the network; divide its experts under `ModelParallelStrategy`.

        Raises:
            ValueError: the experts do not divide by the number of processes.
        """
        if self.model is not None:
            return
        if self._trainer is not None and self._trainer.state.fn == "fit" and not self.hparams["pretrained"]:
            self._say_plan()
        mesh = self._device_mesh
        if mesh is None:
            super().configure_model()
            return
        with torch.random.fork_rng(enabled=True, devices=[]):
            # every process keeps its part of its own copy, so the copies have to be alike
            torch.manual_seed(self.trainer.strategy.broadcast(torch.initial_seed()))
            super().configure_model()
        divide_experts(self.model, mesh, division=self.hparams["expert_division"])

    def _say_plan(self) -> None:
        data = getattr(self.trainer, "datamodule", None)
        tokens = (getattr(data, "batch_size", None) or 0) * (getattr(data, "sequence_length", None) or 0)
        with torch.device("meta"):
            plan = training_plan(DecoderForCausalLM(self.decoder_config()), tokens_per_micro_batch=tokens)
        mesh = self._device_mesh
        group = None if mesh is None else mesh.size(mesh.ndim - 1)
        rank_zero_info(plan.describe(self.trainer.world_size, group_size=group))

    def _match_passes(self, counts: Any) -> None:
        """Note how many passes this process has to add: those of divided experts need all processes."""
        if self._device_mesh is not None:
            own = torch.tensor(float(sum(counts)), device=self.device)
            most = self.trainer.strategy.reduce(own.clone(), reduce_op="max")
            self._missing_passes = int(most - own)

    def on_validation_epoch_start(self) -> None:
        """Compare the number of batches with the other processes'."""
        sanity = self.trainer.sanity_checking
        self._match_passes(self.trainer.num_sanity_val_batches if sanity else self.trainer.num_val_batches)

    def on_test_epoch_start(self) -> None:
        """Compare the number of batches with the other processes'."""
        self._match_passes(self.trainer.num_test_batches)

    def _evaluation_end(self, split: str) -> None:
        for _ in range(self._missing_passes):
            self(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
        super()._evaluation_end(split)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Loss of one micro-batch, and how often its ids repeat."""
        ids = batch["input_ids"]
        self.log("train/tokens_per_distinct_id", ids.numel() / len(torch.unique(ids)), on_step=True, on_epoch=False)
        return super().training_step(batch, batch_idx)
