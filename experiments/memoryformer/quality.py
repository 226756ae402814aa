"""Small-scale science: what the paper's ablations and its missing baselines give on the same tokens, several seeds.

Runs are kept by `experiments/kept_runs.py`: a study that was stopped goes on where it was, and several processes may
work on one.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..kept_runs import KeptRuns, settings_digest

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Study:
    """Settings that all runs share.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        learning_rate: peak, of everything but tables.
        vocabulary: entries of the BPE tokenizer that is trained on the text.
        val_batches: held-out batches behind the loss.
        hidden_size: width of the compared decoders.
        num_layers: their layers.
    """

    steps: int = 150
    batch_size: int = 8
    sequence_length: int = 256
    learning_rate: float = 3e-3
    vocabulary: int = 2048
    val_batches: int = 16
    hidden_size: int = 64
    num_layers: int = 4

    @property
    def digest(self) -> str:
        """Names the settings."""
        return settings_digest(self)


QUICK = Study(steps=3, batch_size=2, sequence_length=32, vocabulary=300, val_batches=1, hidden_size=32, num_layers=1)


def memory_fields(
    num_bits: int = 8, extra_bits: int = 2, norm: str = "layernorm", weighting: str = "l1"
) -> dict[str, Any]:
    """Fields of a MemoryFormer of the study's size; weighted as in the released code unless told otherwise."""
    options = {"weighting": weighting}
    return {
        "preset": "memoryformer-tiny",
        "norm": norm,
        "projection_options": {"num_bits": num_bits, **options},
        "feed_forward_options": {"num_bits": num_bits, "extra_bits": extra_bits, **options},
    }


# fields of the model, and options of the LightningModule; the first is what the others are compared with
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"preset": "dense-tiny"}, {}),
    # its feed-forward is widened until all parameters are those of `tau-8`
    "dense-equal-bytes": ({"preset": "dense-tiny"}, {}),
    "tau-8": (memory_fields(), {}),
    "tau-4": (memory_fields(4), {}),
    "tau-10": (memory_fields(10), {}),
    **{f"extra-{extra}": (memory_fields(extra_bits=extra), {}) for extra in (0, 1, 3)},
    "rmsnorm": (memory_fields(norm="rmsnorm"), {}),
    "weighting-paper": (memory_fields(weighting="paper"), {}),
    **{f"rate-{rate}x": (memory_fields(), {"table_learning_rate_multiplier": float(rate)}) for rate in (1, 2, 4)},
    "released-recipe": (memory_fields(norm="rmsnorm"), {"recipe": "released"}),
}


def fields_of(variant: str, study: Study, vocab_size: int) -> dict[str, Any]:
    """Fields of a variant's model.

    Raises:
        ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    size = {
        "vocab_size": vocab_size,
        "hidden_size": study.hidden_size,
        "num_hidden_layers": study.num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": max(study.sequence_length, 64),
    }
    fields = VARIANTS[variant][0] | size
    if variant == "dense-equal-bytes":
        rival, own = (num_parameters(fields_of(name, study, vocab_size)) for name in ("tau-8", "dense"))
        # two matrices per layer
        more = (rival - own) // (2 * study.hidden_size * study.num_layers)
        fields = fields | {"intermediate_size": 4 * study.hidden_size + more}
    return fields


def num_parameters(fields: dict[str, Any]) -> int:
    """Parameters of the model with these fields."""
    from ...lightning_modules.decoder import DecoderForCausalLM, decoder_config

    with torch.device("meta"):
        model = DecoderForCausalLM(
            decoder_config(fields["preset"], **{k: v for k, v in fields.items() if k != "preset"})
        )
    return sum(p.numel() for p in model.parameters())


def runs(study: Study, folder: Path) -> KeptRuns:
    """The study's runs, kept in `folder`."""
    return KeptRuns(folder, study, partial(result_of, study=study))


def run_one(variant: str, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """The result of a run: what lies in the folder, or of training it now.

    Raises:
        ValueError: an unknown variant, or a training that diverged.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    return runs(study, folder).get(variant, seed)


def result_of(variant: str, seed: int, study: Study) -> dict[str, Any]:
    """Train a variant and measure it.

    Raises:
        ValueError: a training that diverged.
    """
    import lightning.pytorch as pl

    from ...callbacks import BucketUse
    from ...datamodules import TextDataModule
    from ...lightning_modules import CausalLMModule, MemoryFormerLightning

    pl.seed_everything(seed, verbose=False)
    data = TextDataModule(
        tokenizer=f"bpe:{study.vocabulary}",
        sequence_length=study.sequence_length,
        batch_size=study.batch_size,
        seed=seed,
    )
    data.prepare_data()
    data.setup("fit")
    fields, options = fields_of(variant, study, data.vocab_size), VARIANTS[variant][1]
    hashed = fields.get("projection_options") is not None
    kind: Any = MemoryFormerLightning if hashed else CausalLMModule
    module = kind(fields, learning_rate=study.learning_rate, warmup_ratio=0.1, **options)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=study.steps,
        gradient_clip_val=1.0,
        limit_val_batches=study.val_batches,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        val_check_interval=study.steps,
        callbacks=[BucketUse(max_batches=study.val_batches, picture=False)] if hashed else [],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    begin = time.perf_counter()
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("train/")}
    return {
        "parameters": sum(p.numel() for p in module.parameters()),
        "seconds": round(time.perf_counter() - begin, 1),
        "metrics": metrics,
    }
