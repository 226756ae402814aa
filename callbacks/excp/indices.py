"""Streams of level indices: which elements are not zero, four to a symbol, and the levels of those that are not.

Both are coded with whichever contexts make them smallest. Splitting them leaves a decoder a quarter of a symbol for
each zero, and the four bits of a symbol tell what neighbours have in common. Short ones stay in one stream where its
fewer tables make that smaller.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .entropy import coded_bits, decode_symbols, encode_symbols, entropy_bits, joint_counts
from .lookup import look_up
from .options import Backend

Indices = NDArray[np.uint8]
NUM_CLASSES = 5
NUM_ROW_CLASSES = 8
INDEX_STREAMS = ("indices", "mask", "levels", "rows")
_SHORTEST_ROW = 32
_SHORT = 1 << 17
_GROUP = 4
# weight of a class in a group's context: zero, far, near, near, far
_CLASS_WEIGHTS = np.array([0, 2, 1, 1, 2], dtype=np.uint8)
_NUM_GROUP_CLASSES = 2 * _GROUP + 1


def level_classes(indices: Indices, codebook: NDArray[np.float32]) -> Indices:
    """Coarse class of each index: 0 zero, 1 and 2 far and near below, 3 and 4 near and far above zero."""
    classes = np.zeros(256, dtype=np.uint8)
    for sign, near, far in ((-1, 2, 1), (1, 3, 4)):
        side = np.flatnonzero(codebook * sign > 0)
        if len(side):
            classes[side] = far
            classes[side[np.argmin(np.abs(codebook[side]))]] = near
    return look_up(classes, indices)


def row_length(shape: tuple[int, ...]) -> int:
    """Elements that share the first index; 0 where rows are too short or too few to be told apart."""
    length = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    return length if length >= _SHORTEST_ROW and length % _GROUP == 0 and shape[0] > 1 else 0


def row_classes(filled: NDArray[np.int64]) -> Indices:
    """Class of each row by how many of its indices are not zero, in half octaves around the mean."""
    mean = max(filled.mean(dtype=np.float64), 1e-9)
    octaves = np.rint(2 * np.log2(np.maximum(filled, 1) / mean)).astype(np.int64)
    return np.where(filled == 0, 0, np.clip(octaves + 4, 1, NUM_ROW_CLASSES - 1)).astype(np.uint8)


def _groups(mask: NDArray[np.bool_]) -> Indices:
    """Four bits to a symbol, the first in the highest; zeros at the end where they are not enough."""
    packed = np.packbits(mask)
    symbols = np.empty(2 * len(packed), dtype=np.uint8)
    symbols[0::2], symbols[1::2] = packed >> 4, packed & 15
    return symbols[: -(-len(mask) // _GROUP)]


def _ungroup(symbols: Indices, length: int) -> NDArray[np.bool_]:
    if len(symbols) != -(-length // _GROUP):
        raise ValueError(f"ExCP stream is damaged: {len(symbols)} groups where {-(-length // _GROUP)} were due")
    even = symbols if len(symbols) % 2 == 0 else np.append(symbols, np.uint8(0))
    return np.unpackbits((even[0::2] << np.uint8(4)) | even[1::2], count=length).view(np.bool_)


def _group_classes(classes: Indices) -> Indices:
    """How much of each group of four was not zero before, 0 to 8."""
    weights = look_up(_CLASS_WEIGHTS, classes)
    if len(weights) % _GROUP:
        weights = np.append(weights, np.zeros(-len(weights) % _GROUP, np.uint8))
    words = weights.view(np.uint32)
    return ((words + (words >> 8) + (words >> 16) + (words >> 24)) & 0xFF).astype(np.uint8)


class _Contexts:
    """What is known of each symbol of a stream: class of its row, class of itself.

    Args:
        rows: class of each symbol's row, shape (symbols,), if any.
        classes: class of each symbol, shape (symbols,), if any.
        num_classes: how many of the latter there are.
    """

    def __init__(self, rows: Indices | None, classes: Indices | None, num_classes: int) -> None:
        self.rows, self.classes, self.num_classes = rows, classes, num_classes

    def named(self, name: str) -> tuple[Indices | None, int]:
        """Context of each symbol, and how many there are."""
        if ("rows" in name and self.rows is None) or ("classes" in name and self.classes is None):
            raise ValueError("ExCP stream needs the previous save's indices; decode the chain from its key frame")
        if name == "rows+classes":
            assert self.rows is not None
            assert self.classes is not None
            return self.rows * np.uint8(self.num_classes) + self.classes, NUM_ROW_CLASSES * self.num_classes
        if name == "rows":
            return self.rows, NUM_ROW_CLASSES
        return (self.classes, self.num_classes) if name == "classes" else (None, 1)

    def smallest(self, symbols: Indices, alphabet: int, row_bits: float) -> tuple[bytes, str]:
        """The stream with the contexts that make it smallest, and their name; `row_bits` is what rows cost."""
        finest = "+".join(name for name, given in (("rows", self.rows), ("classes", self.classes)) if given is not None)
        context, num_contexts = self.named(finest)
        counts = joint_counts(symbols, context, alphabet, num_contexts)
        cube = counts.reshape(
            NUM_ROW_CLASSES if self.rows is not None else 1,
            self.num_classes if self.classes is not None else 1,
            alphabet,
        )
        tables = {"none": cube.sum((0, 1))[None]}
        if self.classes is not None:
            tables["classes"] = cube.sum(0)
        if self.rows is not None:
            tables["rows"] = cube.sum(1)
            if self.classes is not None:
                tables["rows+classes"] = counts
        bits = {name: coded_bits(table) + (row_bits if "rows" in name else 0) for name, table in tables.items()}
        best = min(bits, key=lambda name: (bits[name], name))
        if best != finest:
            context, num_contexts = self.named(best)
        stream = encode_symbols(
            symbols, alphabet=alphabet, context=context, num_contexts=num_contexts, counts=tables[best]
        )
        return stream, best


def encode_indices(
    indices: Indices,
    *,
    alphabet: int,
    backend: Backend,
    classes: Indices | None = None,
    row: int = 0,
    kept: NDArray[np.int64] | None = None,
) -> tuple[dict[str, bytes], str, float]:
    """Streams of indices, the contexts chosen, and the order-0 bound in bits.

    Args:
        indices: below `alphabet`, shape (n,).
        alphabet: number of different indices.
        backend: see `ExCPOptions`; with others than `rans` there is one stream without contexts.
        classes: `level_classes` of something that the decoder knows, shape (n,).
        row: elements of a row, to try classes of rows; 0 not to.
        kept: positions of the indices that are not zero, where the caller has them.

    Returns:
        the streams by name (those of `INDEX_STREAMS` that there are), the names of the contexts of mask and levels
        ("none", "classes", "rows" or "rows+classes", with a stroke between them; one name for one stream), bits.
    """
    if backend != "rans" or not len(indices):
        bound = entropy_bits(np.bincount(indices, minlength=alphabet).astype(np.int64))
        return {"indices": encode_symbols(indices, alphabet=alphabet, backend=backend)}, "none", bound
    mask = indices != 0
    places = np.flatnonzero(mask) if kept is None else kept
    levels = indices.take(places, mode="clip") - np.uint8(1)
    counts = np.bincount(levels, minlength=alphabet - 1).astype(np.int64)
    bound = entropy_bits(np.append(counts, len(indices) - len(places)))
    mask_rows = level_rows = None
    streams: dict[str, bytes] = {}
    rows_stream = b""
    if row:
        filled = np.count_nonzero(mask.reshape(-1, row), axis=1)
        kinds = row_classes(filled)
        rows_stream = encode_symbols(kinds, alphabet=NUM_ROW_CLASSES)
        mask_rows, level_rows = np.repeat(kinds, row // _GROUP), np.repeat(kinds, filled)
    known = None if classes is None else _group_classes(classes)
    contexts = _Contexts(mask_rows, known, _NUM_GROUP_CLASSES)
    streams["mask"], of_mask = contexts.smallest(_groups(mask), 1 << _GROUP, 8.0 * len(rows_stream))
    known = None if classes is None else classes.take(places, mode="clip")
    contexts = _Contexts(level_rows, known, NUM_CLASSES)
    row_bits = 0.0 if "rows" in of_mask else 8.0 * len(rows_stream)
    streams["levels"], of_levels = contexts.smallest(levels, max(alphabet - 1, 1), row_bits)
    if "rows" in of_mask or "rows" in of_levels:
        streams["rows"] = rows_stream
    if len(indices) < _SHORT:
        rows = np.repeat(kinds, row) if row else None
        whole, of_all = _Contexts(rows, classes, NUM_CLASSES).smallest(indices, alphabet, 8.0 * len(rows_stream))
        single = {"indices": whole} | ({"rows": rows_stream} if "rows" in of_all else {})
        if sum(map(len, single.values())) <= sum(map(len, streams.values())):
            return single, of_all, bound
    return streams, f"{of_mask}/{of_levels}", bound


def decode_indices(
    streams: Mapping[str, memoryview], context: str, *, length: int, classes: Indices | None = None, row: int = 0
) -> Indices:
    """Indices of `encode_indices`; `classes` and `row` as they were there.

    Raises:
        ValueError: the streams do not fit together, or are not of `length` indices.
    """
    kinds = decode_symbols(streams["rows"]) if "rows" in streams else None
    if "indices" in streams:
        rows = None if kinds is None else np.repeat(kinds, row)
        chosen, _ = _Contexts(rows, classes, NUM_CLASSES).named(context)
        indices = decode_symbols(streams["indices"], context=chosen)
        if len(indices) != length:
            raise ValueError(f"ExCP stream is damaged: {len(indices)} elements where {length} were due")
        return indices
    of_mask, of_levels = context.split("/")
    rows = None if kinds is None else np.repeat(kinds, row // _GROUP)
    known = _group_classes(classes) if classes is not None and "classes" in of_mask else None
    chosen, _ = _Contexts(rows, known, _NUM_GROUP_CLASSES).named(of_mask)
    mask = _ungroup(decode_symbols(streams["mask"], context=chosen), length)
    places = np.flatnonzero(mask)
    if kinds is not None and "rows" in of_levels:
        rows = np.repeat(kinds, np.count_nonzero(mask.reshape(-1, row), axis=1))
    known = classes.take(places, mode="clip") if classes is not None and "classes" in of_levels else None
    chosen, _ = _Contexts(rows, known, NUM_CLASSES).named(of_levels)
    levels = decode_symbols(streams["levels"], context=chosen)
    if len(levels) != len(places):
        raise ValueError(f"ExCP stream is damaged: {len(levels)} levels where {len(places)} were due")
    indices = np.zeros(length, dtype=np.uint8)
    indices[places] = levels + np.uint8(1)
    return indices
