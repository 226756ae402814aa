"""Adam's second moment: row and column means, levels in the logarithm, or only where the first moment is kept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adam import AdamRule, update_ceiling
from .entropy import decode_symbols, encode_symbols
from .exact import decode_exact, encode_exact
from .histogram import Float32, Histogram
from .indices import Indices, decode_indices, encode_indices, row_length
from .lookup import look_up, squared_norm
from .options import Backend, ExCPOptions
from .quantiser import choose_quantiser
from .weights import CodedTensor, as_float32, side_bits

# more exceptions than this and coding every entry is smaller
_MOST_EXCEPTIONS = 0.05
_MOST_FACTORS = 0.125
_LARGEST_QUANTILE = 0.99


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The two factors of a shape, cut between two dimensions, with the smallest sum.

    >>> matrix_shape((8, 64, 32)), matrix_shape((64, 3, 3, 3)), matrix_shape((7,))
    ((512, 32), (64, 27), (1, 7))
    """
    total = int(np.prod(shape))
    cuts = [int(np.prod(shape[:i])) for i in range(len(shape))] or [1]
    rows = min(cuts, key=lambda r: r + total // max(r, 1))
    return rows, total // max(rows, 1)


def rank1_factors(second_moment: Float32, rows: int) -> tuple[Float32, Float32]:
    """Row means r and column means over the total mean c, so that r_i c_j is Adafactor's estimate (1804.04235).

    Args:
        second_moment: not negative, shape (rows * columns,).
        rows: of the matrix.
    """
    matrix = second_moment.reshape(rows, -1)
    row = matrix.mean(axis=1, dtype=np.float64)
    column = matrix.mean(axis=0, dtype=np.float64)
    total = row.mean()
    return row.astype(np.float32), (column / total if total > 0 else column).astype(np.float32)


def bfloat16(values: Float32) -> Tensor:
    """The values to 0.4 %: half the bytes, and rank 1 is a rougher estimate by far."""
    return torch.from_numpy(values).to(torch.bfloat16)


def _outer(row: Float32, column: Float32) -> Float32:
    return np.multiply.outer(row, column).reshape(-1)


def encode_gaps(positions: NDArray[np.int64], *, backend: Backend) -> bytes:
    """Ascending positions as their differences, 255 standing for 255 and more to come."""
    gaps = np.diff(positions, prepend=-1) - 1
    full, last = np.divmod(gaps, 255)
    symbols = np.full(int(full.sum()) + len(gaps), 255, dtype=np.uint8)
    symbols[np.cumsum(full + 1) - 1] = last
    return encode_symbols(symbols, alphabet=256, backend=backend)


def decode_gaps(stream: memoryview) -> NDArray[np.int64]:
    """Positions of `encode_gaps`."""
    symbols = decode_symbols(stream).astype(np.int64)
    ends = np.flatnonzero(symbols < 255)
    return np.cumsum(symbols)[ends] + np.arange(len(ends))


class SecondMomentForms:
    """The forms in which one exp_avg_sq can be stored, from the one asked for to finer ones.

    Args:
        exp_avg_sq: float32, bfloat16 or float16, any shape; finite and not negative.
        momentum: the first moment that updates are judged with, shape (n,).
        exact_updates: `AdamRule.updates` of the exact state, shape (n,).
        rule: Adam's constants.
        options: settings.
    """

    def __init__(
        self,
        exp_avg_sq: Tensor,
        *,
        momentum: Float32,
        exact_updates: Float32,
        rule: AdamRule,
        options: ExCPOptions,
    ) -> None:
        self.tensor, self.options, self.rule = exp_avg_sq, options, rule
        self.values = as_float32(exp_avg_sq)
        self.momentum, self.exact_updates = momentum, exact_updates

    def largest_update(self, coded: CodedTensor) -> float:
        """The largest next update with a stored form."""
        updates = self.rule.updates(self.momentum, as_float32(coded.decoded), self.values)
        return float(updates.max(initial=0.0))

    def __iter__(self) -> Iterator[CodedTensor]:
        wanted = self.options.second_moment
        if wanted == "masked":
            yield self._masked()
        if wanted in ("masked", "rank1"):
            coded = self._rank1()
            if coded is not None:
                yield coded
        for bits in range(self.options.second_moment_bits, 9):
            yield self._log_kmeans(bits)

    def _coded(self, kind: str, streams: dict[str, bytes], decoded: Float32, bits: float, **meta: Any) -> CodedTensor:
        tensor = torch.from_numpy(decoded).reshape(self.tensor.shape).to(self.tensor.dtype)
        error = squared_norm(as_float32(tensor) - self.values)
        return CodedTensor(kind, streams, tensor, meta, bound_bits=bits + side_bits(streams), squared_error=error)

    def _masked(self) -> CodedTensor:
        mask = self.momentum != 0
        kept = self.values[mask]
        quantiser = choose_quantiser(Histogram.of(kept), num_levels=2**self.options.second_moment_bits - 1)
        indices = quantiser.indices(kept)
        codebook = quantiser.codebook(kept, indices)
        streams, context, bound = encode_indices(indices, alphabet=len(codebook), backend=self.options.backend)
        streams["codebook"] = codebook.astype("<f4").tobytes()
        return self._coded("masked", streams, _spread(codebook, indices, mask), bound, context=context)

    def _log_kmeans(self, bits: int) -> CodedTensor:
        quantiser = choose_quantiser(Histogram.of(self.values), num_levels=2**bits - 1, logarithmic=True)
        indices = quantiser.indices(self.values)
        codebook = np.concatenate([[0.0], quantiser.levels]).astype(np.float32)
        row = _last_row(self.tensor) if self.options.contexts else 0
        streams, context, bound = encode_indices(indices, alphabet=len(codebook), backend=self.options.backend, row=row)
        streams["codebook"] = codebook.astype("<f4").tobytes()
        return self._coded("log_kmeans", streams, look_up(codebook, indices), bound, context=context)

    def _rank1(self) -> CodedTensor | None:
        rows, columns = matrix_shape(tuple(self.tensor.shape))
        if min(rows, columns) < 2 or rows + columns > _MOST_FACTORS * len(self.values):
            return None
        coded = self._rank1_of(self.values, rows)
        if coded is None:
            # a few huge entries spoil the means of their rows and columns: as exceptions they need not be in them
            limit = np.float32(Histogram.of(self.values).threshold(_LARGEST_QUANTILE))
            coded = self._rank1_of(np.minimum(self.values, limit), rows)
        return coded

    def _too_small(self, decoded: Float32, target: float) -> NDArray[np.int64]:
        """Where the next update would be more than `target` times too large, and large among all updates."""
        # the denominator shrinks by the root of what the second moment shrinks by, or by less
        doubtful = np.flatnonzero(decoded * np.float32(0.999 * target**2) < self.values)
        updates = self.rule.updates(self.momentum[doubtful], decoded[doubtful], self.values[doubtful])
        allowed = np.maximum(
            self.exact_updates[doubtful] * np.float32(target), update_ceiling(self.exact_updates, target)
        )
        return doubtful[updates > allowed]

    def _rank1_of(self, values: Float32, rows: int) -> CodedTensor | None:
        """Means of `values`, and exceptions; None where there are too many."""
        factors = [bfloat16(factor) for factor in rank1_factors(values, rows)]
        streams = {
            name: encode_exact(factor, backend=self.options.backend)
            for name, factor in zip(("row", "column"), factors, strict=True)
        }
        decoded = _outer(*map(as_float32, factors))
        if self.options.update_target is not None:
            positions = self._too_small(decoded, self.options.update_target)
            if len(positions) > _MOST_EXCEPTIONS * len(self.values):
                return None
            if len(positions):
                exceptions = bfloat16(self.values[positions])
                decoded[positions] = as_float32(exceptions)
                streams["positions"] = encode_gaps(positions, backend=self.options.backend)
                streams["exceptions"] = encode_exact(exceptions, backend=self.options.backend)
        return self._coded("rank1", streams, decoded, 0.0, rows=rows)


def _last_row(tensor: Tensor) -> int:
    return row_length((tensor.numel() // tensor.shape[-1], tensor.shape[-1])) if tensor.dim() > 1 else 0


def _spread(codebook: Float32, indices: Indices, mask: NDArray[np.bool_]) -> Float32:
    whole = np.zeros(len(mask), dtype=np.float32)
    whole[mask] = codebook.take(indices, mode="clip")
    return whole


def exact_tensor(tensor: Tensor, options: ExCPOptions) -> CodedTensor:
    """A tensor stored bit for bit."""
    stream = encode_exact(tensor, backend=options.backend)
    return CodedTensor("exact", {"exact": stream}, tensor.detach().cpu().clone(), bound_bits=8.0 * len(stream))


def decode_second_moment(
    kind: str, streams: dict[str, memoryview], meta: dict[str, Any], like: Tensor, first_moment: CodedTensor | None
) -> CodedTensor:
    """The stored form of exp_avg_sq; `like` has its dtype and shape.

    Raises:
        ValueError: the streams do not fit together.
    """

    def floats(name: str) -> Float32:
        return np.frombuffer(streams[name], "<f4").astype(np.float32)

    def halves(name: str, length: int) -> Float32:
        return as_float32(decode_exact(streams[name], torch.bfloat16, (length,)))

    if kind == "rank1":
        rows = int(meta["rows"])
        decoded = _outer(halves("row", rows), halves("column", like.numel() // rows))
        if "positions" in streams:
            positions = decode_gaps(streams["positions"])
            decoded[positions] = halves("exceptions", len(positions))
    elif kind == "masked" and first_moment is not None:
        mask = as_float32(first_moment.decoded) != 0
        indices = decode_indices(streams, meta["context"], length=int(np.count_nonzero(mask)))
        decoded = _spread(floats("codebook"), indices, mask)
    else:
        indices = decode_indices(streams, meta["context"], length=like.numel(), row=_last_row(like))
        decoded = look_up(floats("codebook"), indices)
    if len(decoded) != like.numel():
        raise ValueError(f"ExCP stream is damaged: {len(decoded)} elements where {like.numel()} were due")
    return CodedTensor(kind, {}, torch.from_numpy(decoded).reshape(like.shape).to(like.dtype))
