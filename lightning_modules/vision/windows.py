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
    """Which pairs of a window are neighbours in the image and no padding: (W, r s, r s) bool.

    Windows of the padded map, rolled by `shift` towards the start. A place always sees itself, padding too: a row
    without anything to attend to would be nan.
    """
    labels = torch.zeros(1, *padded, 1, dtype=torch.long, device=device)
    labels[:, grid[0] :], labels[:, :, grid[1] :] = -1, -1
    if shift:
        labels = labels.roll((-shift, -shift), (1, 2))
        # what came round from the other side is a region of its own, in each direction
        wrapped = [torch.arange(side, device=device) >= side - shift for side in padded]
        region = 1 + wrapped[0].long()[:, None] + 2 * wrapped[1].long()[None, :]
        labels = torch.where(labels[0, ..., 0] < 0, -1, region)[None, ..., None]
    places = split(labels, window).squeeze(-1)  # (W, r s)
    allowed = (places[:, :, None] == places[:, None, :]) & (places[:, None, :] >= 0)
    return allowed | torch.eye(places.shape[1], dtype=torch.bool, device=device)
