"""Thresholds below which residuals and moments become zero (ExCP, arXiv 2406.11257, section 3.2)."""

import numpy as np
import torch

from .histogram import SMALLEST, Float32, Histogram
from .options import ExCPOptions

# only in the released code: the paper's text has no upper limit
_LARGEST_RATIO = 2.5


def paper_weight_threshold(residual: Float32, mean_second_moment: float, *, alpha: float) -> float:
    """Threshold of |W_t - R| as in the released code: min(2.5, alpha / sqrt(mean(v))) times median |W_t - R|.

    The text has alpha / sqrt(v) times the median of W; the code takes one scalar per tensor, the residual, and a limit.

    Args:
        residual: weight minus reference, shape (n,).
        mean_second_moment: mean of exp_avg_sq over the tensor.
        alpha: 5e-5 in the paper.
    """
    root = float(np.sqrt(mean_second_moment))
    ratio = min(_LARGEST_RATIO, alpha / root) if root > 0 else _LARGEST_RATIO
    # the lower of the two middle values, as torch has it
    median = float(torch.from_numpy(np.abs(residual)).median())
    return float(np.float32(ratio * median))


def paper_momentum_threshold(exp_avg: Float32, *, beta: float) -> float:
    """Threshold of |exp_avg|: beta times its mean over the whole tensor, shape (n,)."""
    return float(np.float32(beta * np.abs(exp_avg).mean(dtype=np.float64))) if len(exp_avg) else 0.0


def weight_threshold(
    residual: Float32, histogram: Histogram, second_moment: Float32 | None, options: ExCPOptions
) -> float:
    """Magnitude up to which the residual becomes zero, before error control."""
    if options.mode == "paper" and second_moment is not None:
        mean = float(second_moment.mean(dtype=np.float64))
        return max(paper_weight_threshold(residual, mean, alpha=options.alpha), SMALLEST)
    # without a second moment the paper's threshold has no meaning
    return histogram.threshold(options.sparsity)


def momentum_threshold(exp_avg: Float32, kept: Float32, histogram: Histogram, options: ExCPOptions) -> float:
    """Magnitude up to which the first moment becomes zero.

    Args:
        exp_avg: all of it, shape (n,).
        kept: those entries whose weight's residual is not zero (all of them where there is no residual).
        histogram: of `kept`.
        options: `momentum_sparsity` counts the entries that the residual's pruning takes as well.
    """
    if options.mode == "paper":
        return max(paper_momentum_threshold(exp_avg, beta=options.beta), SMALLEST)
    wanted = (1 - options.momentum_sparsity) * len(exp_avg)
    return histogram.threshold(max(0.0, 1 - wanted / len(kept))) if len(kept) else SMALLEST
