"""Lookup experts added to a pretrained model against plain fine-tuning of it, on the same text.

Every variant may spend the same number of multiply-adds, counted on its own first batch by torch's counter, so that a
variant whose steps are cheaper takes more of them. The rival at equal trained parameters trains the feed-forwards of
the very layers that get experts: the experts' width is chosen so that they have as many weights as these. Low-rank
updates would be a rival of another size, a choice of other layers one of another place.

Each variant's learning rate is the best of its own three, by the validation text, after a pilot with a share of the
budget; what is reported is the loss on the test text.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ...lightning_modules.mole.adapter import AdapterConfig, add_lookup_experts
from ..kept_runs import KeptRuns
from ..text_scores import held_out
from . import quality

SEEDS = (0, 1, 2)
MODEL = "asset:smollm2-135m"
FEED_FORWARD_NAMES = ("mlp", "feed_forward")


@dataclass(frozen=True)
class Study:
    """Settings that all runs share.

    Attributes:
        multiply_adds: of forward and backward passes that a training may spend.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        num_layers: layers, the last ones, that get experts or whose feed-forwards are trained.
        num_experts: N per layer.
        num_keys: rows of the table that is keyed by n-grams.
        test_batches: held-out batches behind the reported loss.
        val_batches: held-out batches by which the learning rate is chosen.
        pilot_share: part of the budget that a pilot gets, 0 to 1.
        num_rates: learning rates of a variant that are tried.
        quantisations: of the tables that are exported after the runs with the first seed.
    """

    multiply_adds: float = 6e12
    batch_size: int = 3
    sequence_length: int = 256
    num_layers: int = 10
    num_experts: int = 4
    num_keys: int = 16384
    test_batches: int = 10
    val_batches: int = 4
    pilot_share: float = 0.25
    num_rates: int = 3
    quantisations: tuple[str, ...] = ("none", "nf4")


QUICK = Study(
    multiply_adds=1e10,
    batch_size=1,
    sequence_length=64,
    num_layers=1,
    test_batches=1,
    val_batches=1,
    num_rates=1,
    quantisations=("none",),
)


def chosen_layers(model: Any, study: Study) -> tuple[int, ...]:
    """The last layers of the model."""
    count = len(model.model.layers)
    return tuple(range(max(0, count - study.num_layers), count))


def _feed_forward(layer: nn.Module) -> nn.Module:
    return next(getattr(layer, name) for name in FEED_FORWARD_NAMES if hasattr(layer, name))


def feed_forward_parameters(model: Any, study: Study) -> list[nn.Parameter]:
    """Weights of the chosen layers' feed-forwards."""
    layers = model.model.layers
    return [p for index in chosen_layers(model, study) for p in _feed_forward(layers[index]).parameters()]


def _train_all(model: Any, study: Study) -> None:
    model.requires_grad_(True)


def _train_feed_forwards(model: Any, study: Study) -> None:
    model.requires_grad_(False)
    for parameter in feed_forward_parameters(model, study):
        parameter.requires_grad_(True)


def adapter_config(model: Any, study: Study, kind: str) -> AdapterConfig:
    """An adapter with about as many weights as the chosen layers' feed-forwards.

    Args:
        model: the plain model.
        study: layers, experts and keys.
        kind: `token`, `bigram`, or `table` for rows that are learned directly. That has one row per layer and token and
            as many of the layers as the number of weights allows: with experts behind them, rows would be far more.

    Raises:
        ValueError: the feed-forwards have fewer weights than the embedding of the n-grams' keys.
    """
    budget = sum(p.numel() for p in feed_forward_parameters(model, study))
    layers, d = chosen_layers(model, study), model.config.hidden_size
    if kind == "table":
        per_layer = len(model.get_input_embeddings().weight) * d
        count = min(len(layers), max(1, round(budget / per_layer)))
        return AdapterConfig(num_experts=1, layers=layers[:count], values="table")
    keys = study.num_keys * d if kind == "bigram" else 0
    width = (budget - keys) // (2 * study.num_experts * d * len(layers))
    if width < 1:
        raise ValueError(
            f"num_keys {study.num_keys} of width {d} take {keys} weights, the feed-forwards of {len(layers)} layers "
            f"have {budget}; lower num_keys"
        )
    config = AdapterConfig(num_experts=study.num_experts, intermediate_size=width, layers=layers)
    return replace(config, key="ngram_hash", num_keys=study.num_keys, ngram_order=2) if keys else config


def _add(kind: str) -> Callable[[Any, Study], None]:
    def prepare(model: Any, study: Study) -> None:
        add_lookup_experts(model, adapter_config(model, study, kind))

    return prepare


@dataclass(frozen=True)
class Variant:
    """One way to adapt the model.

    Attributes:
        prepare: changes the model in place and marks what is trained.
        rates: learning rates to choose from; none for a model that is not trained.
        has_table: whether a table can be exported.
    """

    prepare: Callable[[Any, Study], None]
    rates: tuple[float, ...]
    has_table: bool = False


