"""Lossless peers of the ExCP benchmark: general compressors, alone, after byte shuffling, and on differences of saves.

The slow ones see a sample: the head of every tensor, the same share of each, so that a save of 1.6 GB takes seconds.
"""

import importlib.util
import io
import lzma
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ...callbacks.excp.tree import tensors_of

Words = NDArray[np.uint32]
LZMA_SAMPLE_BYTES = 16 << 20
SAMPLE_BYTES = 128 << 20


class Coded(NamedTuple):
    """What a peer made of a sample: bytes in and out, CPU seconds to encode and decode."""

    raw_bytes: int
    coded_bytes: int
    encode_s: float
    decode_s: float


def words_of(checkpoint: dict[str, Any], largest_bytes: int) -> Words:
    """The head of each float32 tensor as one array of at most about `largest_bytes`; shared memory counts once."""
    tensors = {
        (tensor.data_ptr(), tensor.shape): tensor
        for _, tensor in tensors_of(checkpoint)
        if tensor.dtype == torch.float32 and tensor.numel() > 1
    }
    total = 4 * sum(tensor.numel() for tensor in tensors.values())
    share = min(1.0, largest_bytes / total)
    heads = [tensor.reshape(-1)[: int(tensor.numel() * share)] for tensor in tensors.values()]
    return torch.cat(heads).numpy().view(np.uint32)


def shuffle(words: Words) -> bytes:
    """All first bytes, then all second bytes, and so on."""
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4).T).tobytes()


def unshuffle(data: bytes) -> Words:
    """Inverse of `shuffle`."""
    return np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(4, -1).T).reshape(-1).view(np.uint32)


def _time(
    words: Words, encode: Callable[[Words], Any], decode: Callable[[Any], Words], size: Callable[[Any], int]
) -> Coded:
    start = time.process_time()
    coded = encode(words)
    middle = time.process_time()
    back = decode(coded)
    end = time.process_time()
    if not np.array_equal(back, words):
        raise RuntimeError("a lossless peer did not give back what it was given")
    return Coded(words.nbytes, size(coded), middle - start, end - middle)


def code_all(checkpoint: dict[str, Any], previous: dict[str, Any]) -> tuple[dict[str, Coded], dict[str, str]]:
    """Every lossless peer on a save, and for those that are not here the reason."""
    results: dict[str, Coded] = {}
    missing: dict[str, str] = {}
    small = words_of(checkpoint, LZMA_SAMPLE_BYTES)
    results["lzma"] = _time(
        small,
        lambda words: lzma.compress(words.tobytes(), preset=6),
        lambda data: np.frombuffer(lzma.decompress(data), np.uint32),
        len,
    )
    words, before = words_of(checkpoint, SAMPLE_BYTES), words_of(previous, SAMPLE_BYTES)
    try:
        import zstandard
    except ImportError:
        missing |= dict.fromkeys(("zstd", "shuffle_zstd", "xor_shuffle_zstd"), "zstandard is not installed")
    else:
        pack, unpack = zstandard.ZstdCompressor(level=3).compress, zstandard.ZstdDecompressor().decompress
        results["zstd"] = _time(
            words, lambda x: pack(x.tobytes()), lambda data: np.frombuffer(unpack(data), np.uint32), len
        )
        results["shuffle_zstd"] = _time(words, lambda x: pack(shuffle(x)), lambda data: unshuffle(unpack(data)), len)
        results["xor_shuffle_zstd"] = _time(
            words, lambda x: pack(shuffle(x ^ before)), lambda data: unshuffle(unpack(data)) ^ before, len
        )
    if importlib.util.find_spec("zipnn") is None:
        missing["zipnn"] = "zipnn is not installed"
    else:
        from zipnn import ZipNN

        coder = ZipNN(bytearray_dtype="float32", threads=1)
        results["zipnn"] = _time(
            words,
            lambda x: coder.compress(bytearray(x.tobytes())),
            lambda data: np.frombuffer(coder.decompress(data), np.uint32),
            len,
        )
    return results, missing


def torch_save(checkpoint: dict[str, Any]) -> Coded:
    """torch.save into memory and back."""
    start = time.process_time()
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    middle = time.process_time()
    buffer.seek(0)
    torch.load(buffer, weights_only=True)
    size = buffer.getbuffer().nbytes
    return Coded(size, size, middle - start, time.process_time() - middle)
