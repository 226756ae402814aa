"""Settings of the ExCP codec."""

from dataclasses import dataclass
from typing import Literal

SecondMoment = Literal["rank1", "log_kmeans", "masked"]
Backend = Literal["rans", "zstd", "lzma"]


def _check(condition: bool, name: str, value: object, limit: str) -> None:
    if not condition:
        raise ValueError(f"ExCP: {name}={value!r} is out of range; use {limit}")


@dataclass(frozen=True, kw_only=True)
class ExCPOptions:
    """How a save is pruned, quantised and entropy coded (ExCP, arXiv 2406.11257).

    Args:
        mode: `sparsity` prunes the residual to a fraction of zeros; `paper` uses the thresholds of the released
            code (section 3: min(2.5, alpha / sqrt(mean(v))) times the median, beta times the mean momentum).
        sparsity: fraction (0-1) of the weight residual that becomes zero. `error_target` lowers it where needed.
        momentum_sparsity: fraction (0-1) of the first moment that becomes zero, the zeros of the residual included.
        momentum_mask: `weight` keeps the first moment only where the residual is kept (the paper), `own` wherever it is
            large: fewer bits for the same error of the moment where many residuals are pruned.
        alpha: weight threshold of `paper` mode.
        beta: momentum threshold of `paper` mode.
        weight_bits: the residual has at most 2**weight_bits - 1 non-zero levels (2-8).
        momentum_bits: the same for the first moment (2-8).
        second_moment_bits: the same for the second moment in `masked` and `log_kmeans` (2-8).
        second_moment: `rank1` keeps row and column means and, as exceptions, entries they understate; `log_kmeans`
            keeps every entry, quantised in the logarithm; `masked` zeroes what the first moment lost (the paper).
        entropy_constrained: levels of `sparsity` mode trade error against coded bits at the slope that the pruning
            threshold implies. deviation: the paper clusters by error alone; this is smaller at equal error.
        error_target: largest error of the stored weights over the training step since the last save, both as
            Euclidean norms, for every tensor; None prunes at fixed settings, whatever becomes of the error.
        update_target: largest first Adam update after a resume over the largest one of the exact state, for every
            tensor; None leaves the second moment as it comes.
        backend: `rans` (range variant of asymmetric numeral systems, `constriction`), `zstd` or `lzma`.
        contexts: choose tables by the previous save, the row and the weight's level where that makes a stream
            smaller (`rans` only).
        min_numel: tensors with fewer elements are stored as they are.

    Raises:
        ValueError: a value is out of range.
    """

    mode: Literal["sparsity", "paper"] = "sparsity"
    sparsity: float = 0.95
    momentum_sparsity: float = 0.98
    momentum_mask: Literal["weight", "own"] = "weight"
    alpha: float = 5e-5
    beta: float = 2.0
    weight_bits: int = 4
    momentum_bits: int = 4
    second_moment_bits: int = 4
    second_moment: SecondMoment = "rank1"
    entropy_constrained: bool = True
    error_target: float | None = 0.5
    update_target: float | None = 1.5
    backend: Backend = "rans"
    contexts: bool = True
    min_numel: int = 4096

    def __post_init__(self) -> None:
        _check(self.mode in ("sparsity", "paper"), "mode", self.mode, "sparsity or paper")
        _check(self.second_moment in ("rank1", "log_kmeans", "masked"), "second_moment", self.second_moment,
               "rank1, log_kmeans or masked")  # fmt: skip
        _check(self.momentum_mask in ("weight", "own"), "momentum_mask", self.momentum_mask, "weight or own")
        _check(self.backend in ("rans", "zstd", "lzma"), "backend", self.backend, "rans, zstd or lzma")
        for name in ("sparsity", "momentum_sparsity"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a fraction from 0 to below 1")
        for name in ("alpha", "beta"):
            _check(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "a finite value from 0")
        for name in ("weight_bits", "momentum_bits", "second_moment_bits"):
            _check(getattr(self, name) in range(2, 9), name, getattr(self, name), "2 to 8")
        for name, low in (("error_target", 0.0), ("update_target", 1.0)):
            value = getattr(self, name)
            _check(value is None or low < value < float("inf"), name, value, f"a value above {low:g}, or null for none")
        _check(self.min_numel >= 1, "min_numel", self.min_numel, "1 or more")
