"""CPU path in C++ (`native_weighted_gather.cpp`), where it has been built: the same functions as the torch path."""

import ctypes
import mmap

import torch

from .reference import accumulation_dtype

TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# up to here a second thread is awake only when the first is through
_SERIAL_VALUES = 2**15
# glibc keeps smaller blocks for the next tensor; larger ones come from the system each time, full of zeros
_MAPPED_BYTES = 2**25


def _threads(num_values: int) -> int:
    return 1 if num_values < _SERIAL_VALUES else torch.get_num_threads()


def _contiguous(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (tensor if tensor.dtype == dtype else tensor.to(dtype)).contiguous()


def _layout(table: torch.Tensor, *, grouped: bool) -> tuple[torch.Tensor, int, int]:
    """The table with contiguous columns, and the values from group to group and from row to row."""
    strides = table.stride()
    if strides[-1] != 1:
        table = table.contiguous()
        strides = table.stride()
    return table, strides[0], strides[1] if grouped else strides[0]


def forward(
    library: ctypes.CDLL, table: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, *, grouped: bool
) -> torch.Tensor | None:
    """(T, H) sums, T and M above 0; None where an index is out of range."""
    num_tokens, num_terms = weights.shape
    table, stride_group, stride_row = _layout(table, grouped=grouped)
    num_cols = table.shape[-1]
    indices, weights = indices.contiguous(), weights.contiguous()
    out = table.new_empty(num_tokens, num_cols)
    failed = library.tenfold_gather(
        TYPES[table.dtype], table.data_ptr(), indices.data_ptr(), TYPES[weights.dtype], weights.data_ptr(),
        out.data_ptr(), num_tokens, num_terms, num_cols, table.shape[0], stride_group, stride_row, grouped,
        _threads(num_tokens * num_terms * num_cols),
    )  # fmt: skip
    return None if failed else out


def grad_weights(
    library: ctypes.CDLL,
    grad: torch.Tensor,
    table: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    grouped: bool,
) -> torch.Tensor:
    """Gradient for the weights, of indices that a forward has checked."""
    num_tokens, num_terms = weights.shape
    table, stride_group, stride_row = _layout(table, grouped=grouped)
    num_cols = table.shape[-1]
    grad, indices = _contiguous(grad, table.dtype), indices.contiguous()
    out = torch.empty(num_tokens, num_terms, dtype=accumulation_dtype(table), device="cpu")
    if library.tenfold_gather_grad_weights(
        TYPES[table.dtype], grad.data_ptr(), table.data_ptr(), indices.data_ptr(), out.data_ptr(),
        num_tokens, num_terms, num_cols, table.shape[0], stride_group, stride_row, grouped,
        _threads(num_tokens * num_terms * num_cols),
    ):  # fmt: skip
        raise RuntimeError("indices changed between forward and backward")
    return out.to(weights.dtype)


def grad_table(
    library: ctypes.CDLL,
    grad: torch.Tensor,
    table: torch.Tensor,
    weights: torch.Tensor,
    order: torch.Tensor,
    offsets: torch.Tensor,
    *,
    grouped: bool,
) -> torch.Tensor:
    """Gradient for the table: of every row the sum over its terms in their order, zeros where there are none."""
    num_terms, num_cols, num_groups = weights.shape[1], table.shape[-1], table.shape[0]
    num_bytes = table.numel() * table.itemsize
    zeroed = num_bytes >= _MAPPED_BYTES and order.numel() <= num_groups // 2
    if zeroed:
        # pages that no row touches are not filled with zeros a second time
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        out = torch.frombuffer(memory, dtype=table.dtype).view(table.shape)
    else:
        out = torch.empty(table.shape, dtype=table.dtype, device="cpu")
    grad, weights = _contiguous(grad, table.dtype), _contiguous(weights, accumulation_dtype(table))
    work = weights.numel() * num_cols + (0 if zeroed else table.numel())
    library.tenfold_gather_grad_table(
        TYPES[table.dtype], grad.data_ptr(), weights.data_ptr(), order.data_ptr(), offsets.data_ptr(), zeroed,
        out.data_ptr(), num_terms, num_cols, num_groups, grouped, _threads(work),
    )  # fmt: skip
    return out


def sort(library: ctypes.CDLL, ids: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Order (T,) and offsets (num_groups + 1,) of int64 ids; None where one is out of range."""
    ids = ids.reshape(-1).contiguous()
    order = torch.empty(ids.numel(), dtype=torch.int64, device="cpu")
    offsets = torch.empty(num_groups + 1, dtype=torch.int64, device="cpu")
    failed = library.tenfold_sort(ids.data_ptr(), ids.numel(), num_groups, order.data_ptr(), offsets.data_ptr())
    return None if failed else (order, offsets)
