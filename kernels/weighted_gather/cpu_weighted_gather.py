"""CPU path: C++ where it has been built, else `embedding_bag`'s vectorised kernels, fed so that the table streams once.

README.md says what else was measured and why this won.
"""

import torch

from ..native_build import cpu_kernels
from . import native_weighted_gather
from .segments import Segments, check_range

# values gathered at a time where a gradient needs float32 copies of 16-bit rows: 4 MiB, inside a core's cache
_CHUNK_VALUES = 2**20
# up to here torch gathers on the calling thread, which is faster than waking the others
_SERIAL_VALUES = 2**15
_CACHED_BAGS = 64
# from here on, bags of wide rows are cut into pieces of this many columns at most: the kernel keeps about 448 sums in
# registers, and walks through a bag of wider rows several times, which is slower than several bags. In bags of few
# terms, the larger number of indices takes back what that gains
_PIECES_FROM_VALUES = 2**22
_PIECES_FROM_TERMS = 8
_PIECE_COLUMNS = 256
_STARTS: dict[tuple[int, int], torch.Tensor] = {}


def _bag_starts(num_bags: int, bag_terms: int) -> torch.Tensor:
    """Where equal bags begin; kept for small numbers of bags, where making them is a tenth of the call."""
    starts = _STARTS.get((num_bags, bag_terms))
    if starts is None:
        with torch.inference_mode(False):
            starts = torch.arange(0, num_bags * bag_terms, bag_terms, device="cpu")
        # what a tracer hands out may not outlive it
        if num_bags <= _CACHED_BAGS and type(starts) is torch.Tensor:
            _STARTS[num_bags, bag_terms] = starts
    return starts


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


