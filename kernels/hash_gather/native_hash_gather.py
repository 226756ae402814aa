"""CPU path in C++ (`native_hash_gather.cpp`), where it has been built: hash and gather in one call."""

import ctypes

import torch
from torch import Tensor

from .reference import Weighting, num_tables

TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, torch.uint8: 4}


def _values(x: Tensor) -> Tensor:
    return (x if x.dtype == torch.float32 else x.float()).contiguous()


def gather(
    library: ctypes.CDLL,
    x: Tensor,
    table: Tensor,
    num_cols: int,
    num_bits: int,
    weighting: Weighting,
    temperature: float,
) -> Tensor | None:
    """(T, H) sums over a table (R, H), or over 8-bit records (R, H + 8) in float32; None where x is not finite."""
    x, table = _values(x), table if table.stride(1) == 1 else table.contiguous()
    num_tokens, width = x.shape
    dtype = torch.float32 if table.dtype == torch.uint8 else table.dtype
    out = torch.empty(num_tokens, num_cols, dtype=dtype, device="cpu")
    failed = library.tenfold_hash_gather(
        TYPES[table.dtype], x.data_ptr(), num_tokens, width, num_bits, weighting == "l1", 2 / temperature,
        table.data_ptr(), table.stride(0), num_cols, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if failed else out


def sign_hash(
    library: ctypes.CDLL, x: Tensor, num_bits: int, weighting: Weighting, temperature: float
) -> tuple[Tensor, Tensor] | None:
    """Rows and weights (T, K) of (T, d) without a gradient; None where x is not finite."""
    x = _values(x)
    num_tokens, width = x.shape
    rows = torch.empty(num_tokens, num_tables(width, num_bits), dtype=torch.int64, device="cpu")
    weights = torch.empty(rows.shape, dtype=torch.float32, device="cpu")
    failed = library.tenfold_sign_hash(
        x.data_ptr(), num_tokens, width, num_bits, weighting == "l1", 2 / temperature, rows.data_ptr(),
        weights.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if failed else (rows, weights)
