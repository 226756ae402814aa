"""Symbol streams to bytes and back: rANS by `constriction`, zstd and LZMA for comparison.

A stream is an array of small integers. With contexts, its symbols are split by a second array that the decoder knows as
well, and each context has its own table. Tables are static and of one byte per symbol; segments and contexts are coded
independently of each other. Nothing here depends on floating-point results that could differ between machines.
"""

import lzma
import struct
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .options import Backend

Symbols = NDArray[np.uint8]

SEGMENT_SYMBOLS = 1 << 22
_RAW, _CONSTANT, _RANS, _ZSTD, _LZMA = range(5)
_PREFIX = struct.Struct("<BBHQ")  # kind, alphabet size - 1, contexts, symbols
# 2**24 * 2**(-i/8): probabilities in steps of an eighth of a bit, as integers so that every machine has the same
_EIGHTHS = np.array([16777216, 15384775, 14107901, 12937002, 11863283, 10878679, 9975792, 9147842], dtype=np.int64)
_ABSENT = 255


def _require(module: str, package: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"ExCP needs the package {package!r} for this: pip install 'tenfold[excp]', or choose backend: lzma"
        ) from error


def require_backend(backend: Backend) -> None:
    """Fails early where the package of a back end is not installed.

    Raises:
        ValueError: names the package and the extra that brings it.
    """
    if backend == "rans":
        _require("constriction", "constriction")
    elif backend == "zstd":
        _require("zstandard", "zstandard")


def entropy_bits(counts: NDArray[Any]) -> float:
    """Order-0 bound: the bits that symbols with these counts need under their own frequencies.

    >>> entropy_bits(np.array([4, 4, 0]))
    8.0
    """
    present = counts[counts > 0].astype(np.float64)
    return float((present * (np.log2(present.sum()) - np.log2(present))).sum()) if len(present) else 0.0


