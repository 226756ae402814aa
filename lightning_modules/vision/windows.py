"""Maps cut into windows and put together again, and who may attend to whom inside them."""

import torch
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


def pad_to_multiple(x: Tensor, window: Grid) -> tuple[Tensor, Grid]:
    """Zeros below and to the right of (B, R, S, C) until windows divide it; and its rows and columns then."""
    rows, columns = (-(-side // part) * part for side, part in zip(x.shape[1:3], window, strict=True))
    if (rows, columns) == x.shape[1:3]:
        return x, (rows, columns)
    return F.pad(x, (0, 0, 0, columns - x.shape[2], 0, rows - x.shape[1])), (rows, columns)


def split(x: Tensor, window: Grid) -> Tensor:
    """(B, R, S, C) to windows, row by row inside and outside: (B W, r s, C)."""
    batch, rows, columns, channels = x.shape
    parts = x.view(batch, rows // window[0], window[0], columns // window[1], window[1], channels)
    return parts.transpose(2, 3).reshape(-1, window[0] * window[1], channels)


def join(x: Tensor, grid: Grid, window: Grid) -> Tensor:
    """What `split` undoes: (B W, r s, C) to (B, R, S, C)."""
    parts = x.view(-1, grid[0] // window[0], grid[1] // window[1], *window, x.shape[-1])
    return parts.transpose(2, 3).reshape(-1, *grid, x.shape[-1])


def shift_mask(grid: Grid, padded: Grid, window: Grid, shift: int, *, device: torch.device) -> Tensor:
    """Which pairs of a window may attend: neighbours in the image, and padding to padding: (W, r s, r s) bool.

    Windows of the padded map, rolled by `shift` towards the start.
    """
    labels = torch.zeros(padded, dtype=torch.long, device=device)
    labels[grid[0] :], labels[:, grid[1] :] = -1, -1
    if shift:
        labels = labels.roll((-shift, -shift), (0, 1))
        # what came round from the other side is a region of its own, in each direction
        wrapped = [(torch.arange(side, device=device) >= side - shift).long() for side in padded]
        labels = torch.where(labels < 0, -1, wrapped[0][:, None] + 2 * wrapped[1][None, :])
    places = split(labels[None, ..., None], window).squeeze(-1)  # (W, r s)
    return places[:, :, None] == places[:, None, :]


def image_tokens(grid: Grid, padded: Grid, window: Grid, *, device: torch.device) -> Tensor:
    """Which tokens of the windows of a padded map are no padding: (W, r s) bool."""
    inside = torch.zeros(padded, dtype=torch.bool, device=device)
    inside[: grid[0], : grid[1]] = True
    return split(inside[None, ..., None], window).squeeze(-1)
