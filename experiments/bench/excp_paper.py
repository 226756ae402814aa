"""ExCP's released pipeline (arXiv 2406.11257), written from its specification: the peer that ours is measured against.

Residual against the reconstruction of the last save, thresholds min(2.5, alpha / sqrt(mean v)) times median |residual|
and beta times mean |exp_avg|, one mask for weight and moments, k-means with 15 centres on the non-zeros, two indices
per byte, LZMA over the whole. The first save is stored as it is. Where the released code is weaker than it need be, the
peer is given the better: k-means trains on up to 262,144 values (released: 3,840), codebooks are float32 (released:
float16), and odd sizes are padded. Of saves above 128 MiB LZMA sees every fourth block of 4,096 elements; its size and
time count four times.
"""

import lzma
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...callbacks.excp.tree import Parameter, find_parameters

Float32 = NDArray[np.float32]
_LARGEST_RATIO = 2.5
_CENTRES = 15
_SAMPLE = 1 << 18
_ROUNDS = 25
_SAMPLED_BLOCK = 4096
T = TypeVar("T", bound=np.generic)


def flat(tensor: torch.Tensor) -> Float32:
    """The values as float32, shape (n,)."""
    return tensor.detach().reshape(-1).to(torch.float32).numpy()


def at(tree: Any, path: Any) -> Any:
    """The value under a path."""
    for key in path:
        tree = tree[key]
    return tree


