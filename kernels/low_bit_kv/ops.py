"""The public ops: they check their arguments and pick a path. For inference: no gradients pass through them."""

from importlib.util import find_spec
from typing import Literal

import torch

from . import cpu_low_bit_kv
from .low_bit import LowBit, Per, Rule, bytes_per_token, default_rule, group_shape
from .reference import (
    accumulation_dtype,
    group_parameters,
    pack_reference,
    packed_scores_reference,
    packed_weighted_sum_reference,
    unpack_reference,
)

Backend = Literal["triton", "cpu", "reference"]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def pack(
    x: torch.Tensor,
    *,
    bits: int,
    group_size: int,
    per: Per,
    rule: Rule | None = None,
    backend: Backend | None = None,
) -> LowBit:
    """Quantise keys or values to 1, 2 or 4 bits and pack them.

    Groups are `group_size` neighbouring tokens of one channel (`per="channel"`, KIVI's choice for keys) or
    `group_size` neighbouring channels of one token (`per="token"`, for values). The last group may be shorter.

    Args:
        x: (B, N, T, D) floating point, finite.
        bits: 1, 2 or 4.
        group_size: Values that share a scale and a zero.
        per: The axis along which scales differ.
        rule: `kivi` (levels from the smallest to the largest value) or `centred` (the centres of equal parts of the
            range). Default: `centred` at 1 bit, else `kivi`, as SpeCache (arXiv 2503.16163).
        backend: `triton`, `cpu`, or `reference`. Default: `triton` on CUDA where Triton is installed, else `cpu` on
            the CPU, else `reference`.

    Returns:
        Codes, scales and zeros; the latter two in the dtype of `x`. All backends give the same bytes.

    Raises:
        ValueError: `bits`, `group_size`, `per`, `rule`, the shape, dtype or backend do not fit.
    """
    _check_dense(x, "x")
    bytes_per_token(x.shape[3], bits)
    group_tokens, group_channels = group_shape(per, group_size)
    if _pick(backend, x) == "triton" and x.numel():
        from . import triton_low_bit_kv

        parameters = group_parameters(
            x, bits=bits, group_tokens=group_tokens, group_channels=group_channels, rule=rule or default_rule(bits)
        )
        return triton_low_bit_kv.pack(x, *parameters, bits, group_tokens, group_channels)
    return pack_reference(x, bits=bits, group_size=group_size, per=per, rule=rule)


@torch.no_grad()
def unpack(packed: LowBit) -> torch.Tensor:
    """The values that the codes stand for, (B, N, T, D) in the dtype of the scales.

    For tests and for the dense attention path; the other ops never build this tensor.
    """
    return unpack_reference(packed)


