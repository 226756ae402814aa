"""Rows of 8-bit codes with their own scale and offset, in the layout that FBGEMM's kernels in torch read."""

import torch
from torch import Tensor

SCALE_BYTES = 8
# values decoded at a time: 4 MiB in float32
_CHUNK_VALUES = 2**20


def quantise_rows(table: Tensor) -> Tensor:
    """Encode (R, H) floating-point rows as (R, H + 8) uint8: H codes, then scale and offset in float32.

    A code c stands for `c * scale + offset`; the offset is the row's smallest value and 255 steps reach its largest.

    Raises:
        ValueError: a value is not finite.
    """
    num_rows, width = table.shape
    records = torch.empty(num_rows, width + SCALE_BYTES, dtype=torch.uint8, device=table.device)
    for start in range(0, num_rows, max(1, _CHUNK_VALUES // width)):
        values = table[start : start + max(1, _CHUNK_VALUES // width)].float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                f"rows {start} to {start + len(values) - 1} of the table hold values that are not finite; "
                f"the weights are damaged"
            )
        low, high = values.aminmax(dim=1, keepdim=True)
        scale = (high - low) / 255
        codes = ((values - low) / scale.clamp_min(torch.finfo(torch.float32).tiny)).round()
        records[start : start + len(values), :width] = codes.to(torch.uint8)
        records[start : start + len(values), width:] = torch.cat([scale, low], dim=1).view(torch.uint8)
    return records


def scales_and_offsets(records: Tensor) -> Tensor:
    """(..., 2) float32 of (..., H + 8) records."""
    return records[..., -SCALE_BYTES:].contiguous().view(torch.float32)


def dequantise_rows(records: Tensor) -> Tensor:
    """Decode (..., H + 8) records to (..., H) float32 values."""
    both = scales_and_offsets(records)
    return records[..., :-SCALE_BYTES] * both[..., :1] + both[..., 1:]
