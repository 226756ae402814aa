"""Streams of level indices: coded with whichever context makes them smallest."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .entropy import coded_bits, decode_symbols, encode_symbols, entropy_bits, joint_counts
from .options import Backend

Indices = NDArray[np.uint8]
NUM_CLASSES = 5
NUM_ROW_CLASSES = 8
_SHORTEST_ROW = 32


def level_classes(indices: Indices, codebook: NDArray[np.float32]) -> Indices:
    """Coarse class of each index: 0 zero, 1 and 2 far and near below, 3 and 4 near and far above zero."""
    classes = np.zeros(256, dtype=np.uint8)
    for sign, near, far in ((-1, 2, 1), (1, 3, 4)):
        side = np.flatnonzero(codebook * sign > 0)
        if len(side):
            classes[side] = far
            classes[side[np.argmin(np.abs(codebook[side]))]] = near
    return classes.take(indices, mode="clip")


def row_length(shape: tuple[int, ...]) -> int:
    """Elements that share the first index; 0 where rows are too short or too few to be told apart."""
    length = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    return length if length >= _SHORTEST_ROW and shape[0] > 1 else 0


def row_classes(indices: Indices, length: int) -> Indices:
    """Class of each row by how many of its indices are not zero, in half octaves around the mean."""
    filled = (indices.reshape(-1, length) != 0).sum(axis=1)
    mean = max(filled.mean(dtype=np.float64), 1e-9)
    octaves = np.rint(2 * np.log2(np.maximum(filled, 1) / mean)).astype(np.int64)
    return np.where(filled == 0, 0, np.clip(octaves + 4, 1, NUM_ROW_CLASSES - 1)).astype(np.uint8)


def encode_indices(
    indices: Indices,
    *,
    alphabet: int,
    backend: Backend,
    classes: Indices | None = None,
    row: int = 0,
) -> tuple[dict[str, bytes], str, float]:
    """Streams of indices, the context chosen, and the order-0 bound in bits.

    Args:
        indices: below `alphabet`, shape (n,).
        alphabet: number of different indices.
        backend: see `ExCPOptions`; contexts are tried with `rans` only.
        classes: `level_classes` of something that the decoder knows, shape (n,).
        row: elements of a row, to try classes of rows; 0 not to.

    Returns:
        the streams by name ("indices", and "rows" where rows have classes), the name of the context
        ("none", "classes", "rows" or "rows+classes"), bits.
    """
    plain = np.bincount(indices, minlength=alphabet).astype(np.int64)
    bound = entropy_bits(plain)
    if backend != "rans" or (classes is None and not row) or not len(indices):
        return {"indices": encode_symbols(indices, alphabet=alphabet, backend=backend)}, "none", bound
    rows = row_classes(indices, row) if row else np.zeros(1, np.uint8)
    rows_stream = encode_symbols(rows, alphabet=NUM_ROW_CLASSES, backend=backend) if row else b""
    spread = np.repeat(rows, row) if row else None
    context, num_contexts = _product(spread, classes)
    counts = joint_counts(indices, context, alphabet, num_contexts)
    cube = counts.reshape(NUM_ROW_CLASSES if row else 1, NUM_CLASSES if classes is not None else 1, alphabet)
    candidates = {"none": cube.sum((0, 1))[None]}
    if classes is not None:
        candidates["classes"] = cube.sum(0)
    if row:
        candidates["rows"] = cube.sum(1)
        if classes is not None:
            candidates["rows+classes"] = counts
    bits = {
        name: coded_bits(table) + (8 * len(rows_stream) if "rows" in name else 0) for name, table in candidates.items()
    }
    best = min(bits, key=lambda name: (bits[name], name))
    chosen = {"none": None, "classes": classes, "rows": spread, "rows+classes": context}[best]
    table = candidates[best]
    stream = encode_symbols(
        indices, alphabet=alphabet, backend=backend, context=chosen, num_contexts=len(table), counts=table
    )
    return {"indices": stream} | ({"rows": rows_stream} if "rows" in best else {}), best, bound


def _product(spread: Indices | None, classes: Indices | None) -> tuple[Indices, int]:
    if spread is None:
        assert classes is not None
        return classes, NUM_CLASSES
    if classes is None:
        return spread, NUM_ROW_CLASSES
    return spread * np.uint8(NUM_CLASSES) + classes, NUM_ROW_CLASSES * NUM_CLASSES


def decode_indices(
    streams: Mapping[str, memoryview], context: str, *, classes: Indices | None = None, row: int = 0
) -> Indices:
    """Indices of `encode_indices`; `classes` and `row` as they were there.

    Raises:
        ValueError: the streams do not fit together.
    """
    spread = np.repeat(decode_symbols(streams["rows"]), row) if "rows" in context else None
    if "classes" in context and classes is None:
        raise ValueError("ExCP stream needs the previous save's indices; decode the chain from its key frame")
    known = {
        "none": None,
        "classes": classes,
        "rows": spread,
        "rows+classes": _product(spread, classes)[0] if spread is not None and classes is not None else None,
    }
    return decode_symbols(streams["indices"], context=known[context])
