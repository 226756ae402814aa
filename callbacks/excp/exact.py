"""Tensors stored bit for bit: bytes of equal weight together, the exponents entropy coded."""

import struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .entropy import decode_symbols, encode_symbols
from .options import Backend

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
    )
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The values' bytes in row-major order; shares memory with a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)


def from_bytes(data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `tensor_bytes`; the tensor owns its memory."""
    values = torch.empty(shape, dtype=dtype)
    if values.numel():
        values.reshape(-1).view(torch.uint8).numpy()[:] = data
    return values


def _rotate(data: NDArray[np.uint8], itemsize: int, *, left: bool) -> NDArray[np.uint8]:
    # the sign moves behind the mantissa, so that the first byte is the exponent alone
    integer = np.dtype(f"<u{itemsize}")
    words, top = data.view(integer), 8 * itemsize - 1
    turned = (words << 1) | (words >> top) if left else (words >> 1) | (words << top)
    return turned.view(np.uint8)


def encode_exact(tensor: Tensor, *, backend: Backend) -> bytes:
    """Bytes from which `decode_exact` gives the same tensor, NaN payloads and signed zeros included."""
    size = tensor.element_size()
    data = tensor_bytes(tensor)
    if tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        data = _rotate(data, size, left=True)
    planes = [encode_symbols(np.ascontiguousarray(data[i::size]), alphabet=256, backend=backend) for i in range(size)]
    return b"".join([*(struct.pack("<Q", len(plane)) for plane in planes), *planes])


def decode_exact(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of `encode_exact`.

    Raises:
        ValueError: the bytes are not such a tensor.
    """
    size = torch.empty((), dtype=dtype).element_size()
    values = torch.empty(shape, dtype=dtype)
    joined = np.empty(values.numel() * size, dtype=np.uint8)
    try:
        lengths = struct.unpack_from(f"<{size}Q", data)
    except struct.error as error:
        raise ValueError(f"ExCP stream is damaged: {error}") from error
    offset = 8 * size
    for plane, length in enumerate(lengths):
        symbols = decode_symbols(memoryview(data)[offset : offset + length])
        if len(symbols) != values.numel():
            raise ValueError(f"ExCP stream is damaged: {len(symbols)} elements where {values.numel()} were due")
        joined[plane::size] = symbols
        offset += length
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        joined = _rotate(joined, size, left=False)
    return from_bytes(joined, dtype, shape)
