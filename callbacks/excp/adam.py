"""The first Adam update after a resume, judged without knowing the next gradient."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .histogram import Float32, Histogram

_BLOCK = 1 << 16


@dataclass(frozen=True)
class AdamRule:
    """Adam's constants at a save: decay rates, epsilon, updates so far."""

    betas: tuple[float, float]
    eps: float
    step: float

    def update(self, momentum: Float32, second_moment: Float32, root: Float32) -> Float32:
        """Size of the next update over the learning rate where the gradient has the size `root`.

        The gradient is taken to point along the momentum: |beta1 m + (1 - beta1) g| / sqrt(beta2 v + (1 - beta2) g^2)
        with both biases corrected. All arguments have shape (n,).
        """
        beta1, beta2 = self.betas
        bias1, bias2 = 1 - beta1 ** (self.step + 1), 1 - beta2 ** (self.step + 1)
        numerator = np.abs(momentum)
        numerator *= np.float32(beta1 / bias1)
        numerator += root * np.float32((1 - beta1) / bias1)
        denominator = np.square(root)
        denominator *= np.float32((1 - beta2) / bias2)
        denominator += second_moment * np.float32(beta2 / bias2)
        np.sqrt(denominator, out=denominator)
        denominator += np.float32(max(self.eps, 1e-30))
        numerator /= denominator
        return numerator


def blocks(length: int) -> Iterator[slice]:
    """Pieces that fit into a core's cache."""
    for start in range(0, length, _BLOCK):
        yield slice(start, start + _BLOCK)


def proxy_updates(rule: AdamRule, momentum: Float32, second_moment: Float32, exact_second_moment: Float32) -> Float32:
    """Sizes of the next update over the learning rate, shape (n,).

    A save does not have the next gradient. Each entry's update is the larger one of two: for a gradient of the size
    that the exact second moment expects, sqrt(v), along the momentum, and for none.
    """
    updates = np.empty_like(momentum)
    for block in blocks(len(momentum)):
        root = np.sqrt(np.maximum(exact_second_moment[block], 0))
        updates[block] = rule.update(momentum[block], second_moment[block], root)
        silent = rule.update(momentum[block], second_moment[block], np.zeros_like(root))
        np.maximum(updates[block], silent, out=updates[block])
    return updates


def update_ceiling(updates: Float32, target: float) -> float:
    """Largest update that a stored state may give: `target` times the 99th percentile of the exact state's."""
    return target * Histogram.of(updates).threshold(0.99)
