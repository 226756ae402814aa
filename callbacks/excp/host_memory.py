"""Copying and comparing tensors in host memory, at the speed of the C library.

torch reads the target's lines before it writes them, and compares element by element; the library does neither, and is
nearly twice as fast on states too large for the caches. Training waits for both.
"""

import ctypes

import torch
from torch import Tensor

# smaller ones are not worth the way around torch
_MIN_BYTES = 1 << 16


def _memcmp() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(None).memcmp
    except (TypeError, OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_int
    return function


_MEMCMP = _memcmp()


def _plain(tensor: Tensor, num_bytes: int) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous() and num_bytes >= _MIN_BYTES


def copy_to_host(source: Tensor, target: Tensor) -> None:
    """Copies a tensor into one of the same shape and type on the CPU; from a GPU without waiting for it."""
    num_bytes = source.numel() * source.element_size()
    if _plain(source, num_bytes) and target.is_contiguous():
        ctypes.memmove(target.data_ptr(), source.data_ptr(), num_bytes)
    else:
        target.copy_(source.detach(), non_blocking=source.is_cuda)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits; NaN equals itself."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    one, other = (tensor.detach().cpu().contiguous() for tensor in (first, second))
    num_bytes = one.numel() * one.element_size()
    if _MEMCMP is not None and num_bytes >= _MIN_BYTES:
        return _MEMCMP(one.data_ptr(), other.data_ptr(), num_bytes) == 0
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
