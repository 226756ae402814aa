"""SLAB's norms and attention as slots of the image backbones: `prepbn`, `repbn`, `batchnorm`, `simplified_linear`."""

from typing import Any

import torch
from torch import Tensor, nn

from ..vision.attention import Grid, StripeAttention, join_heads, reduced, split_heads
from ..vision.slots import ATTENTIONS, NORMS, AttentionPlace, build_norm
from .attention import Positions, SimplifiedLinearAttention
from .fusion import ChannelAffine
from .norms import ProgressiveNorm, RepBatchNorm

# of the batch norms in the released vision code, whatever the old norm's is
EPS = 1e-5


@NORMS.register("prepbn")
def _prepbn(config: Any, size: int, *, old_norm: str | None = "layernorm", momentum: float | None = 0.1) -> nn.Module:
    """The blend; `old_norm: null` is what is left of it after the schedule."""
    if old_norm not in (None, "layernorm"):
        raise ValueError(f"norm_options: old_norm {old_norm!r} is not one of layernorm, null")
    old = None if old_norm is None else NORMS.build(old_norm, config, size)
    norm = ProgressiveNorm(old, RepBatchNorm(size, eps=EPS, momentum=momentum, initial="vision"))
    norm.config = config
    return norm


@NORMS.register("repbn")
def _repbn(config: Any, size: int, *, momentum: float | None = 0.1) -> nn.Module:
    """RepBN from the first step, for comparison."""
    return RepBatchNorm(size, eps=EPS, momentum=momentum, initial="vision")


@NORMS.register("batchnorm")
def _batchnorm(config: Any, size: int, *, momentum: float | None = 0.1) -> nn.Module:
    """A plain batch norm over tokens, for comparison."""
    return RepBatchNorm(size, eps=EPS, momentum=momentum, eta=0.0, learn_eta=False)


@NORMS.register("affine")
def _affine(config: Any, size: int) -> nn.Module:
    """What is left of a norm of a map in the fused form."""
    return ChannelAffine(size)


class ReducedLinearAttention(SimplifiedLinearAttention):
    """Linear attention of all tokens to a reduced map (SLAB-PVT).

    Args:
        config: gives the norm of the reduced map.
        place: channels, heads, grid and side of the reduced patches.
        positions: see `SimplifiedLinearAttention`; the table is one of the reduced map's.
        kernel_size: of the depthwise convolution.
    """

    def __init__(
        self, config: Any, place: AttentionPlace, *, positions: Positions = "fixed", kernel_size: int = 5
    ) -> None:
        keys = (place.grid[0] // place.size, place.grid[1] // place.size)
        super().__init__(place.dim, num_heads=place.num_heads, grid=keys, positions=positions, kernel_size=kernel_size)
        del self.qkv
        self.query, self.key_value = nn.Linear(place.dim, place.dim), nn.Linear(place.dim, 2 * place.dim)
        self.reduction: nn.Conv2d | None = None
        if place.size > 1:
            self.reduction = nn.Conv2d(place.dim, place.dim, place.size, stride=place.size)
            self.norm = build_norm(config, place.dim)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C); `grid` says its rows and columns."""
        assert grid is not None
        source = reduced(self, x, grid)
        ratio = 1 if self.reduction is None else self.reduction.stride[0]
        key, value = self.key_value(source).chunk(2, dim=-1)
        keys = self._grid_of(source.shape[1], (grid[0] // ratio, grid[1] // ratio))
        key = key + self._positions_for(keys).to(key.dtype)
        query, key, value = (split_heads(part, self.num_heads) for part in (self.query(x), key, value))
        return self.projection(join_heads(self.attend(query, key, value, grid)))


class StripeLinearAttention(StripeAttention):
    """Linear attention inside crossing stripes, with both convolutions of the values (SLAB-CSwin).

    The table of positions is one of a stripe. Padding has no weight.

    Args:
        place: channels, heads, grid and width of the stripes.
        positions: see `SimplifiedLinearAttention`.
        kernel_size: of the depthwise convolution over the width of a head.
    """

    def __init__(self, place: AttentionPlace, *, positions: Positions = "fixed", kernel_size: int = 5) -> None:
        super().__init__(place)
        width = place.dim // self.branches
        self.mixers = nn.ModuleList(
            _StripeMixer(width, self.num_heads, window, positions, kernel_size) for window in self.windows(place.grid)
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None, window: Grid, branch: int
    ) -> Tensor:
        """Linear attention inside stripes, see `StripeAttention.attend`."""
        return self.mixers[branch](query, key, value, inside, window)


class _StripeMixer(SimplifiedLinearAttention):
    def __init__(self, dim: int, heads: int, window: Grid, positions: Positions, kernel_size: int) -> None:
        super().__init__(dim, num_heads=heads, grid=window, positions=positions, kernel_size=kernel_size)
        # the backbone's attention has these for both directions
        del self.qkv, self.projection

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None, window: Grid
    ) -> Tensor:
        self._grid_of(query.shape[1], window)
        key = key + self._positions_for(window).to(key.dtype)
        if inside is not None:
            # a key of zeros has no weight
            key = torch.where(inside[..., None], key, 0.0)
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        return join_heads(self.attend(query, key, value, window))


@ATTENTIONS.register("simplified_linear")
def _simplified_linear(
    config: Any, place: AttentionPlace, *, positions: Positions | None = None, kernel_size: int = 5
) -> nn.Module:
    """Linear attention; all to all in Swin's stages too, whose windows are as large as the map there.

    Kinds of positions are the configuration's by default.
    """
    if place.class_token and place.pattern == "global":
        raise ValueError(
            "simplified_linear needs tokens that make up a map, the class token does not; set pooling: mean"
        )
    kind: Any = positions or config.positions
    if place.pattern == "reduced":
        return ReducedLinearAttention(config, place, positions=kind, kernel_size=kernel_size)
    if place.pattern == "stripe":
        return StripeLinearAttention(place, positions=kind, kernel_size=kernel_size)
    return SimplifiedLinearAttention(
        place.dim, num_heads=place.num_heads, grid=place.grid, positions=kind, kernel_size=kernel_size
    )
