"""Softmax attention of the four backbones, under the name `softmax` of the attention slot."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .slots import ATTENTIONS, AttentionPlace, build_norm
from .windows import image_tokens, join, pad_to_multiple, shift_mask, split

Grid = tuple[int, int]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(..., N, C) to (..., H, N, C / H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def join_heads(x: Tensor) -> Tensor:
    """(..., H, N, d) to (..., N, H d)."""
    return x.transpose(-2, -3).flatten(-2)


class GlobalAttention(nn.Module):
    """All tokens attend to all (DeiT, arXiv 2012.12877).

    Args:
        place: channels and heads.
    """

    def __init__(self, place: AttentionPlace) -> None:
        super().__init__()
        self.num_heads = place.num_heads
        self.qkv = nn.Linear(place.dim, 3 * place.dim)
        self.projection = nn.Linear(place.dim, place.dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        query, key, value = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.projection(join_heads(F.scaled_dot_product_attention(query, key, value)))


class WindowAttention(nn.Module):
    """Attention inside square windows with a table of relative positions (Swin, arXiv 2103.14030).

    A map that windows do not divide is padded after the projection, and padding is not attended to. deviation: the
    released code pads before it and attends to padding; then a norm before the projection could not be fused.

    Args:
        place: channels, heads, side of the windows, whether they are shifted. Windows are no larger than the place's
            grid, and such a grid is not shifted.
    """

    relative_index: Tensor

    def __init__(self, place: AttentionPlace) -> None:
        super().__init__()
        self.num_heads, self.shifted = place.num_heads, place.shifted
        self.window = window = min(place.size, *place.grid)
        self.qkv = nn.Linear(place.dim, 3 * place.dim)
        self.projection = nn.Linear(place.dim, place.dim)
        self.relative_positions = nn.Parameter(torch.zeros((2 * window - 1) ** 2, place.num_heads))

    def _bias(self) -> Tensor:
        """Bias of each pair of places in a window: (1, H, w^2, w^2)."""
        side = torch.arange(self.window, device=self.relative_positions.device)
        place = torch.cartesian_prod(side, side)  # (w^2, 2)
        offset = place[:, None] - place[None, :] + self.window - 1
        index = offset[..., 0] * (2 * self.window - 1) + offset[..., 1]
        # with a dimension for windows: the fast paths of attention take no other bias
        return self.relative_positions[index].permute(2, 0, 1)[None]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        batch, window = len(x), (self.window, self.window)
        shift = self.window // 2 if self.shifted and min(grid) > self.window else 0
        divided = all(side % self.window == 0 for side in grid)
        # without padding, the narrower tensor goes into windows
        tokens = (x if divided else self.qkv(x)).unflatten(1, grid)
        tokens, padded = pad_to_multiple(tokens, window)
        if shift:
            tokens = tokens.roll((-shift, -shift), (1, 2))
        tokens = split(tokens, window)
        qkv = self.qkv(tokens) if divided else tokens
        query, key, value = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        bias = self._bias().to(query.dtype)
        if shift or padded != grid:
            mask = shift_mask(grid, padded, window, shift, device=x.device)  # (W, w^2, w^2)
            bias = torch.where(mask[:, None], bias, -torch.inf).repeat(batch, 1, 1, 1)
        out = join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=bias))
        out = join(out, padded, window)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return self.projection(out[:, : grid[0], : grid[1]].flatten(1, 2))


class ReducedAttention(nn.Module):
    """All tokens attend to a map made smaller by a strided convolution and a norm (PVT, arXiv 2102.12122).

    Args:
        config: gives the norm.
        place: channels, heads, side of the reduced patches.
    """

    def __init__(self, config: Any, place: AttentionPlace) -> None:
        super().__init__()
        self.num_heads, self.class_token, dim = place.num_heads, place.class_token, place.dim
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.projection = nn.Linear(dim, dim)
        self.reduction: nn.Conv2d | None = None
        if place.size > 1:
            if place.class_token:
                raise ValueError("the class token has no place in a reduced map; use a reduction ratio of 1")
            self.reduction = nn.Conv2d(dim, dim, place.size, stride=place.size)
            self.norm = build_norm(config, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        source = reduced(self, x, grid)
        key, value = (split_heads(part, self.num_heads) for part in self.key_value(source).chunk(2, dim=-1))
        query = split_heads(self.query(x), self.num_heads)
        return self.projection(join_heads(F.scaled_dot_product_attention(query, key, value)))


def reduced(module: Any, x: Tensor, grid: Grid) -> Tensor:
    """What keys and values are made from: (B, M, C).

    Raises:
        ValueError: a map that is smaller than one reduced patch.
    """
    if module.reduction is None:
        return x
    if min(grid) < module.reduction.stride[0]:
        raise ValueError(
            f"a map of {grid[0]} x {grid[1]} tokens is smaller than the reduction of {module.reduction.stride[0]}; "
            f"use a larger image, or lower reduction_ratios"
        )
    return module.norm(module.reduction(x.transpose(1, 2).unflatten(-1, grid)).flatten(2).transpose(1, 2))


class StripeAttention(nn.Module):
    """Half of the heads attend inside vertical stripes, half inside horizontal ones (CSwin, arXiv 2107.00652).

    Values go through a depthwise 3 x 3 convolution inside the stripe as well (locally enhanced positions). Where a
    stripe is as wide as the place's grid, all heads attend to all tokens. Padding is treated as in `WindowAttention`.

    Args:
        place: channels, heads, width of the stripes.
    """

    def __init__(self, place: AttentionPlace) -> None:
        super().__init__()
        self.width, self.whole = place.size, place.size >= min(place.grid)
        self.branches = 1 if self.whole else 2
        if place.num_heads % self.branches:
            raise ValueError(
                f"{place.num_heads} heads cannot be halved for two directions of stripes; use an even number"
            )
        self.num_heads = place.num_heads // self.branches
        self.qkv = nn.Linear(place.dim, 3 * place.dim)
        self.projection = nn.Linear(place.dim, place.dim)
        half = place.dim // self.branches
        self.local = nn.ModuleList(nn.Conv2d(half, half, 3, padding=1, groups=half) for _ in range(self.branches))

    def windows(self, grid: Grid) -> list[Grid]:
        """Rows and columns of a stripe of each branch."""
        return [grid] if self.whole else [(grid[0], self.width), (self.width, grid[1])]

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        query, key, value = self.qkv(x).unflatten(1, grid).chunk(3, dim=-1)  # each (B, R, S, C)
        parts = zip(*(part.chunk(self.branches, dim=-1) for part in (query, key, value)), strict=True)
        out = []
        for branch, (part, window) in enumerate(zip(parts, self.windows(grid), strict=True)):
            padded_parts = [pad_to_multiple(tensor, window) for tensor in part]
            padded = padded_parts[0][1]
            q, k, v = (split(tensor, window) for tensor, _ in padded_parts)
            inside = None
            if padded != grid:
                inside = image_tokens(grid, padded, window, device=x.device).repeat(len(x), 1)
            local = self.local[branch](v.transpose(1, 2).unflatten(-1, window)).flatten(2).transpose(1, 2)
            mixed = self.attend(q, k, v, inside, window, branch) + local
            out.append(join(mixed, padded, window)[:, : grid[0], : grid[1]])
        return self.projection(torch.cat(out, dim=-1).flatten(1, 2))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None, window: Grid, branch: int
    ) -> Tensor:
        """Attention inside stripes: (stripes, n, C) to (stripes, n, C).

        Args:
            query: (stripes, n, C).
            key: (stripes, n, C).
            value: (stripes, n, C).
            inside: (stripes, n) bool, False at keys that are padding; None without any.
            window: rows and columns of a stripe.
            branch: number of the direction.
        """
        q, k, v = (split_heads(part, self.num_heads) for part in (query, key, value))
        return join_heads(F.scaled_dot_product_attention(q, k, v, None if inside is None else inside[:, None, None]))


@ATTENTIONS.register("softmax")
def _softmax(config: Any, place: AttentionPlace) -> nn.Module:
    if place.pattern == "reduced":
        return ReducedAttention(config, place)
    kinds = {"global": GlobalAttention, "window": WindowAttention, "stripe": StripeAttention}
    return kinds[place.pattern](place)