def kmeans(values: Float32, centres: int = _CENTRES) -> Float32:
    """Centres of one-dimensional k-means by Lloyd's algorithm, ascending, from a start at the quantiles."""
    sample = np.sort(values if len(values) <= _SAMPLE else values[:: -(-len(values) // _SAMPLE)]).astype(np.float64)
    sums = np.concatenate([[0.0], np.cumsum(sample)])
    found = np.unique(np.quantile(sample, (np.arange(centres) + 0.5) / centres))
    for _ in range(_ROUNDS):
        edges = np.concatenate([[0], np.searchsorted(sample, (found[1:] + found[:-1]) / 2), [len(sample)]])
        count = np.diff(edges)
        found = np.where(count > 0, np.diff(sums[edges]) / np.maximum(count, 1), found)
    return found.astype(np.float32)


def quantise(values: Float32) -> tuple[NDArray[np.uint8], Float32]:
    """Indices, 0 for zero, and the codebook with zero first."""
    indices = np.zeros(len(values), np.uint8)
    places = np.flatnonzero(values)
    if not len(places):
        return indices, np.zeros(1, np.float32)
    kept = values[places]
    centres = kmeans(kept)
    indices[places] = 1 + np.searchsorted((centres[1:] + centres[:-1]) / 2, kept).astype(np.uint8)
    return indices, np.concatenate([[np.float32(0)], centres])


def sampled(values: NDArray[T], every: int) -> NDArray[T]:
    """Every so-manieth block of 4,096 values, the first one included; short tensors whole."""
    if every == 1 or len(values) < 2 * _SAMPLED_BLOCK:
        return values
    whole = len(values) // _SAMPLED_BLOCK * _SAMPLED_BLOCK
    return values[:whole].reshape(-1, _SAMPLED_BLOCK)[::every].reshape(-1)


def pack(indices: NDArray[np.uint8]) -> bytes:
    """Two indices per byte, the first in the high half."""
    even = indices if len(indices) % 2 == 0 else np.append(indices, np.uint8(0))
    return ((even[0::2] << 4) | even[1::2]).tobytes()


def unpack(data: bytes, length: int) -> NDArray[np.uint8]:
    """Inverse of `pack`."""
    packed = np.frombuffer(data, np.uint8)
    indices = np.empty(2 * len(packed), np.uint8)
    indices[0::2], indices[1::2] = packed >> 4, packed & 15
    return indices[:length]


def order0_bits(indices: NDArray[np.uint8]) -> float:
    """Entropy of a stream under its own frequencies."""
    counts = np.bincount(indices).astype(np.float64)
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


@dataclass
class PaperSave:
    """A coded save.

    Attributes:
        archive: LZMA over packed indices and codebooks.
        archive_every: blocks from one in the archive to the next.
        archive_share: elements in the archive over all (0-1).
        archive_s: CPU seconds of LZMA.
        rest_bytes: tensors that the pipeline leaves alone, as they are.
        bound_bytes: order-0 entropy of all index streams, codebooks and rest.
        codebooks: by parameter: weight, first moment, second moment.
        weights: reconstruction by name; the next save's reference.
        squared_error: of all reconstructed weights.
        momentum_squared_error: of all first moments.
        kept_moments: share of first moments that are not zero (0-1).
    """

    archive: bytes = b""
    archive_every: int = 1
    archive_share: float = 1.0
    archive_s: float = 0.0
    rest_bytes: int = 0
    bound_bytes: float = 0.0
    codebooks: dict[str, tuple[Float32, ...]] = field(default_factory=dict)
    weights: dict[str, Float32] = field(default_factory=dict)
    squared_error: float = 0.0
    momentum_squared_error: float = 0.0
    kept_moments: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Size of everything."""
        return round(len(self.archive) / self.archive_share) + self.rest_bytes


def parameters_of(checkpoint: dict[str, Any]) -> Iterator[Parameter]:
    """Parameters that the pipeline codes: those with a weight and Adam's moments."""
    for parameter in find_parameters(checkpoint):
        if parameter.weight is not None and parameter.exp_avg is not None:
            yield parameter


def encode(
    checkpoint: dict[str, Any],
    reference: dict[str, Float32],
    *,
    alpha: float = 5e-5,
    beta: float = 2.0,
    archive_every: int = 1,
) -> PaperSave:
    """Codes a checkpoint against the reconstruction of the one before.

    Args:
        checkpoint: with `state_dict` and `optimizer_states`.
        reference: reconstruction of the last save, by name.
        alpha: weight threshold; infinity gives the limit of 2.5 medians everywhere.
        beta: momentum threshold.
        archive_every: LZMA sees every so-manieth block, see `sampled`.
    """
    save = PaperSave()
    packed: list[bytes] = []
    kept = total = 0
    bound_bits = 0.0
    archived = 0
    for parameter in parameters_of(checkpoint):
        weight, first, second = (
            flat(at(checkpoint, path)) for path in (parameter.weight, parameter.exp_avg, parameter.exp_avg_sq)
        )
        base = reference[parameter.name]
        residual = weight - base
        root = float(np.sqrt(second.mean(dtype=np.float64)))
        ratio = min(_LARGEST_RATIO, alpha / root) if root else _LARGEST_RATIO
        size = np.abs(residual)
        mask = size > np.float32(ratio * np.median(size))
        both = (np.abs(first) > np.float32(beta * np.abs(first).mean(dtype=np.float64))) & mask
        coded = [quantise(np.where(where, values, np.float32(0))) for values, where in
                 ((residual, mask), (first, both), (second, both))]  # fmt: skip
        save.codebooks[parameter.name] = tuple(codebook for _, codebook in coded)
        bound_bits += sum(order0_bits(indices) + 32 * len(codebook) for indices, codebook in coded)
        packed += [pack(sampled(indices, archive_every)) for indices, _ in coded]
        packed += [codebook.tobytes() for _, codebook in coded]
        archived += len(sampled(weight, archive_every))
        rebuilt = base + coded[0][1].take(coded[0][0])
        save.weights[parameter.name] = rebuilt
        save.squared_error += float(np.square(rebuilt - weight, dtype=np.float64).sum())
        momentum = coded[1][1].take(coded[1][0])
        save.momentum_squared_error += float(np.square(momentum - first, dtype=np.float64).sum())
        kept += int(both.sum())
        total += len(both)
    start = time.process_time()
    save.archive = lzma.compress(b"".join(packed), preset=6)
    save.archive_s = time.process_time() - start
    save.archive_every, save.archive_share = archive_every, archived / max(total, 1)
    coded_bytes = 12 * total
    save.rest_bytes = max(0, raw_bytes(checkpoint) - coded_bytes)
    save.bound_bytes = bound_bits / 8 + save.rest_bytes
    save.kept_moments = kept / max(total, 1)
    return save


def decode(save: PaperSave, checkpoint: dict[str, Any], reference: dict[str, Float32]) -> dict[str, Any]:
    """Weights and moments by name, shape (n,) each, or the archived part of them; `checkpoint` tells names only."""
    data = memoryview(lzma.decompress(save.archive))
    values, offset = {}, 0
    for parameter in parameters_of(checkpoint):
        base = sampled(reference[parameter.name], save.archive_every)
        length = len(base)
        streams = []
        for codebook in save.codebooks[parameter.name]:
            size = (length + 1) // 2
            streams.append(codebook.take(unpack(bytes(data[offset : offset + size]), length)))
            offset += size
        offset += sum(codebook.nbytes for codebook in save.codebooks[parameter.name])
        streams[0] = base + streams[0]
        values[parameter.name] = tuple(streams)
    return values


def raw_bytes(checkpoint: dict[str, Any]) -> int:
    """Bytes of all tensors as they are in memory; tensors that share their memory count once."""
    from ...callbacks.excp.tree import tensors_of

    unique = {
        (tensor.data_ptr(), tensor.shape): tensor.numel() * tensor.element_size()
        for _, tensor in tensors_of(checkpoint)
        if tensor.numel()
    }
    return sum(unique.values())
