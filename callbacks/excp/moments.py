"""Adam's moments: the first pruned together with the weight, the second by one of three means (section 3.2)."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adam import AdamRule, proxy_updates, update_ceiling
from .entropy import decode_symbols, encode_symbols
from .exact import decode_exact, encode_exact
from .histogram import Float32, Histogram
from .indices import Indices, decode_indices, encode_indices
from .options import Backend, ExCPOptions
from .pruning import momentum_threshold
from .quantiser import choose_quantiser
from .weights import CodedTensor, as_float32, side_bits, squared_norm

# more exceptions than this and coding every entry is smaller
_MOST_EXCEPTIONS = 0.05
_MOST_FACTORS = 0.125


def encode_first_moment(exp_avg: Tensor, *, weight: CodedTensor | None, options: ExCPOptions) -> CodedTensor | str:
    """Codes exp_avg: zero wherever the weight's residual is zero or |exp_avg| is below its threshold.

    Only entries that the weight keeps are coded, so that the second of the two masks is coded given the first.

    Args:
        exp_avg: float32, bfloat16 or float16, any shape.
        weight: the coded residual; None in a key frame, where nothing but the threshold prunes.
        options: settings.

    Returns:
        the coded moment, or why it must be stored exactly.
    """
    values = as_float32(exp_avg)
    mask = None if weight is None or weight.indices is None else weight.indices != 0
    kept = values if mask is None else values[mask]
    histogram = Histogram.of(kept)
    if not histogram.finite or (mask is not None and not np.isfinite(values).all()):
        return "not finite"
    quantiser = choose_quantiser(
        histogram,
        num_levels=2**options.momentum_bits - 1,
        threshold=momentum_threshold(values, kept, histogram, options),
        entropy_constrained=options.entropy_constrained and options.mode == "sparsity",
    )
    indices = quantiser.indices(kept)
    codebook = quantiser.codebook(kept, indices)
    classes = None
    if options.contexts and mask is not None and weight is not None and weight.classes is not None:
        classes = weight.classes[mask]
    streams, context, bound = encode_indices(indices, alphabet=len(codebook), backend=options.backend, classes=classes)
    streams["codebook"] = codebook.astype("<f4").tobytes()
    decoded = _scatter(codebook, indices, mask, exp_avg)
    return CodedTensor(
        kind="first_moment",
        streams=streams,
        decoded=decoded,
        meta={"context": context},
        indices=indices,
        bound_bits=bound + side_bits(streams),
        squared_error=squared_norm(as_float32(decoded) - values),
    )


def _scatter(codebook: Float32, indices: Indices, mask: NDArray[np.bool_] | None, like: Tensor) -> Tensor:
    found = codebook.take(indices, mode="clip")
    if mask is not None:
        whole = np.zeros(len(mask), dtype=np.float32)
        whole[mask] = found
        found = whole
    return torch.from_numpy(found).reshape(like.shape).to(like.dtype)


def decode_first_moment(
    streams: dict[str, memoryview], meta: dict[str, Any], like: Tensor, weight: CodedTensor | None
) -> CodedTensor:
    """The stored form of exp_avg; `like` has its dtype and shape.

    Raises:
        ValueError: the streams do not fit together.
    """
    mask = None if weight is None or weight.indices is None else weight.indices != 0
    classes = weight.classes[mask] if weight is not None and weight.classes is not None and mask is not None else None
    indices = decode_indices(streams, meta["context"], classes=classes)
    due = like.numel() if mask is None else int(np.count_nonzero(mask))
    if len(indices) != due:
        raise ValueError(f"ExCP stream is damaged: {len(indices)} elements where {due} were due")
    codebook = np.frombuffer(streams["codebook"], "<f4").astype(np.float32)
    return CodedTensor("first_moment", {}, _scatter(codebook, indices, mask, like), indices=indices)


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


class SecondMomentCoder:
    """Codes one exp_avg_sq, going to finer forms until the first update after a resume stays within its bound.

    Args:
        exp_avg_sq: float32, bfloat16 or float16, any shape.
        exp_avg: exact first moment, shape (n,).
        first_moment: its coded form.
        rule: Adam's constants.
        options: settings.
    """

    def __init__(
        self,
        exp_avg_sq: Tensor,
        *,
        exp_avg: Tensor,
        first_moment: CodedTensor,
        rule: AdamRule,
        options: ExCPOptions,
    ) -> None:
        self.tensor, self.options, self.rule = exp_avg_sq, options, rule
        self.values = as_float32(exp_avg_sq)
        self.momentum = as_float32(first_moment.decoded)
        self.histogram = Histogram.of(self.values)
        self.valid = self.histogram.finite and not (self.values < 0).any()
        self.exact_updates = np.empty(0, np.float32)
        self.exact_update_max = self.update_max = 0.0
        if self.valid:
            self.exact_updates = proxy_updates(rule, as_float32(exp_avg), self.values, self.values)
            self.exact_update_max = float(self.exact_updates.max(initial=0.0))

    def encode(self) -> tuple[CodedTensor, list[str]]:
        """The coded moment, and why it is not in the form that was asked for."""
        notes = []
        if self.valid:
            for coded in self._forms():
                if coded is None:
                    continue
                self.update_max = float(self._updates(as_float32(coded.decoded)).max(initial=0.0))
                limit = self.options.update_target
                if limit is None or self.update_max <= limit * self.exact_update_max:
                    if coded.kind != self.options.second_moment:
                        notes.append(f"second moment: {coded.kind} instead of {self.options.second_moment}")
                    return coded, notes
            notes.append("second moment exact: update target out of reach")
        else:
            notes.append("second moment exact: not finite, or negative")
        self.update_max = float(self._updates(self.values).max(initial=0.0)) if self.valid else 0.0
        return exact_tensor(self.tensor, self.options), notes

    def _updates(self, second_moment: Float32) -> Float32:
        return proxy_updates(self.rule, self.momentum, second_moment, self.values)

    def _forms(self) -> Iterator[CodedTensor | None]:
        wanted = self.options.second_moment
        if wanted == "masked":
            yield self._masked()
        if wanted in ("masked", "rank1"):
            yield self._rank1()
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
        quantiser = choose_quantiser(self.histogram, num_levels=2**bits - 1, logarithmic=True)
        indices = quantiser.indices(self.values)
        codebook = np.concatenate([[0.0], quantiser.levels]).astype(np.float32)
        row = self.tensor.shape[-1] if self.tensor.dim() > 1 and self.options.contexts else 0
        streams, context, bound = encode_indices(
            indices, alphabet=len(codebook), backend=self.options.backend, row=row if row >= 32 else 0
        )
        streams["codebook"] = codebook.astype("<f4").tobytes()
        return self._coded("log_kmeans", streams, codebook.take(indices, mode="clip"), bound, context=context)

    def _rank1(self) -> CodedTensor | None:
        rows, columns = matrix_shape(tuple(self.tensor.shape))
        if min(rows, columns) < 2 or rows + columns > _MOST_FACTORS * len(self.values):
            return None
        factors = [bfloat16(factor) for factor in rank1_factors(self.values, rows)]
        streams = {
            name: encode_exact(factor, backend=self.options.backend)
            for name, factor in zip(("row", "column"), factors, strict=True)
        }
        decoded = _outer(*map(as_float32, factors))
        if self.options.update_target is not None:
            ceiling = update_ceiling(self.exact_updates, self.options.update_target)
            allowed = np.maximum(self.exact_updates * np.float32(self.options.update_target), np.float32(ceiling))
            positions = np.flatnonzero(self._updates(decoded) > allowed)
            if len(positions) > _MOST_EXCEPTIONS * len(self.values):
                return None
            if len(positions):
                exceptions = bfloat16(self.values[positions])
                decoded[positions] = as_float32(exceptions)
                streams["positions"] = encode_gaps(positions, backend=self.options.backend)
                streams["exceptions"] = encode_exact(exceptions, backend=self.options.backend)
        return self._coded("rank1", streams, decoded, 0.0, rows=rows)


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
        decoded = _spread(floats("codebook"), decode_indices(streams, meta["context"]), mask)
    else:
        row = like.shape[-1] if like.dim() > 1 else 0
        decoded = floats("codebook").take(decode_indices(streams, meta["context"], row=row), mode="clip")
    if len(decoded) != like.numel():
        raise ValueError(f"ExCP stream is damaged: {len(decoded)} elements where {like.numel()} were due")
    return CodedTensor(kind, {}, torch.from_numpy(decoded).reshape(like.shape).to(like.dtype))
