"""Small-scale science: an ordinary norm, batch norm, RepBN from the start and PRepBN at an equal budget, several seeds.

Pictures (emoji by category, MNIST digits) with a small DeiT, text with a small decoder, and SmolLM2-135M whose norms
are replaced. Everything is scored on test splits, by which nothing is chosen. Runs are kept by
`experiments/kept_runs.py`: a study that was stopped goes on where it was, and several processes may work on one.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..kept_runs import KeptRuns, settings_digest
from .controls import image_run, pretrained_run, text_run

SEEDS = (0, 1, 2)
# a pretrained model costs minutes: one seed
PRETRAINED_SEEDS = (0,)
FADING = "prepbn"


@dataclass(frozen=True)
class Study:
    """Settings that all runs share. Rates are sensible ones, the same for all norms of a data set, and not tuned.

    Attributes:
        image_steps: optimiser steps on pictures.
        image_batch_size: pictures per step.
        image_learning_rate: peak.
        image_width: channels of the DeiT.
        image_layers: its blocks.
        test_fraction: share of the pictures that is held out.
        text_steps: optimiser steps of the decoder.
        text_batch_size: sequences per step.
        sequence_length: tokens per sequence, also for the pretrained model.
        text_learning_rate: peak.
        vocabulary: entries of the BPE tokenizer that is trained on the text.
        text_width: channels of the decoder.
        text_layers: its layers.
        test_batches: held-out batches behind bits per byte.
        task_documents: first documents of each lm-eval task.
        decay_share: share of the steps over which PRepBN's lambda falls to 0.
        recalibration_passes: of `BatchNormRecalibration`; 10 is the paper's number.
        recalibration_batches: batches of such a pass, in place of the paper's whole training set.
        pretrained: model whose norms are replaced.
        pretrained_steps: its optimiser steps.
        pretrained_batch_size: sequences per step.
        pretrained_learning_rate: peak.
        pretrained_test_batches: held-out batches behind its bits per byte.
    """

    image_steps: int = 200
    image_batch_size: int = 64
    image_learning_rate: float = 2e-3
    image_width: int = 64
    image_layers: int = 3
    test_fraction: float = 0.2
    text_steps: int = 100
    text_batch_size: int = 8
    sequence_length: int = 256
    text_learning_rate: float = 3e-3
    vocabulary: int = 4096
    text_width: int = 128
    text_layers: int = 4
    test_batches: int = 16
    task_documents: int = 100
    decay_share: float = 0.8
    recalibration_passes: int = 10
    recalibration_batches: int = 4
    pretrained: str = "asset:smollm2-135m"
    pretrained_steps: int = 24
    pretrained_batch_size: int = 2
    pretrained_learning_rate: float = 6e-4
    pretrained_test_batches: int = 8

    @property
    def digest(self) -> str:
        """Names the settings."""
        return settings_digest(self)


QUICK = Study(
    image_steps=4,
    image_batch_size=8,
    image_width=16,
    image_layers=1,
    text_steps=5,
    text_batch_size=2,
    sequence_length=32,
    vocabulary=300,
    text_width=32,
    text_layers=1,
    test_batches=1,
    task_documents=4,
    recalibration_passes=2,
    recalibration_batches=2,
    pretrained_steps=3,
    pretrained_batch_size=1,
    pretrained_test_batches=1,
)

# asset, side of the pictures, channels, what the augmentation has; a digit is not what it was after a flip
IMAGES: dict[str, dict[str, Any]] = {
    "emoji": {"data": "asset:emoji", "image_size": 32, "num_channels": 3, "flip": 0.5, "scale": (0.5, 1.0)},
    "mnist": {"data": "asset:mnist-5k", "image_size": 28, "num_channels": 1, "flip": 0.0, "scale": (0.7, 1.0)},
}
# fields of the model; the first of each set is what the others are compared with
IMAGE_NORMS: dict[str, dict[str, Any]] = {
    "layernorm": {"norm": "layernorm"},
    "batchnorm": {"norm": "batchnorm"},
    "repbn": {"norm": "repbn"},
    FADING: {"norm": "prepbn"},
}
TEXT_NORMS: dict[str, dict[str, Any]] = {
    "rmsnorm": {"norm": "rmsnorm"},
    "batchnorm": {"norm": "batchnorm"},
    "repbn": {"norm": "repbn"},
    # batch norms that start as in vision (scale 1, eta 1), the same start as RepBN's here
    FADING: {"norm": "prepbn", "norm_options": {"initial": "vision"}},
    # the released LLaMA code's start (scale 0, eta 0)
    "prepbn-zero-start": {"norm": "prepbn"},
}
PRETRAINED = ("original", "fine-tuned", FADING)

GROUPS: dict[str, list[str]] = {
    **{data: [f"{data}-{norm}" for norm in IMAGE_NORMS] for data in IMAGES},
    "text": [f"text-{norm}" for norm in TEXT_NORMS],
    "smollm2": [f"smollm2-{kind}" for kind in PRETRAINED],
}


def runs(study: Study, folder: Path) -> KeptRuns:
    """The study's runs, kept in `folder`."""
    return KeptRuns(folder, study, partial(result_of, study=study))


def run_one(variant: str, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """The result of a run: what lies in the folder, or of training it now.

    Raises:
        ValueError: an unknown variant.
    """
    known = [name for names in GROUPS.values() for name in names]
    if variant not in known:
        raise ValueError(f"unknown variant {variant!r}; there are {', '.join(known)}")
    return runs(study, folder).get(variant, seed)


def result_of(variant: str, seed: int, study: Study) -> dict[str, Any]:
    """Train a variant and measure it. A training that diverges is a result: `diverged_at` is its step."""
    group, _, kind = variant.partition("-")
    if group in IMAGES:
        return image_run(IMAGES[group], IMAGE_NORMS[kind], seed, study)
    if group == "text":
        return text_run(TEXT_NORMS[kind], seed, study)
    return pretrained_run(kind, seed, study)
