"""CPU path: `embedding_bag`'s vectorised kernels, fed so that forward and both gradients stream the table once.

README.md says what else was measured and why this won.
"""

from functools import lru_cache

import torch

from .segments import Segments, check_range

# values gathered at a time where a gradient needs float32 copies of 16-bit rows: 4 MiB, inside a core's cache
_CHUNK_VALUES = 2**20


@lru_cache(maxsize=64)
def _row_starts(num_bags: int, bag_terms: int) -> torch.Tensor:
    return torch.arange(0, num_bags * bag_terms, bag_terms)


@lru_cache(maxsize=64)
def _group_rows(num_rows: int) -> torch.Tensor:
    return torch.arange(num_rows)


def _bag(
    table: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor, *, closed: bool = False
) -> torch.Tensor:
    """Weighted sums of rows, bag by bag, accumulated in float32 (float64 for float64 tables) by `embedding_bag`."""
    if weights.dtype != table.dtype:
        if table.dtype.itemsize > 2:
            weights = weights.to(table.dtype)
        else:
            # the kernel wants the weights in the table's 16 bits: the rounded weight and what it lacks, side by side,
            # so that the row is read a second time while it is still in the first-level cache
            exact = weights.float()
            high = exact.to(table.dtype)
            weights = torch.stack([high, (exact - high.float()).to(table.dtype)], dim=-1).reshape(-1)
            rows, offsets = rows.repeat_interleave(2), offsets * 2
    return torch.embedding_bag(table, rows, offsets, False, 0, False, weights, closed)[0]


def _rows_of_groups(table: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(U, N, H) as rows (R, H) without a copy where groups are evenly spaced, and the rows from group to group.

    A layer's slice of a table [vocabulary, layer, expert, hidden] is such a case.
    """
    num_groups, num_rows, num_cols = table.shape
    spacing, rest = divmod(table.stride(0), num_cols)
    if table.stride()[1:] != (num_cols, 1) or rest or spacing < num_rows:
        return table.reshape(-1, num_cols), num_rows
    return table.as_strided(((num_groups - 1) * spacing + num_rows, num_cols), (num_cols, 1)), spacing


def _with_unit_stride(values: torch.Tensor) -> torch.Tensor:
    """The same matrix, copied unless its rows are contiguous and apart from each other."""
    return values if values.stride(-1) == 1 and values.stride(0) >= values.shape[-1] else values.contiguous()


def _rows_and_terms(
    table: torch.Tensor, indices: torch.Tensor, num_terms: int, *, grouped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table as a matrix and the (T * M,) rows of it that the terms use."""
    if not grouped:
        return _with_unit_stride(table), indices.reshape(-1)
    rows, spacing = _rows_of_groups(table)
    return rows, (indices.unsqueeze(1) * spacing + _group_rows(num_terms)).reshape(-1)


def forward(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool) -> torch.Tensor:
    """(T, H) sums; `grouped` tells (U, N, H) tables with (T,) ids from (R, H) tables with (T, M) indices.

    Raises:
        ValueError: an index is out of range.
    """
    num_tokens, num_terms = weights.shape
    if num_tokens == 0 or num_terms == 0:
        return table.new_zeros(num_tokens, table.shape[-1])
    try:
        if grouped and num_tokens == 1 and weights.dtype == table.dtype and table.dtype.itemsize > 2:
            row = int(indices)
            if row >= 0:
                return torch.mm(weights, table[row])
        rows, terms = _rows_and_terms(table, indices, num_terms, grouped=grouped)
        return _bag(rows, terms, _row_starts(num_tokens, num_terms), weights.reshape(-1))
    except (RuntimeError, IndexError):
        # the kernels check every index themselves; only then is the price of finding it paid
        check_range(indices, table.shape[0], "ids" if grouped else "indices")
        raise


def grad_table(
    grad: torch.Tensor, table: torch.Tensor, weights: torch.Tensor, segments: Segments, *, grouped: bool
) -> torch.Tensor:
    """Gradient for the table: for every row one bag over the output gradients that it took part in."""
    num_tokens, num_terms = weights.shape
    if num_tokens == 0 or num_terms == 0:
        return torch.zeros(table.shape, dtype=table.dtype)
    flat = weights.reshape(-1)
    if not grouped:
        tokens = segments.order if num_terms == 1 else segments.order.div(num_terms, rounding_mode="floor")
        return _bag(_with_unit_stride(grad), tokens, segments.offsets, flat[segments.order], closed=True)
    if num_terms == 1:
        result = _bag(_with_unit_stride(grad), segments.order, segments.offsets, flat[segments.order], closed=True)
        return result.view(table.shape)
    # the terms of group g, rows first: row n's share of the segment lies at begin * N + n * length
    begins, lengths = segments.offsets[:-1], segments.offsets.diff()
    rows = _group_rows(num_terms)
    offsets = torch.cat(
        [(begins.unsqueeze(1) * num_terms + lengths.unsqueeze(1) * rows).reshape(-1), segments.offsets[-1:] * num_terms]
    )
    group = torch.repeat_interleave(lengths)
    begin, length = begins[group], lengths[group]
    within = _group_rows(num_tokens) - begin
    places = ((begin * num_terms + within).unsqueeze(1) + length.unsqueeze(1) * rows).reshape(-1)
    tokens = torch.empty(num_tokens * num_terms, dtype=torch.int64)
    tokens[places] = segments.order.repeat_interleave(num_terms)
    factors = torch.empty_like(flat)
    factors[places] = weights[segments.order].reshape(-1)
    return _bag(_with_unit_stride(grad), tokens, offsets, factors, closed=True).view(table.shape)


def grad_weights(
    grad: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool
) -> torch.Tensor:
    """Gradient for the weights: the inner product of every used row with its token's output gradient."""
    num_tokens, num_terms = weights.shape
    num_cols = table.shape[-1]
    if num_tokens == 0 or num_terms == 0:
        return torch.zeros(weights.shape, dtype=weights.dtype)
    rows, terms = _rows_and_terms(table, indices, num_terms, grouped=grouped)
    if weights.dtype == table.dtype or table.dtype.itemsize > 2:
        bags = _group_rows(num_tokens).repeat_interleave(num_terms)
        offsets = _row_starts(num_tokens, num_terms)
        values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.contiguous(), rows, terms, offsets, bags, 0
        )
        return values.view(weights.shape).to(weights.dtype)
    result = torch.empty(weights.shape, dtype=torch.float32)
    step = max(1, _CHUNK_VALUES // (num_terms * num_cols))
    for start in range(0, num_tokens, step):
        part = grad[start : start + step].float().unsqueeze(-1)
        used = terms[start * num_terms : (start + step) * num_terms]
        gathered = rows.index_select(0, used).float().view(len(part), num_terms, num_cols)
        torch.bmm(gathered, part, out=result[start : start + step].unsqueeze(-1))
    return result.to(weights.dtype)
