"""The public ops: they check their arguments, pick a path and define the gradients."""

import ctypes
import math
from importlib.util import find_spec
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from ..native_build import cpu_kernels
from ..weighted_gather import weighted_gather
from . import cpu_hash_gather, native_hash_gather
from .int8_rows import SCALE_BYTES, dequantise_rows
from .reference import MAX_BITS, Weighting, bucket_weights, hash_gather_reference, num_tables, sign_codes, split
from .sparse_gradient import sparse_table_gradient, weighted_gather_sparse_grad

Backend = Literal["triton", "cpu", "reference"]
_Found = TypeVar("_Found")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sign_hash(
    x: Tensor, num_bits: int, *, weighting: Weighting = "paper", temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Hash sub-vectors by their signs: the row of each and its weight, with closed-form gradients for the weight.

    Sub-vector k of a token has row `k * 2^num_bits + code`, code = sum_i [z_i >= 0] 2^(num_bits - 1 - i). The row gets
    no gradient; the result jumps where a value crosses zero.

    Args:
        x: (..., d), floating point. A last sub-vector that is too short is filled up with zeros, which count as
            positive and do not weigh.
        num_bits: values per sub-vector, tau, 1 to 16.
        weighting: `paper` for p = prod_i sigmoid(2 |z_i| / t), `l1` for p * sum_i |z_i| (released code).
        temperature: t.

    Returns:
        rows: (..., K) int64 in [0, K * 2^num_bits).
        weights: (..., K) float32, float64 for float64 inputs.

    Raises:
        ValueError: an argument is out of range, or on the CPU x holds NaN or infinity.
    """
    _check(x, num_bits, weighting, temperature)
    rows, weights = _hash(x, num_bits, weighting, temperature)
    return rows, weights


def hash_gather(
    x: Tensor,
    table: Tensor,
    num_bits: int,
    *,
    weighting: Weighting = "paper",
    temperature: float = 1.0,
    backend: Backend | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Memory layer without its bias: `out[t] = sum_k weight[t, k] * table[row[t, k]]` with the hash of `sign_hash`.

    Layers that share their input (query, key and value) are one call over a table with their columns side by side.
    Sums run in float32, for float64 tables in float64; gradients reach `x` and `table` and are deterministic.

    Args:
        x: (..., d), floating point.
        table: (K * 2^num_bits, H) rows, floating point, K = ceil(d / num_bits).
        num_bits: values per sub-vector, tau, 1 to 16.
        weighting: see `sign_hash`.
        temperature: see `sign_hash`.
        backend: `triton` (CUDA, or any device under Triton's interpreter), `cpu`, or `reference` (plain torch,
            gradients by autograd). Default: `triton` on CUDA where Triton is installed, `cpu` on the CPU.
        sparse_grad: give the table's gradient as a COO tensor of the rows that were used. Compiled graphs
            give a dense one all the same.

    Returns:
        (..., H) in the table's dtype.

    Raises:
        ValueError: shapes, dtypes, devices or the backend do not fit, or on the CPU x holds NaN or infinity.
    """
    _check(x, num_bits, weighting, temperature)
    expected = num_tables(x.shape[-1], num_bits) << num_bits
    if table.dim() != 2 or table.shape[0] != expected or table.dtype not in _DTYPES:
        raise ValueError(
            f"the table must be ({expected}, H) floating point for {x.shape[-1]} values in sub-vectors of {num_bits}, "
            f"got {tuple(table.shape)} {table.dtype}"
        )
    if table.device != x.device:
        raise ValueError(f"x and table must be on one device, got {x.device} and {table.device}")
    # not -1: it is ambiguous where there are no tokens
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    chosen = _pick(backend, x)
    if chosen == "reference":
        if sparse_grad:
            raise ValueError("backend 'reference' gives dense gradients; leave sparse_grad out, or use another backend")
        _refuse_nan(flat)
        out = hash_gather_reference(flat, table, num_bits, weighting, temperature)
    elif chosen == "triton":
        out = _FusedHashGather.apply(flat, table, num_bits, weighting, temperature, sparse_grad)
    elif (library := _native(flat, table)) is not None:
        found = native_hash_gather.gather(library, flat, table, table.shape[1], num_bits, weighting, temperature)
        out = _finite(found, flat)
    else:
        rows, weights = _hash(flat, num_bits, weighting, temperature)
        needs_grad = torch.is_grad_enabled() and (table.requires_grad or weights.requires_grad)
        if needs_grad and sparse_grad and not torch.compiler.is_compiling():
            out = weighted_gather_sparse_grad(table, rows, weights)
        elif needs_grad or torch.compiler.is_compiling():
            out = weighted_gather(table, rows, weights, backend="cpu")
        else:
            out = cpu_hash_gather.forward(table, rows, weights)
    return out.view(*x.shape[:-1], table.shape[1])


def hash_gather_int8(
    x: Tensor,
    records: Tensor,
    num_bits: int,
    *,
    weighting: Weighting = "paper",
    temperature: float = 1.0,
    backend: Backend | None = None,
) -> Tensor:
    """`hash_gather` over rows of 8-bit codes, for inference: equal to it over `dequantise_rows(records)`.

    Args:
        x: (..., d), floating point.
        records: (K * 2^num_bits, H + 8) uint8, from `quantise_rows`.
        num_bits: values per sub-vector.
        weighting: see `sign_hash`.
        temperature: see `sign_hash`.
        backend: see `hash_gather`.

    Returns:
        (..., H) float32.

    Raises:
        ValueError: as for `hash_gather`; or x wants a gradient.
    """
    _check(x, num_bits, weighting, temperature)
    expected = num_tables(x.shape[-1], num_bits) << num_bits
    if records.dim() != 2 or records.shape[0] != expected or records.dtype != torch.uint8:
        raise ValueError(
            f"the records must be ({expected}, H + {SCALE_BYTES}) uint8 for {x.shape[-1]} values in sub-vectors of "
            f"{num_bits}, got {tuple(records.shape)} {records.dtype}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("8-bit tables give no gradients; train with floating-point tables, or use torch.no_grad()")
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    chosen = _pick(backend, x)
    if chosen == "triton":
        from . import triton_hash_gather

        out = triton_hash_gather.forward_int8(flat, records, num_bits, weighting, temperature)
    elif chosen == "cpu" and (library := _native(flat, records)) is not None:
        num_cols = records.shape[1] - SCALE_BYTES
        found = native_hash_gather.gather(library, flat, records, num_cols, num_bits, weighting, temperature)
        out = _finite(found, flat)
    else:
        rows, weights = _hash(flat, num_bits, weighting, temperature)
        if chosen == "cpu":
            out = cpu_hash_gather.forward_int8(records, rows, weights)
        else:
            out = torch.einsum("tk,tkh->th", weights.float(), dequantise_rows(records[rows]))
    return out.view(*x.shape[:-1], records.shape[1] - SCALE_BYTES)


def _check(x: Tensor, num_bits: int, weighting: str, temperature: float) -> None:
    if not isinstance(num_bits, int) or not 1 <= num_bits <= MAX_BITS:
        raise ValueError(
            f"num_bits {num_bits} is not between 1 and {MAX_BITS}; a table of 2^num_bits rows doubles with every bit"
        )
    if weighting not in get_args(Weighting):
        raise ValueError(f"weighting {weighting!r} is not one of {', '.join(map(repr, get_args(Weighting)))}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not a number above 0")
    if x.dtype not in _DTYPES or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be (..., d) floating point with d of at least 1, got {tuple(x.shape)} {x.dtype}")


def _refuse_nan(x: Tensor) -> None:
    """On the CPU, as with indices; on a GPU it would wait for the device, and the weights carry NaN to the output."""
    # infinity has a finite weight in `paper`, so that the activations are looked at
    if x.device.type != "cpu" or torch.compiler.is_compiling() or math.isfinite(x.detach().sum(dtype=torch.float32)):
        return
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(_not_finite(bad, x))


def _not_finite(bad: int, x: Tensor) -> str:
    return (
        f"{bad} of {x.numel()} activations are NaN or infinite and have no bucket; the training diverged or the "
        f"input is damaged (lower the learning rate, clip gradients)"
    )


def _native(x: Tensor, table: Tensor | None = None) -> ctypes.CDLL | None:
    """The C++ kernels where they are built and can do this: no gradient, sums in float32, no compiler that traces."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return None
    if table is not None and (table.dtype == torch.float64 or (torch.is_grad_enabled() and table.requires_grad)):
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    return cpu_kernels()


def _finite(found: _Found | None, x: Tensor) -> _Found:
    if found is None:
        raise ValueError(_not_finite(int((~torch.isfinite(x)).sum()), x))
    return found


def _pick(backend: Backend | None, x: Tensor) -> Backend:
    device = x.device.type
    if backend is None:
        if device == "cpu":
            return "cpu"
        return "triton" if device == "cuda" and find_spec("triton") is not None else "reference"
    if backend not in get_args(Backend):
        raise ValueError(f"backend {backend!r} is not one of {', '.join(map(repr, get_args(Backend)))}")
    if backend == "cpu" and device != "cpu":
        raise ValueError(f"backend 'cpu' needs tensors on the CPU, these are on {x.device}; leave backend at None")
    if backend == "triton" and device != "cuda":
        if find_spec("triton") is None:
            raise ValueError("backend 'triton' needs the triton package, which is not installed; leave backend at None")
        from .triton_hash_gather import INTERPRETED

        if not INTERPRETED:
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, these are on {x.device}; "
                "leave backend at None, or set TRITON_INTERPRET=1 before the program starts"
            )
    return backend


def _hash(x: Tensor, num_bits: int, weighting: Weighting, temperature: float) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu" and x.dim() == 2 and (library := _native(x)) is not None:
        return _finite(native_hash_gather.sign_hash(library, x, num_bits, weighting, temperature), x)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if x.device.type == "cpu" and x.dim() == 2 and not needs_grad and not torch.compiler.is_compiling():
        rows, weights = cpu_hash_gather.hash_rows(x, num_bits, weighting, temperature)
        _refuse_nan(x)
        return rows, weights
    z, padding = split(x, num_bits)
    rows = sign_codes(z.detach())
    rows = rows + torch.arange(0, rows.shape[-1] << num_bits, 1 << num_bits, device=x.device)
    if needs_grad:
        weights = _BucketWeights.apply(z, padding, weighting, temperature)
    else:
        weights = bucket_weights(z, padding, weighting, temperature)
    _refuse_nan(x)
    return rows, weights


def weight_gradient(z: Tensor, padding: int, weighting: Weighting, temperature: float) -> Tensor:
    """Derivative of each weight by the values of its sub-vector, (..., K, num_bits); 0 where a value is 0.

    `paper`: sign(z_i) p (2/t) sigmoid(-2 |z_i| / t); `l1`: sign(z_i) p (1 + |z|_1 (2/t) sigmoid(-2 |z_i| / t)).
    """
    size = z.abs()
    p = torch.sigmoid(size * (2 / temperature)).prod(-1, keepdim=True)
    slope = torch.sigmoid(size * (-2 / temperature)) * (2 / temperature)
    slope = 1 + size.sum(-1, keepdim=True) * slope if weighting == "l1" else slope
    gradient = z.sign() * p * slope
    if padding:
        gradient[..., -1, :] *= 2.0**padding
    return gradient


class _BucketWeights(torch.autograd.Function):
    """`bucket_weights` that keeps the sub-vectors only and recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, padding: int, weighting: Weighting, temperature: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.how = padding, weighting, temperature
        return bucket_weights(z, padding, weighting, temperature)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return weight_gradient(z, *ctx.how).mul_(grad.unsqueeze(-1)), None, None, None


class _FusedHashGather(torch.autograd.Function):
    """The Triton path: keeps the input and the rows, so that no bit can flip when weights are recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        table: Tensor,
        num_bits: int,
        weighting: Weighting,
        temperature: float,
        sparse_grad: bool,
    ) -> Tensor:
        from . import triton_hash_gather

        out, rows = triton_hash_gather.forward(x, table, num_bits, weighting, temperature)
        ctx.save_for_backward(x, table, rows)
        ctx.how, ctx.sparse_grad = (num_bits, weighting, temperature), sparse_grad
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from . import triton_hash_gather

        x, table, rows = ctx.saved_tensors
        needs_x, needs_table = ctx.needs_input_grad[:2]
        grad_x = triton_hash_gather.grad_input(grad, x, table, rows, *ctx.how) if needs_x else None
        grad_table = None
        if needs_table and ctx.sparse_grad:
            num_bits, *how = ctx.how
            weights = bucket_weights(*split(x, num_bits), *how)
            grad_table = sparse_table_gradient(grad, table, rows, weights, "triton")
        elif needs_table:
            grad_table = triton_hash_gather.grad_table(grad, x, table, rows, *ctx.how)
        return grad_x, grad_table, None, None, None, None