def _table_bytes(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    table = np.full(len(counts), _ABSENT, dtype=np.uint8)
    present = counts > 0
    if present.any():
        steps = np.rint(8 * np.log2(counts.sum() / counts[present]))
        table[present] = np.minimum(steps, _ABSENT - 1).astype(np.uint8)
    return table


def _weights(table: NDArray[np.uint8]) -> NDArray[np.float64]:
    weights = np.maximum(_EIGHTHS[table % 8] >> (table // 8).astype(np.int64), 1)
    return np.where(table == _ABSENT, 0, weights).astype(np.float64)


def joint_counts(symbols: Symbols, context: Symbols | None, alphabet: int, num_contexts: int) -> NDArray[np.int64]:
    """How often each symbol comes in each context, shape (num_contexts, alphabet)."""
    if context is None:
        return np.bincount(symbols, minlength=alphabet).reshape(1, alphabet)
    joint = context.astype(np.uint16) * np.uint16(alphabet)
    joint += symbols
    return np.bincount(joint, minlength=num_contexts * alphabet).reshape(num_contexts, alphabet)


def coded_bits(counts: NDArray[np.int64]) -> float:
    """What a stream with these counts per context takes: entropy, one byte per table entry, chunk heads."""
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.maximum(counts, 1) / np.maximum(totals, 1)
    return float(-(counts * np.log2(shares)).sum()) + 8 * counts.size + 64 * len(counts)


def _segments(length: int, context: Symbols | None, num_contexts: int) -> Iterator[tuple[slice, Any, list[int]]]:
    """Each segment, the order that brings its contexts together, and how many symbols each context has in it."""
    for start in range(0, length, SEGMENT_SYMBOLS):
        where = slice(start, min(start + SEGMENT_SYMBOLS, length))
        if context is None:
            yield where, slice(None), [where.stop - start]
        else:
            part = context[where]
            yield where, np.argsort(part, kind="stable"), np.bincount(part, minlength=num_contexts).tolist()


def _encode_rans(symbols: Symbols, context: Symbols | None, counts: NDArray[np.int64]) -> bytes:
    constriction = _require("constriction", "constriction")
    tables = np.stack([_table_bytes(row) for row in counts])
    # one kind of symbol needs no bits: the table alone tells it
    models = [_model(constriction, table) for table in tables]
    words: list[NDArray[np.uint32]] = []
    for where, order, lengths in _segments(len(symbols), context, len(counts)):
        part = symbols[where][order].astype(np.int32)
        start = 0
        for model, length in zip(models, lengths, strict=True):
            if model is not None and length:
                coder = constriction.stream.stack.AnsCoder()
                coder.encode_reverse(part[start : start + length], model)
                words.append(coder.get_compressed())
            start += length
    sizes = np.array([len(word) for word in words], dtype="<u4")
    return b"".join([tables.tobytes(), sizes.tobytes(), *(word.astype("<u4").tobytes() for word in words)])


def _model(constriction: ModuleType, table: NDArray[np.uint8]) -> Any:
    if np.count_nonzero(table != _ABSENT) < 2:
        return None
    return constriction.stream.model.Categorical(_weights(table), perfect=False)


def _decode_rans(data: memoryview, length: int, alphabet: int, num_contexts: int, context: Symbols | None) -> Symbols:
    constriction = _require("constriction", "constriction")
    tables = np.frombuffer(data, np.uint8, num_contexts * alphabet).reshape(num_contexts, alphabet)
    models = [_model(constriction, table) for table in tables]
    segments = list(_segments(length, context, num_contexts))
    num_words = sum(
        model is not None and count > 0
        for *_, lengths in segments
        for model, count in zip(models, lengths, strict=True)
    )
    sizes = np.frombuffer(data, "<u4", num_words, tables.size)
    words = np.frombuffer(data, "<u4", -1, tables.size + sizes.nbytes).astype(np.uint32)
    if int(sizes.sum()) != len(words):
        raise ValueError(f"ExCP stream is damaged: {len(words)} words where {int(sizes.sum())} were due")
    ends = np.cumsum(sizes).tolist()
    symbols = np.empty(length, dtype=np.uint8)
    taken = 0
    for where, order, lengths in segments:
        parts = []
        for table, model, count in zip(tables, models, lengths, strict=True):
            if model is None:
                parts.append(np.full(count, int(np.argmax(table != _ABSENT)), dtype=np.int32))
            elif count:
                coder = constriction.stream.stack.AnsCoder(words[ends[taken] - sizes[taken] : ends[taken]])
                parts.append(coder.decode(model, count))
                taken += 1
        symbols[where][order] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return symbols


def _pack(symbols: Symbols, alphabet: int) -> bytes:
    """Two symbols in one byte where they fit, the first in the high half (section 3.4 of the paper)."""
    if alphabet > 16:
        return symbols.tobytes()
    even = symbols if len(symbols) % 2 == 0 else np.append(symbols, np.uint8(0))
    return ((even[0::2] << 4) | even[1::2]).tobytes()


def _unpack(data: bytes, length: int, alphabet: int) -> Symbols:
    packed = np.frombuffer(data, np.uint8)
    if alphabet > 16:
        return packed.copy()
    symbols = np.empty(2 * len(packed), dtype=np.uint8)
    symbols[0::2], symbols[1::2] = packed >> 4, packed & 15
    return symbols[:length]


def encode_symbols(
    symbols: Symbols,
    *,
    alphabet: int,
    backend: Backend = "rans",
    context: Symbols | None = None,
    num_contexts: int = 1,
    counts: NDArray[np.int64] | None = None,
) -> bytes:
    """Bytes from which `decode_symbols` gives the same symbols.

    Args:
        symbols: integers below `alphabet`, any shape; coded in row-major order.
        alphabet: number of different symbols, up to 256.
        backend: `rans`, `zstd` or `lzma`; the last two know no contexts and pack two symbols of up to 4 bits per byte.
        context: integers below `num_contexts`, one per symbol, which the decoder knows.
        num_contexts: number of contexts.
        counts: `joint_counts` of the arguments where the caller has them.

    Raises:
        ValueError: the package of the back end is not installed.
    """
    flat = symbols.reshape(-1)
    if backend != "rans":
        context, num_contexts = None, 1
    elif counts is None:
        counts = joint_counts(flat, context, alphabet, num_contexts)

    def prefix(kind: int) -> bytes:
        return _PREFIX.pack(kind, alphabet - 1, num_contexts, len(flat))

    if not len(flat) or (flat == flat[0]).all():
        return prefix(_CONSTANT) + bytes(flat[:1])
    if backend == "rans":
        assert counts is not None
        bits_per_symbol = 4 if alphabet <= 16 else 8
        if coded_bits(counts) >= 0.995 * bits_per_symbol * len(flat):
            return prefix(_RAW) + _pack(flat, alphabet)
        return prefix(_RANS) + _encode_rans(flat, context, counts)
    packed = _pack(flat, alphabet)
    if backend == "zstd":
        # one thread: with more, the output would depend on their number
        kind, body = _ZSTD, _require("zstandard", "zstandard").ZstdCompressor(level=9).compress(packed)
    else:
        kind, body = _LZMA, lzma.compress(packed, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, preset=6)
    return prefix(_RAW) + packed if len(body) >= len(packed) else prefix(kind) + body


def decode_symbols(data: bytes | memoryview, *, context: Symbols | None = None) -> Symbols:
    """The symbols of `encode_symbols`, flat; `context` as it was there.

    Raises:
        ValueError: the bytes are not a stream of this kind, or a package is not installed.
    """
    view = memoryview(data)
    try:
        kind, largest, num_contexts, length = _PREFIX.unpack_from(view)
        body = view[_PREFIX.size :]
        if kind == _CONSTANT:
            return np.full(length, body[0] if length else 0, dtype=np.uint8)
        if kind == _RAW:
            symbols = _unpack(bytes(body), length, largest + 1)
        elif kind == _RANS:
            symbols = _decode_rans(body, length, largest + 1, num_contexts, context if num_contexts > 1 else None)
        elif kind == _ZSTD:
            zstandard = _require("zstandard", "zstandard")
            try:
                packed = zstandard.ZstdDecompressor().decompress(bytes(body))
            except zstandard.ZstdError as error:
                raise ValueError(str(error)) from error
            symbols = _unpack(packed, length, largest + 1)
        elif kind == _LZMA:
            symbols = _unpack(lzma.decompress(bytes(body)), length, largest + 1)
        else:
            raise ValueError(f"unknown kind {kind}")
    except (struct.error, IndexError, lzma.LZMAError) as error:
        raise ValueError(f"ExCP stream is damaged: {error}") from error
    if len(symbols) != length:
        raise ValueError(f"ExCP stream is damaged: {len(symbols)} symbols where {length} were due")
    return symbols
