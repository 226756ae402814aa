"""Plain torch formulation, any device and dtype, differentiable by autograd: what every other path is compared with."""

import torch


def accumulation_dtype(table: torch.Tensor) -> torch.dtype:
    """Sums run in float64 for float64 tables, in float32 for all others."""
    return torch.float64 if table.dtype == torch.float64 else torch.float32


def weighted_gather_reference(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gather the rows, scale them, add them up; materialises (T, M, H) values and a 16-bit table in float32.

    Args:
        table: (R, H) rows.
        indices: (T, M) row numbers, int64.
        weights: (T, M) factors.

    Returns:
        (T, H) in the table's dtype.
    """
    dtype = accumulation_dtype(table)
    # cast before the gather, so that the gradients of a row, too, are added up in this dtype
    rows = table.to(dtype)[indices]  # (T, M, H)
    return (rows * weights.to(dtype).unsqueeze(-1)).sum(-2).to(table.dtype)


def weighted_gather_groups_reference(table: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gather whole groups of adjacent rows, scale the rows, add them up; materialises (T, N, H) values.

    Args:
        table: (U, N, H) groups of N rows.
        ids: (T,) group numbers, int64.
        weights: (T, N) factors.

    Returns:
        (T, H) in the table's dtype.
    """
    return weighted_gather_reference(table, ids, weights)
