"""Simplified linear attention for images (SLAB, arXiv 2405.11582, section 3.3)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.linear_attention import Backend, linear_attention

Positions = Literal["fixed", "interpolated"]


class SimplifiedLinearAttention(nn.Module):
    """`relu(q) (relu(k)^T v) / (relu(q) . sum relu(k))` plus a depthwise convolution of the values.

    Keys get a learned table of positions before the ReLU. The convolution runs over the width of a head with weights
    that heads share. Products and the normaliser are computed in float32 at least, see `linear_attention`; deviation:
    the released PVT and CSwin code leaves that guard out.

    Subclasses for hierarchical or striped backbones reuse `attend`, which takes keys and values of another number of
    tokens than queries.

    Args:
        dim: channels, C.
        num_heads: heads; C is a multiple.
        grid: rows and columns of tokens at the trained resolution.
        positions: `fixed` (the paper's) takes that resolution alone; `interpolated` resizes the table (bicubic) to the
            grid of each input.
        num_keys: rows of the table of positions where keys come from a reduced map; rows times columns by default.
        qkv_bias: bias on queries, keys and values.
        kernel_size: of the depthwise convolution, odd.
        dropout: probability on the output.
        backend: of `linear_attention`.

    Raises:
        ValueError: a width that heads do not divide, an even kernel, an unknown word.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        grid: tuple[int, int] = (14, 14),
        positions: Positions = "fixed",
        num_keys: int | None = None,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        dropout: float = 0.0,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}; change one of them")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} is even, which shifts the map; use an odd one")
        if positions not in ("fixed", "interpolated"):
            raise ValueError(f"positions {positions!r} is not one of fixed, interpolated")
        self.num_heads, self.head_dim, self.grid = num_heads, dim // num_heads, grid
        self.positions_kind, self.backend = positions, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.positions = nn.Parameter(torch.zeros(1, num_keys or math.prod(grid), dim))
        self.depthwise = nn.Conv2d(
            self.head_dim, self.head_dim, kernel_size, padding=kernel_size // 2, groups=self.head_dim
        )
        self.projection = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Map (B, N, C) to (B, N, C).

        Args:
            x: tokens, row by row.
            grid: their rows and columns; the trained ones, or those of a square, by default.

        Raises:
            ValueError: a number of tokens that is no grid, or not the table's where it is fixed.
        """
        grid = self._grid_of(x.shape[1], grid)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        key = key + self._positions_for(grid).to(key.dtype)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        mixed = self.attend(query, key, value, grid)
        return self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int]) -> Tensor:
        """Attention and convolution of (B, H, N, d) queries with (B, H, M, d) keys and values: (B, H, N, d).

        Where M is not N (PVT's reduced keys), values are stretched along the tokens to N before the convolution.
        """
        batch, heads, num_tokens, width = query.shape
        out = linear_attention(query, key, value, backend=self.backend)
        values = value.reshape(batch * heads, -1, width)  # (B H, M, d)
        if values.shape[1] != num_tokens:
            values = F.interpolate(values.transpose(1, 2), size=num_tokens, mode="linear").transpose(1, 2)
        # channels last: tokens are laid out so already, in and out
        local = self.depthwise(values.contiguous().unflatten(1, grid).permute(0, 3, 1, 2))
        return out + local.permute(0, 2, 3, 1).reshape(batch, heads, num_tokens, width).to(out.dtype)

    def _grid_of(self, num_tokens: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        table = self.positions.shape[1]
        if grid is None and num_tokens == math.prod(self.grid):
            grid = self.grid
        if grid is None:
            side = math.isqrt(num_tokens)
            if side * side != num_tokens:
                raise ValueError(
                    f"{num_tokens} tokens are neither the trained grid {self.grid} nor a square; pass "
                    f"grid=(rows, columns)"
                    + ("" if self.positions_kind == "interpolated" else ", with positions: interpolated")
                )
            grid = (side, side)
        if math.prod(grid) != num_tokens:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has {math.prod(grid)} tokens, the input {num_tokens}")
        if grid != self.grid and self.positions_kind == "fixed":
            raise ValueError(
                f"the fixed table of positions is for {self.grid[0]} x {self.grid[1]} tokens ({table}), got "
                f"{grid[0]} x {grid[1]} ({num_tokens}); resize the image, or use positions: interpolated"
            )
        return grid

    def _positions_for(self, grid: tuple[int, int]) -> Tensor:
        """The table for a grid: (1, N, C)."""
        if grid == self.grid:
            return self.positions
        table = self.positions.transpose(1, 2).unflatten(-1, self.grid)
        # in float32: sixteen bits would resize to other positions on other devices
        dtype = torch.promote_types(table.dtype, torch.float32)
        return F.interpolate(table.to(dtype), size=grid, mode="bicubic").flatten(2).transpose(1, 2)
