"""Adam's first moment, pruned together with the weight (section 3.2)."""

from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .histogram import Float32, Histogram
from .indices import Indices, decode_indices, encode_indices
from .lookup import look_up, squared_norm
from .options import ExCPOptions
from .pruning import momentum_threshold
from .quantiser import choose_quantiser
from .weights import CodedTensor, as_float32, side_bits

T = TypeVar("T", bound=np.generic)


def encode_first_moment(
    exp_avg: Tensor, *, weight: CodedTensor | None, variance: Float32 | None, options: ExCPOptions, bits: int
) -> CodedTensor | str:
    """Codes exp_avg: zero wherever the moment is below its threshold, or by default the weight's residual is zero.

    In the latter case only entries that the weight keeps are coded. Either way the weight's levels are the context.

    Args:
        exp_avg: float32, bfloat16 or float16, any shape.
        weight: the coded residual; None in a key frame, where nothing but the threshold prunes.
        variance: the stored second moment, shape (n,). deviation: the paper prunes and clusters the moment itself.
            Divided by the variance's square root it is the update that it causes; clustered without, entries of rows
            with small gradients can be stored ten times too large and give the first step after a resume a spike.
            None does as the paper.
        options: settings.
        bits: the moment has at most 2**bits - 1 levels.

    Returns:
        the coded moment, or why it must be stored exactly.
    """
    exact = as_float32(exp_avg)
    places = _places(weight) if options.momentum_mask == "weight" else None
    kept: Any = _take(exact, places)
    if variance is not None:
        divisor = _root(_take(variance, places))
        # no second moment, no update: such entries become zero
        kept = kept / np.where(divisor > 0, divisor, np.float32(np.inf))
    histogram = Histogram.of(kept)
    if not histogram.finite:
        return "not finite over the second moment"
    quantiser = choose_quantiser(
        histogram,
        num_levels=2**bits - 1,
        threshold=momentum_threshold(exact, kept, histogram, options),
        entropy_constrained=options.entropy_constrained and options.mode == "sparsity",
    )
    indices = quantiser.indices(kept)
    codebook = quantiser.codebook(kept, indices)
    classes = None
    if options.contexts and weight is not None and weight.classes is not None:
        classes = _take(weight.classes, places)
    streams, context, bound = encode_indices(indices, alphabet=len(codebook), backend=options.backend, classes=classes)
    streams["codebook"] = codebook.astype("<f4").tobytes()
    decoded = _scatter(codebook, indices, places, variance, exp_avg)
    return CodedTensor(
        kind="first_moment",
        streams=streams,
        decoded=decoded,
        meta={"context": context, "mask": options.momentum_mask},
        indices=indices,
        bound_bits=bound + side_bits(streams),
        squared_error=squared_norm(as_float32(decoded) - exact),
    )


def _places(weight: CodedTensor | None) -> NDArray[np.int64] | None:
    """Positions that the weight keeps; None for all."""
    if weight is None or weight.indices is None:
        return None
    return np.flatnonzero(weight.indices != 0) if weight.kept is None else weight.kept


def _take(values: NDArray[T], places: NDArray[np.int64] | None) -> NDArray[T]:
    return values if places is None else values.take(places, mode="clip")


def _root(variance: Float32) -> Float32:
    return np.sqrt(np.maximum(variance, 0))


def _scatter(
    codebook: Float32, indices: Indices, places: NDArray[np.int64] | None, variance: Float32 | None, like: Tensor
) -> Tensor:
    if places is None:
        whole = look_up(codebook, indices)
        if variance is not None:
            whole *= _root(variance)
    else:
        # few entries are left: only those are worked on
        kept = np.flatnonzero(indices != 0)
        places = places.take(kept, mode="clip")
        found = codebook.take(indices.take(kept, mode="clip"), mode="clip")
        whole = np.zeros(like.numel(), dtype=np.float32)
        whole[places] = found if variance is None else found * _root(variance.take(places, mode="clip"))
    return torch.from_numpy(whole).reshape(like.shape).to(like.dtype)


def decode_first_moment(
    streams: dict[str, memoryview],
    meta: dict[str, Any],
    like: Tensor,
    *,
    weight: CodedTensor | None,
    second_moment: CodedTensor | None,
) -> CodedTensor:
    """The stored form of exp_avg; `like` has its dtype and shape.

    Raises:
        ValueError: the streams do not fit together.
    """
    places = _places(weight) if meta["mask"] == "weight" else None
    classes = None if weight is None or weight.classes is None else _take(weight.classes, places)
    length = like.numel() if places is None else len(places)
    indices = decode_indices(streams, meta["context"], length=length, classes=classes)
    codebook = np.frombuffer(streams["codebook"], "<f4").astype(np.float32)
    variance = None if second_moment is None else as_float32(second_moment.decoded)
    return CodedTensor("first_moment", {}, _scatter(codebook, indices, places, variance, like), indices=indices)
