"""SLAB's norms as the decoder's norm slots: `prepbn`, `repbn`, `batchnorm`, and `identity` for the fused form."""

from typing import Any, Literal

from torch import nn

from ..decoder.configuration import DecoderConfig
from ..decoder.slots import NORMS
from .norms import Initialisation, ProgressiveNorm, RepBatchNorm

OldNorm = Literal["rmsnorm", "layernorm"]


@NORMS.register("prepbn")
def _prepbn(
    config: DecoderConfig,
    size: int,
    *,
    old_norm: OldNorm | None = "rmsnorm",
    initial: Initialisation = "language",
    momentum: float | None = 0.1,
) -> nn.Module:
    """The blend; `old_norm: null` is what is left of it after the schedule."""
    new = RepBatchNorm(size, eps=config.norm_eps, momentum=momentum, initial=initial)
    if old_norm not in (None, "rmsnorm", "layernorm"):
        raise ValueError(f"norm_options: old_norm {old_norm!r} is not one of rmsnorm, layernorm, null")
    old = None if old_norm is None else NORMS.build(old_norm, config, size)
    norm = ProgressiveNorm(old, new)
    norm.config = config
    return norm


@NORMS.register("repbn")
def _repbn(
    config: DecoderConfig,
    size: int,
    *,
    initial: Initialisation = "vision",
    momentum: float | None = 0.1,
    eta: float | None = None,
    learn_eta: bool = True,
) -> nn.Module:
    """RepBN from the first step, for comparison."""
    return RepBatchNorm(size, eps=config.norm_eps, momentum=momentum, initial=initial, eta=eta, learn_eta=learn_eta)


@NORMS.register("batchnorm")
def _batchnorm(config: DecoderConfig, size: int, *, momentum: float | None = 0.1) -> nn.Module:
    """A plain batch norm over tokens, for comparison."""
    return RepBatchNorm(size, eps=config.norm_eps, momentum=momentum, eta=0.0, learn_eta=False)


@NORMS.register("identity")
def _identity(config: Any, size: int) -> nn.Module:
    return nn.Identity()