def _num_pieces(num_tokens: int, num_terms: int, num_cols: int) -> int:
    """Pieces of equal width, a multiple of 16 columns, that rows are cut into; 1 where that is not worth it."""
    if num_terms < _PIECES_FROM_TERMS or num_tokens * num_terms * num_cols < _PIECES_FROM_VALUES:
        return 1
    counts = range(1, num_cols // 16 + 1)
    fits = (n for n in counts if num_cols % (16 * n) == 0 and num_cols <= n * _PIECE_COLUMNS)
    return next(fits, 1)


def _bag_in_pieces(table: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """`_bag` with T bags of M terms, the columns of each in pieces: (T, M) weights, (T * M,) rows, out (T, H)."""
    num_tokens, num_terms = weights.shape
    shape = (num_tokens, num_pieces, num_terms)
    pieces = _bag_starts(num_pieces, 1).view(1, -1, 1)
    parts = torch.add(pieces, rows.view(num_tokens, 1, num_terms), alpha=num_pieces)
    offsets = _bag_starts(num_tokens * num_pieces, num_terms)
    factors = weights.unsqueeze(1).expand(shape).reshape(-1)
    out = _bag(table.view(-1, table.shape[1] // num_pieces), parts.view(-1), offsets, factors)
    return out.view(num_tokens, -1)


def _rows_of_groups(table: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(U, N, H) as rows (R, H) without a copy where groups are evenly spaced, and the rows from group to group.

    A layer's slice of a table [vocabulary, layer, expert, hidden] is such a case.
    """
    num_groups, num_rows, num_cols = table.shape
    if table.is_contiguous():
        return table.flatten(0, 1), num_rows
    spacing, rest = divmod(table.stride(0), num_cols)
    if table.stride()[1:] != (num_cols, 1) or rest or spacing < num_rows:
        return table.reshape(-1, num_cols), num_rows
    return table.as_strided(((num_groups - 1) * spacing + num_rows, num_cols), (num_cols, 1)), spacing


def _rows_and_terms(
    table: torch.Tensor, indices: torch.Tensor, num_terms: int, *, grouped: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The table as a matrix and the (T * M,) rows of it that the terms use."""
    if not grouped:
        return table, indices.reshape(-1)
    rows, spacing = _rows_of_groups(table)
    return rows, torch.add(_bag_starts(num_terms, 1), indices.unsqueeze(1), alpha=spacing).view(-1)


def forward(table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool) -> torch.Tensor:
    """(T, H) sums; `grouped` tells (U, N, H) tables with (T,) ids from (R, H) tables with (T, M) indices.

    Raises:
        ValueError: an index is out of range.
    """
    num_tokens, num_terms = weights.shape
    if num_tokens == 0 or num_terms == 0:
        return table.new_zeros(num_tokens, table.shape[-1])
    if (library := cpu_kernels()) is not None:
        out = native_weighted_gather.forward(library, table, indices, weights, grouped=grouped)
        if out is None:
            check_range(indices, table.shape[0], "ids" if grouped else "indices")
            raise AssertionError("the kernel refused indices that are in range")
        return out
    try:
        if weights.dtype == table.dtype and table.dtype.itemsize > 2:
            # products instead of bags: for a few tokens the number of calls is the cost
            if grouped and num_tokens == 1 and (row := int(indices)) >= 0:
                return torch.mm(weights, table[row])
            if num_tokens * num_terms * table.shape[-1] < _SERIAL_VALUES:
                if grouped:
                    return torch.bmm(weights.unsqueeze(1), table.index_select(0, indices)).squeeze(1)
                if num_tokens == 1:
                    return torch.mm(weights, table.index_select(0, indices.reshape(-1)))
        rows, terms = _rows_and_terms(table, indices, num_terms, grouped=grouped)
        pieces = _num_pieces(num_tokens, num_terms, table.shape[-1])
        if pieces > 1 and rows.stride() == (rows.shape[1], 1):
            return _bag_in_pieces(rows, terms, weights, pieces)
        return _bag(rows, terms, _bag_starts(num_tokens, num_terms), weights.reshape(-1))
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
        return torch.zeros(table.shape, dtype=table.dtype, device="cpu")
    if (library := cpu_kernels()) is not None:
        return native_weighted_gather.grad_table(
            library, grad, table, weights, segments.order, segments.offsets, grouped=grouped
        )
    positions, offsets = segments.by_row(num_terms if grouped else 1)
    tokens = positions if num_terms == 1 else positions.div(num_terms, rounding_mode="floor")
    factors = weights.reshape(-1).index_select(0, positions)
    return _bag(grad.contiguous(), tokens, offsets, factors, closed=True).view(table.shape)


def grad_weights(
    grad: torch.Tensor, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool
) -> torch.Tensor:
    """Gradient for the weights: the inner product of every used row with its token's output gradient."""
    num_tokens, num_terms = weights.shape
    num_cols = table.shape[-1]
    if num_tokens == 0 or num_terms == 0:
        return torch.zeros(weights.shape, dtype=weights.dtype, device="cpu")
    if (library := cpu_kernels()) is not None:
        return native_weighted_gather.grad_weights(library, grad, table, indices, weights, grouped=grouped)
    rows, terms = _rows_and_terms(table, indices, num_terms, grouped=grouped)
    if weights.dtype == table.dtype or table.dtype.itemsize > 2:
        bags = _bag_starts(num_tokens, 1).unsqueeze(1).expand(weights.shape).reshape(-1).contiguous()
        offsets = _bag_starts(num_tokens, num_terms)
        values = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.contiguous(), rows, terms, offsets, bags, 0
        )
        return values.view(weights.shape).to(weights.dtype)
    result = torch.empty(weights.shape, dtype=torch.float32, device="cpu")
    step = max(1, _CHUNK_VALUES // (num_terms * num_cols))
    for start in range(0, num_tokens, step):
        part = grad[start : start + step].float().unsqueeze(-1)
        used = terms[start * num_terms : (start + step) * num_terms]
        gathered = rows.index_select(0, used).float().view(len(part), num_terms, num_cols)
        torch.bmm(gathered, part, out=result[start : start + step].unsqueeze(-1))
    return result.to(weights.dtype)
