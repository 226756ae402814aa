"""SLAB: fused models against the norms that they had, eager and compiled, and linear against softmax attention.

Weights and statistics are random: times do not depend on them. Whatever must compute the same is compared before it is
timed: fused with unfused, compiled with eager, FlashNorm with RMSNorm, linear attention with its N x N form. Compiled
models have cases of their own (`compiled`), so that compiled stands against compiled. float32 on CPUs, bfloat16 on
GPUs. A picture of attention's growth goes to `runs/bench/slab`.
"""

from collections.abc import Iterator
from pathlib import Path

from .registry import Settings
from .rows import Row
from .slab_attention import attention_rows
from .slab_images import image_rows
from .slab_language import language_rows

FOLDER = Path("runs", "bench", "slab")


def run(settings: Settings) -> Iterator[Row]:
    """Rows of image classifiers, of attention layers and of a language model."""
    yield from image_rows(settings)
    yield from attention_rows(settings, FOLDER / "attention_growth.png")
    yield from language_rows(settings)
