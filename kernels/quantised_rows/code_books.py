"""The levels behind a code: NormalFloat of 4 and of 3 bits.

NF4 is that of QLoRA (arXiv 2305.14314, section 3 and appendix E). deviation: NF3 is in no common library; MoLE's paper
(arXiv 2503.15798) uses one and does not list it. Here it is the same construction with 8 levels.
"""

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

# name and version of the levels, as a file states them
CODE_BOOKS = {"nf4": "nf4-1", "nf3": "nf3-1", "int8": "int8-1"}


@cache
def normal_float_quantiles(bits: int) -> tuple[float, ...]:
    """Ascending quantiles of a normal distribution with 0 among them, half on each side.

    The outermost probability is the mean of those that leave half a level's probability outside for 2^k and for
    2^k - 1 levels.

    >>> [round(level, 3) for level in normal_float_quantiles(3)]
    [-1.499, -0.802, -0.37, 0.0, 0.275, 0.573, 0.934, 1.499]
    """
    half = 2 ** (bits - 1)
    # seven digits and float32, as in QLoRA's code, so that the last bits of its table come out
    outermost = round(1 - (1 / (4 * half) + 1 / (2 * (2 * half - 1))) / 2, 7)

    def quantiles(count: int) -> list[float]:
        """`count` positive quantiles, from the outermost towards one half in equal steps of probability."""
        probabilities = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float32, device="cpu")
        return [NormalDist().inv_cdf(probability) for probability in probabilities[:-1].tolist()]

    positive, negative = quantiles(half), quantiles(half - 1)
    return (*(-value for value in negative), 0.0, *reversed(positive))


def normal_float_levels(bits: int) -> Tensor:
    """The levels in float32, (2^bits,), divided in float32 as QLoRA's were."""
    quantiles = torch.tensor(normal_float_quantiles(bits), dtype=torch.float32, device="cpu")
    return quantiles / quantiles.max()