# the first is what the others are compared with
VARIANTS: dict[str, Variant] = {
    "frozen": Variant(lambda model, study: model.requires_grad_(False), ()),
    "full": Variant(_train_all, (1e-4, 3e-5, 3e-4)),
    "feed-forward": Variant(_train_feed_forwards, (3e-4, 1e-4, 1e-3)),
    "token-4e": Variant(_add("token"), (1e-3, 3e-4, 3e-3), has_table=True),
    "bigram-4e": Variant(_add("bigram"), (1e-3, 3e-4, 3e-3), has_table=True),
    "token-table": Variant(_add("table"), (1e-2, 3e-3, 3e-2), has_table=True),
}


def pilots(variant: str, study: Study) -> dict[str, float]:
    """Names of the pilots of a variant, and the learning rate of each."""
    return {f"{variant}@{rate:g}": rate for rate in VARIANTS[variant].rates[: study.num_rates]}


def runs(study: Study, folder: Path) -> KeptRuns:
    """The study's runs, pilots among them, kept in `folder`."""
    return KeptRuns(folder, study, partial(result_of, study=study, folder=folder))


def run_one(variant: str, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """The result of a run: what lies in the folder, or of training it now, and the pilots that it needs.

    Raises:
        ValueError: an unknown variant, or a loss that is no number.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    return runs(study, folder).get(variant, seed)


def best_rate(variant: str, study: Study, folder: Path) -> float:
    """The learning rate whose pilot had the lowest validation loss; pilots that are missing are run."""
    tried = pilots(variant, study)
    if len(tried) == 1:
        return next(iter(tried.values()))
    results = runs(study, folder).all(tried, SEEDS[:1])
    return tried[min(tried, key=lambda name: results[name][0]["val_loss"])]


def result_of(name: str, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """Train a variant, or a pilot of one, and measure it.

    Raises:
        ValueError: a loss that is no number.
    """
    variant, _, rate = name.partition("@")
    chosen, is_pilot = VARIANTS[variant], bool(rate)
    # before the model is there: pilots load their own
    learning_rate = float(rate) if is_pilot else best_rate(variant, study, folder) if chosen.rates else 0.0
    data = _open_data(study, seed)
    torch.manual_seed(seed)
    model = load_base()
    chosen.prepare(model, study)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    budget = study.multiply_adds * (study.pilot_share if is_pilot else 1)
    per_step = step_multiply_adds(model, next(iter(data.train_dataloader()))) if trained else 0
    steps = max(1, round(budget / per_step)) if trained else 0
    begin = time.perf_counter()
    if trained:
        quality.train(model.train(), data.train_dataloader(), quality.Study(steps=steps, learning_rate=learning_rate))
    result: dict[str, Any] = {
        "trained_parameters": trained,
        "learning_rate": learning_rate,
        "steps": steps,
        "tokens": steps * study.batch_size * study.sequence_length,
        "multiply_adds": steps * per_step,
        "train_seconds": round(time.perf_counter() - begin, 1),
    }
    model.eval()
    if is_pilot:
        return result | {"val_loss": held_out(model, data.val_dataloader(), study.val_batches)["loss"]}
    result |= held_out(model, data.test_dataloader(), study.test_batches)
    if chosen.has_table and seed == SEEDS[0]:
        result["tables"] = _table_losses(model, data, study, folder)
    return result


def load_base() -> Any:
    """The pretrained model, in float32.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
    """
    from transformers import AutoModelForCausalLM

    from ...datamodules.assets import resolve

    return AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32)


def _open_data(study: Study, seed: int) -> Any:
    from ...datamodules import TextDataModule

    data = TextDataModule(
        tokenizer=MODEL, sequence_length=study.sequence_length, batch_size=study.batch_size, seed=seed
    )
    data.prepare_data()
    data.setup("fit")
    return data


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# the counter knows the GPU's attention only; like it, these count the masked half too
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def step_multiply_adds(model: Any, batch: dict[str, torch.Tensor]) -> int:
    """Multiply-adds of matrix products and attention in one forward and backward pass; element-wise work is left out.

    Gradients that nobody needs are not computed, and so not counted.
    """
    with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
        model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
    model.zero_grad()
    return counter.get_total_flops() // 2


def _table_losses(model: Any, data: Any, study: Study, folder: Path) -> dict[str, dict[str, float]]:
    """By quantisation: loss with the exported table, and what the export took."""
    from ...lightning_modules.mole.adapter_files import export_adapted, load_adapted
    from ...lightning_modules.mole.convert import TableError

    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for quantisation in study.quantisations:
        place, error = Path(tempfile.mkdtemp(prefix="table-", dir=folder)), TableError()
        try:
            begin = time.perf_counter()
            options: Any = {"quantisation": quantisation, "error": error}
            export_adapted(model, place / "model", **options)
            seconds = time.perf_counter() - begin
            lookup = load_adapted(place / "model", dtype=torch.float32)
            table = lookup.lookup_adapter.table
            found[quantisation] = held_out(lookup, data.test_dataloader(), study.test_batches) | {
                "export_seconds": round(seconds, 1),
                "table_bytes": table.shape[0] * table.row_bytes,
                "relative_rms_error": error.relative_rms,
            }
            table.close()
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return found
