"""Registry of what can fill an image backbone's slots. A method registers its own builders.

Builders get the `VisionConfig`, the place in the model, and the slot's options as keyword arguments:

- norm: `build(config, size, **options) -> Module` mapping (..., size) to (..., size)
- attention: `build(config, place, **options) -> Module`, called as `module(x, grid)` with tokens (B, N, C), row by row,
  and their rows and columns; a class token, where there is one, comes first
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..decoder.slots import Registry

Pattern = Literal["global", "window", "reduced", "stripe"]


@dataclass(frozen=True, kw_only=True)
class AttentionPlace:
    """Where an attention layer stands.

    Attributes:
        pattern: who attends to whom: all to all (DeiT), inside windows (Swin), all to a reduced map (PVT), inside
            crossing stripes (CSwin).
        dim: channels, C.
        num_heads: heads.
        grid: rows and columns of tokens at the configuration's image size.
        size: side of the windows, of the reduced patches, or width of the stripes; 1 where there is none.
        shifted: whether windows are moved by half their side.
        class_token: whether the first token is no part of the grid.
    """

    pattern: Pattern
    dim: int
    num_heads: int
    grid: tuple[int, int]
    size: int = 1
    shifted: bool = False
    class_token: bool = False


NORMS = Registry("norm")
ATTENTIONS = Registry("attention")


@NORMS.register("layernorm")
def _layernorm(config: Any, size: int) -> nn.Module:
    return nn.LayerNorm(size, eps=config.norm_eps)


@NORMS.register("identity")
def _identity(config: Any, size: int) -> nn.Module:
    """No norm, for the fused form."""
    return nn.Identity()


def build_norm(config: Any, size: int) -> nn.Module:
    """The configuration's norm for `size` channels."""
    return NORMS.build(config.norm, config, size, **(config.norm_options or {}))
