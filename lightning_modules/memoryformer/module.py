"""Lightning wiring of MemoryFormer: its tables' own learning rate and weight decay, and a check of memory."""

from typing import Any, Literal

import torch

from ..decoder import DecoderForCausalLM
from ..language_model import CausalLMModule, num_parameters
from .keyed import KeyedMemory
from .layer import MemoryLayer
from .sizes import TRAINING_BYTES, check_memory


class MemoryFormerLightning(CausalLMModule):
    """`CausalLMModule` for models with memory layers or keyed tables.

    Args:
        model: a MemoryFormer preset or the fields of a `DecoderConfig`, see `CausalLMModule`.
        recipe: `tables` gives the tables alone `table_learning_rate_multiplier` and `table_weight_decay`; `released`
            multiplies every learning rate, as the paper (three times Pythia's) does, and decays tables like all
            matrices, as the released configuration does.
        table_learning_rate_multiplier: learning rate of the tables as a multiple of `learning_rate`.
        table_weight_decay: of the tables; decay pulls rows that are rarely hit to zero. `weight_decay` under
            `released`.
        check_memory: refuse before building what does not fit.
        **options: as for `CausalLMModule`.

    Raises:
        ValueError: an unknown recipe or a negative number; weights, gradients and optimiser do not fit into memory.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "memoryformer-tiny",
        *,
        recipe: Literal["tables", "released"] = "tables",
        table_learning_rate_multiplier: float = 3.0,
        table_weight_decay: float = 0.0,
        check_memory: bool = True,
        **options: Any,
    ) -> None:
        if recipe not in ("tables", "released"):
            raise ValueError(f"unknown recipe {recipe!r}; there are tables, released")
        if not table_learning_rate_multiplier > 0 or not table_weight_decay >= 0:
            raise ValueError(
                f"table_learning_rate_multiplier {table_learning_rate_multiplier} must be above 0 and "
                f"table_weight_decay {table_weight_decay} at least 0"
            )
        super().__init__(model, **options)

    def configure_model(self) -> None:
        """Build the network once, if memory holds its training."""
        if self.model is None and self.hparams["check_memory"] and not self.hparams["pretrained"]:
            with torch.device("meta"):
                num_values = num_parameters([DecoderForCausalLM(self.decoder_config())])
            trainer = self._trainer
            strategy = type(trainer.strategy).__name__ if trainer is not None else ""
            sharded = any(name in strategy for name in ("FSDP", "ModelParallel", "DeepSpeed"))
            shares = trainer.world_size if trainer is not None and sharded else 1
            device = trainer.strategy.root_device if trainer is not None else "cpu"
            what = f"training {num_values:,} parameters with Adam in float32 ({TRAINING_BYTES} bytes each)"
            check_memory(TRAINING_BYTES * num_values // shares, what, device)
        super().configure_model()

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The usual groups without the tables, then the tables."""
        hparams: Any = self.hparams
        tables = {
            id(module.table)
            for module in self.modules()
            if isinstance(module, MemoryLayer | KeyedMemory) and module.table is not None
        }
        released = hparams.recipe == "released"
        groups = super().optimizer_groups()
        own = [p for group in groups for p in group["params"] if id(p) in tables]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in tables]
            if released:
                group["lr"] = hparams.learning_rate * hparams.table_learning_rate_multiplier
        return [
            *groups,
            {
                "params": own,
                "lr": hparams.learning_rate * hparams.table_learning_rate_multiplier,
                "weight_decay": hparams.weight_decay if released else hparams.table_weight_decay,
            },
        ]
