"""The first Adam update after a resume, judged without knowing the next gradient."""

from dataclasses import dataclass

import numpy as np

from .histogram import Float32, Histogram

_BLOCK = 1 << 14
_SAMPLE = 1 << 17


@dataclass(frozen=True)
class AdamRule:
    """Adam's constants at a save: decay rates, epsilon, updates so far."""

    betas: tuple[float, float]
    eps: float
    step: float

    def updates(self, momentum: Float32, second_moment: Float32, exact_second_moment: Float32) -> Float32:
        """Sizes of the next update over the learning rate, shape (n,).

        A save does not have the next gradient g. Each entry's update is the larger one of two: for a gradient of the
        size that the exact second moment expects, sqrt(v), along the momentum, and for none. An update is
        |beta1 m + (1 - beta1) g| / (sqrt(beta2 v + (1 - beta2) g^2) + eps), both biases corrected.

        Args:
            momentum: first moment, shape (n,).
            second_moment: second moment in the stored form, shape (n,).
            exact_second_moment: the true one, shape (n,).
        """
        updates = np.empty(len(momentum), np.float32)
        beta1, beta2 = self.betas
        bias1, bias2 = 1 - beta1 ** (self.step + 1), 1 - beta2 ** (self.step + 1)
        old, new = np.float32(beta1 / bias1), np.float32((1 - beta1) / bias1)
        old_square, new_square = np.float32(beta2 / bias2), np.float32((1 - beta2) / bias2)
        eps = np.float32(max(self.eps, 1e-30))
        for start in range(0, len(momentum), _BLOCK):
            block = slice(start, start + _BLOCK)
            silent = np.abs(momentum[block])
            silent *= old
            size = np.sqrt(exact_second_moment[block])
            root = size * new
            root += silent
            if second_moment is exact_second_moment:
                # one square root for all
                below = size * np.float32(old_square**0.5)
                square = np.multiply(size, np.float32((old_square + new_square) ** 0.5), out=size)
            else:
                square = second_moment[block] * old_square
                below = np.sqrt(square)
                square += exact_second_moment[block] * new_square
                np.sqrt(square, out=square)
            below += eps
            silent /= below
            square += eps
            root /= square
            np.maximum(root, silent, out=updates[block])
        return updates


def update_ceiling(updates: Float32, target: float) -> np.float32:
    """Largest update that a stored state may give: `target` times the 99th percentile of the exact state's."""
    # an odd stride meets every column of a matrix
    some = updates[:: len(updates) // _SAMPLE | 1] if len(updates) > _SAMPLE else updates
    return np.float32(target * Histogram.of(np.ascontiguousarray(some)).threshold(0.99))