@torch.no_grad()
def packed_scores(
    query: torch.Tensor,
    keys: LowBit,
    lengths: torch.Tensor,
    *,
    factor: float = 1.0,
    indices: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """Attention scores `factor * query · key` over packed keys, some of which are replaced by exact ones.

    Args:
        query: (B, N, M, D): the M query rows that read key/value head N (query heads of the group times positions).
        keys: T packed tokens.
        lengths: (B,) int64, how many of them belong to each sequence. Later ones score -inf.
        factor: Multiplies every score (the attention's scaling).
        indices: (B, N, K) integers: tokens whose packed key is replaced. Entries outside [0, length) are ignored;
            no token may be named twice.
        rows: (B, N, K, D): the exact keys.
        out: (B, N, M, at least T) to write into, in the accumulation dtype, with contiguous columns; columns from T on
            are left alone.
        backend: As in `pack`.

    Returns:
        `out`, or a new (B, N, M, T) tensor; float32, for float64 inputs float64.

    Raises:
        ValueError: Shapes, dtypes, devices or the backend do not fit.
    """
    _check_attention(query, "query", keys, lengths, indices, rows)
    if query.shape[3] != keys.num_channels:
        raise ValueError(f"query has {query.shape[3]} channels, the packed keys have {keys.num_channels}")
    dtype, shape = accumulation_dtype(query.dtype), (*query.shape[:3], keys.num_tokens)
    if out is None:
        out = query.new_empty(shape, dtype=dtype)
    elif out.shape[:3] != shape[:3] or out.shape[3] < shape[3] or out.dtype != dtype or out.stride(3) != 1:
        raise ValueError(
            f"out must be {shape[:3]} and at least {shape[3]} contiguous columns of {dtype}, "
            f"got {tuple(out.shape)} {out.dtype}"
        )
    if query.numel() == 0 or keys.num_tokens == 0:
        return out
    backend = _pick(backend, query)
    if backend == "triton":
        from . import triton_low_bit_kv

        triton_low_bit_kv.packed_scores(query, keys, lengths, factor, indices, rows, out)
    elif backend == "cpu":
        cpu_low_bit_kv.packed_scores(query, keys, lengths, factor, indices, rows, out)
    else:
        scores = packed_scores_reference(query, keys, lengths, factor=factor, indices=indices, rows=rows)
        out[..., : keys.num_tokens] = scores
    return out


@torch.no_grad()
def packed_weighted_sum(
    weights: torch.Tensor,
    values: LowBit,
    lengths: torch.Tensor,
    *,
    indices: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    backend: Backend | None = None,
) -> torch.Tensor:
    """`sum_t weights[t] * value[t]` over packed values, some of which are replaced by exact ones.

    Args:
        weights: (B, N, M, at least T) attention weights in the accumulation dtype; columns from T on are not read.
        values: T packed tokens.
        lengths: (B,) int64, how many of them belong to each sequence. Weights of later ones are not read.
        indices: (B, N, K): tokens whose packed value is replaced; rules as in `packed_scores`.
        rows: (B, N, K, D): the exact values.
        backend: As in `pack`.

    Returns:
        (B, N, M, D) in the dtype of `weights`.

    Raises:
        ValueError: Shapes, dtypes, devices or the backend do not fit.
    """
    _check_attention(weights, "weights", values, lengths, indices, rows)
    if weights.shape[3] < values.num_tokens:
        raise ValueError(f"weights has {weights.shape[3]} columns for {values.num_tokens} packed tokens")
    if weights.dtype != accumulation_dtype(values.scale.dtype):
        raise ValueError(f"weights must be {accumulation_dtype(values.scale.dtype)}, got {weights.dtype}")
    if weights.numel() == 0 or values.num_tokens == 0:
        return weights.new_zeros(*weights.shape[:3], values.num_channels)
    backend = _pick(backend, weights)
    if backend == "triton":
        from . import triton_low_bit_kv

        return triton_low_bit_kv.packed_weighted_sum(weights, values, lengths, indices, rows)
    if backend == "cpu":
        return cpu_low_bit_kv.packed_weighted_sum(weights, values, lengths, indices, rows)
    return packed_weighted_sum_reference(weights, values, lengths, indices=indices, rows=rows)


def _check_dense(x: torch.Tensor, name: str) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be (B, N, T, D), got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")


def _check_attention(
    x: torch.Tensor,
    name: str,
    packed: LowBit,
    lengths: torch.Tensor,
    indices: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    _check_dense(x, name)
    if x.shape[:2] != packed.codes.shape[:2] or lengths.shape != x.shape[:1]:
        raise ValueError(
            f"{name} {tuple(x.shape)}, packed tokens {tuple(packed.codes.shape)} and lengths {tuple(lengths.shape)} "
            "must agree in batch and heads"
        )
    devices = {tensor.device for tensor in (x, packed.codes, lengths, indices, rows) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
    if (indices is None) != (rows is None):
        raise ValueError("indices and rows belong together: pass both or neither")
    if indices is not None and rows is not None:
        if indices.shape[:2] != x.shape[:2] or rows.shape != (*indices.shape, packed.num_channels):
            raise ValueError(
                f"indices {tuple(indices.shape)} and rows {tuple(rows.shape)} must be (B, N, K) and (B, N, K, "
                f"{packed.num_channels}) for {name} {tuple(x.shape)}"
            )
        if indices.is_floating_point():
            raise ValueError(f"indices must be integers, got {indices.dtype}")


def _pick(backend: Backend | None, x: torch.Tensor) -> Backend:
    device = x.device.type
    if backend is None:
        if device == "cpu":
            return "cpu"
        triton = device == "cuda" and x.dtype != torch.float64 and find_spec("triton") is not None
        return "triton" if triton else "reference"
    if backend not in ("triton", "cpu", "reference"):
        raise ValueError(f"backend {backend!r} is not one of 'triton', 'cpu', 'reference'")
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, these are on {x.device}; leave backend at None")
    if backend == "triton":
        if x.dtype == torch.float64:
            raise ValueError("backend 'triton' has no float64; use 'reference'")
        if device != "cuda":
            if find_spec("triton") is None:
                raise ValueError("backend 'triton' needs the triton package; leave backend at None")
            from .triton_low_bit_kv import INTERPRETED

            if not INTERPRETED:
                raise ValueError(
                    f"backend 'triton' needs CUDA tensors, these are on {x.device}; "
                    "leave backend at None, or set TRITON_INTERPRET=1 before the program starts"
                )
    return backend
