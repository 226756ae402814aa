"""Lightning wiring of MemoryFormer: its tables' own learning rate and weight decay, and a check of memory."""

from typing import Any, Literal, get_args

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.tensor import DTensor

from ..decoder import DecoderForCausalLM
from ..language_model import CausalLMModule, num_parameters
from .keyed import KeyedMemory
from .layer import MemoryLayer
from .row_optimizer import STATE_VALUES, RowRule, RowWiseOptimizer, clip_gradients
from .sharding import parallelise
from .sizes import TRAINING_BYTES, check_memory

TableOptimizer = Literal["adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad"]
SHARDED = ("FSDP", "ModelParallel", "DeepSpeed")


class MemoryFormerLightning(CausalLMModule):
    """`CausalLMModule` for models with memory layers or keyed tables.

    Under `ModelParallelStrategy` the tables' columns are sharded over `tensor_parallel`, and everything over
    `data_parallel` by FSDP2.

    Args:
        model: a MemoryFormer preset or the fields of a `DecoderConfig`, see `CausalLMModule`.
        recipe: `tables` gives the tables alone `table_learning_rate_multiplier` and `table_weight_decay`; `released`
            multiplies every learning rate, as the paper (three times Pythia's) does, and decays tables like all
            matrices, as the released configuration does.
        table_learning_rate_multiplier: learning rate of the tables as a multiple of `learning_rate`.
        table_weight_decay: of the tables; decay pulls rows that are rarely hit to zero. `weight_decay` under
            `released`.
        table_optimizer: `adamw`, or one that steps only the rows that a batch has used, see `RowWiseOptimizer`. On a
            single device gradients of tables are sparse then.
        check_memory: refuse before building what does not fit.
        **options: as for `CausalLMModule`.

    Raises:
        ValueError: an unknown recipe or optimiser, or a negative number; weights, gradients and optimiser do not fit
            into memory; a row-wise optimiser under a strategy that shards.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "memoryformer-tiny",
        *,
        recipe: Literal["tables", "released"] = "tables",
        table_learning_rate_multiplier: float = 3.0,
        table_weight_decay: float = 0.0,
        table_optimizer: TableOptimizer = "adamw",
        check_memory: bool = True,
        **options: Any,
    ) -> None:
        if recipe not in ("tables", "released"):
            raise ValueError(f"unknown recipe {recipe!r}; there are tables, released")
        if table_optimizer not in get_args(TableOptimizer):
            raise ValueError(f"unknown table_optimizer {table_optimizer!r}; there are adamw, {', '.join(STATE_VALUES)}")
        if not table_learning_rate_multiplier > 0 or not table_weight_decay >= 0:
            raise ValueError(
                f"table_learning_rate_multiplier {table_learning_rate_multiplier} must be above 0 and "
                f"table_weight_decay {table_weight_decay} at least 0"
            )
        super().__init__(model, **options)

    def configure_model(self) -> None:
        """Build the network once, if memory holds its training."""
        hparams: Any = self.hparams
        strategy = self._trainer.strategy if self._trainer is not None else None
        sharded = any(name in type(strategy).__name__ for name in SHARDED)
        if sharded and hparams.table_optimizer != "adamw":
            raise ValueError(
                f"table_optimizer {hparams.table_optimizer!r} steps rows of whole tables, {type(strategy).__name__} "
                f"shards them; use table_optimizer: adamw, or the strategy ddp"
            )
        if self.model is None and hparams.check_memory and not hparams.pretrained:
            self._check_memory(self._trainer.world_size if sharded and self._trainer is not None else 1)
        built = self.model is None
        super().configure_model()
        if built and isinstance(strategy, ModelParallelStrategy):
            parallelise(self.model, modules_with_tables(self.model), strategy.device_mesh)
        # other strategies reduce gradients over processes in buckets that are dense
        single = strategy is None or isinstance(strategy, SingleDeviceStrategy)
        for module in modules_with_tables(self):
            module.sparse_grad = hparams.table_optimizer != "adamw" and single

    def _check_memory(self, shares: int) -> None:
        with torch.device("meta"):
            model = DecoderForCausalLM(self.decoder_config())
        rule: RowRule | Literal["adamw"] = self.hparams["table_optimizer"]
        num_values = num_parameters([model])
        tables = sum(table.numel() for table in tables_of(model)) if rule != "adamw" else 0
        device = self._trainer.strategy.root_device if self._trainer is not None else "cpu"
        what = f"training {num_values:,} parameters with Adam in float32 ({TRAINING_BYTES} bytes each)"
        if rule == "adamw":
            return check_memory(TRAINING_BYTES * num_values // shares, what, device)
        # at worst a batch reaches every row
        bytes_each = 4 * (2 + STATE_VALUES[rule])
        what += f", {tables:,} of them with {rule} ({bytes_each} bytes each)"
        return check_memory(TRAINING_BYTES * (num_values - tables) + bytes_each * tables, what, device)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The usual groups without the tables, then the tables."""
        hparams: Any = self.hparams
        tables = {id(table) for table in tables_of(self)}
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

    def configure_optimizers(self) -> Any:
        """AdamW, or with `table_optimizer` a row-wise one for the tables, under the same schedule."""
        configured, hparams = super().configure_optimizers(), self.hparams
        if hparams["table_optimizer"] == "adamw":
            return configured
        *others, tables = self.optimizer_groups()
        adamw, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        optimizer = RowWiseOptimizer(
            [group for group in (*others, tables | {"row_rule": hparams["table_optimizer"]}) if group["params"]],
            lr=hparams["learning_rate"],
            betas=adamw.defaults["betas"],
            eps=adamw.defaults["eps"],
            fused=adamw.defaults["fused"],
        )
        configured["optimizer"] = optimizer
        configured["lr_scheduler"]["scheduler"] = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_lambdas)
        return configured

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, whose own way stops at sparse gradients and at parameters of several meshes."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not any(p.grad.is_sparse or isinstance(p.grad, DTensor) for p in parameters):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_gradients(parameters, gradient_clip_val, "value" if gradient_clip_algorithm == "value" else "norm")


def modules_with_tables(module: torch.nn.Module) -> list[MemoryLayer | KeyedMemory]:
    """Modules whose tables are trained."""
    parts = (part for part in module.modules() if isinstance(part, MemoryLayer | KeyedMemory))
    return [part for part in parts if part.table is not None]


def tables_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Tables that are trained, shared ones once."""
    return list({part.table: None for part in modules_with_tables(module)})  # type: ignore[misc]
