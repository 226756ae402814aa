"""Embeddings, blocks and stochastic depth that the four backbones share."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .slots import ATTENTIONS, AttentionPlace, build_norm

Grid = tuple[int, int]


class DropPath(nn.Module):
    """Leaves out a residual branch per image in training and scales the others (arXiv 1603.09382).

    Args:
        rate: probability of leaving out.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * x.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.rate:.3g}"


class ConvEmbedding(nn.Module):
    """A map to tokens by a strided convolution, then a norm, a class token and a table of positions where asked for.

    Args:
        config: gives norm and kind of positions.
        in_channels: channels of the map.
        dim: channels of a token.
        kernel_size: of the convolution.
        stride: of the convolution.
        padding: of the convolution.
        norm: whether a norm follows.
        class_token: whether a learned token comes first.
        grid: rows and columns of the table of positions; None for no table.
    """

    def __init__(
        self,
        config: Any,
        in_channels: int,
        dim: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int = 0,
        norm: bool = True,
        class_token: bool = False,
        grid: Grid | None = None,
    ) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, dim, kernel_size, stride=stride, padding=padding)
        self.norm = build_norm(config, dim) if norm else None
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.grid, self.fixed = grid, config.positions == "fixed"
        rows = 0 if grid is None else int(class_token) + grid[0] * grid[1]
        self.positions = None if grid is None else nn.Parameter(torch.zeros(1, rows, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Map (B, c, H, W) to tokens (B, N, C), and their rows and columns.

        Raises:
            ValueError: a map smaller than a patch; another size than the table's where that is fixed.
        """
        kernel, padding = self.projection.kernel_size[0], int(self.projection.padding[0])
        if min(x.shape[-2:]) + 2 * padding < kernel:
            raise ValueError(
                f"a map of {x.shape[-2]} x {x.shape[-1]} is smaller than a patch of {kernel}; use larger images"
            )
        x = self.projection(x)
        grid = (x.shape[-2], x.shape[-1])
        # row by row in memory: the layers behind it take over the layout, and are slow with another
        x = x.flatten(2).transpose(1, 2).contiguous()
        if self.norm is not None:
            x = self.norm(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return x + self._positions_for(grid) if self.positions is not None else x, grid

    def _positions_for(self, grid: Grid) -> Tensor:
        """The table for a grid: (1, N, C)."""
        assert self.positions is not None
        assert self.grid is not None
        if grid == self.grid:
            return self.positions
        if self.fixed:
            raise ValueError(
                f"the fixed table of positions is for {self.grid[0]} x {self.grid[1]} tokens, got {grid[0]} x "
                f"{grid[1]}; resize the image, or use positions: interpolated"
            )
        first = self.positions.shape[1] - self.grid[0] * self.grid[1]
        table = self.positions[:, first:].transpose(1, 2).unflatten(-1, self.grid)
        # in float32: sixteen bits would resize to other positions on other devices
        dtype = torch.promote_types(table.dtype, torch.float32)
        resized = F.interpolate(table.to(dtype), size=grid, mode="bicubic").flatten(2).transpose(1, 2).to(table.dtype)
        return torch.cat([self.positions[:, :first], resized], dim=1)


class PatchMerging(nn.Module):
    """Four neighbours to one token of other width: norm, then a linear layer without bias (Swin).

    Args:
        config: gives the norm.
        in_channels: channels before.
        dim: channels after.
    """

    def __init__(self, config: Any, in_channels: int, dim: int) -> None:
        super().__init__()
        self.norm = build_norm(config, 4 * in_channels)
        # a fused norm leaves its shift there
        self.reduction = nn.Linear(4 * in_channels, dim, bias=config.norm == "identity")

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Map (B, c, H, W) to tokens (B, N, C), and their rows and columns; an odd side is padded with zeros."""
        if x.shape[-1] % 2 or x.shape[-2] % 2:
            x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
        x = x.permute(0, 2, 3, 1)
        # column by column, as in released weights
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], dim=-1)
        return self.reduction(self.norm(x)).flatten(1, 2), (x.shape[1], x.shape[2])


class Block(nn.Module):
    """Norm and attention, norm and feed-forward layer, each around a residual.

    Args:
        config: gives norm and the attention's options.
        attention: name of the attention.
        place: where it stands.
        mlp_ratio: width of the feed-forward layer over the channels.
        drop_path: probability of leaving out a branch.
    """

    def __init__(
        self, config: Any, attention: str, place: AttentionPlace, *, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        options = {} if attention == "softmax" else config.attention_options or {}
        self.norm1 = build_norm(config, place.dim)
        self.attention = ATTENTIONS.build(attention, config, place, **options)
        self.norm2 = build_norm(config, place.dim)
        self.fc1 = nn.Linear(place.dim, int(place.dim * mlp_ratio))
        self.fc2 = nn.Linear(int(place.dim * mlp_ratio), place.dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        x = x + self.drop_path(self.attention(self.norm1(x), grid))
        return x + self.drop_path(self.fc2(self._hidden(self.norm2(x))))

    def _hidden(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if torch.is_grad_enabled() or self.fc1._forward_hooks:
            return F.gelu(hidden)
        # nobody else sees it: a second tensor of this size costs more than the activation once it exceeds the caches
        return torch.ops.aten.gelu_(hidden)
