"""The public op: a weighted sum over rows that are stored as bytes."""

from importlib.util import find_spec

import torch
from torch import Tensor

from ..weighted_gather import Backend, weighted_gather_groups
from ..weighted_gather.segments import check_range
from .row_layout import RowLayout


def weighted_gather_records(
    records: Tensor, ids: Tensor, weights: Tensor, layout: RowLayout, *, backend: Backend | None = None
) -> Tensor:
    """Weighted sum of the N rows of a group that is stored as bytes: `out[t] = sum_n weights[t, n] * row[ids[t], n]`.

    The same as `weighted_gather_groups` over `layout.decode(records)`; on a GPU the values are decoded in registers, on
    the CPU once per record. The sum runs in float32, in float64 where rows or weights are. Gradients reach `weights`.

    Args:
        records: (U, layer_bytes) uint8, one layer of U records; contiguous rows, any stride between them.
        ids: (...) record numbers in [0, U), integer.
        weights: (..., N) factors, floating point.
        layout: of the records.
        backend: `triton` (CUDA, or any device under Triton's interpreter), `cpu`, or `reference` (plain torch).
            Default: `triton` on CUDA where Triton is installed, `cpu` on the CPU, else `reference`.

    Returns:
        (..., d) in the dtype of the sum.

    Raises:
        ValueError: shapes, dtypes or the backend do not fit, or on the CPU an id is out of range.
    """
    expected = (layout.layer_bytes, layout.num_experts)
    if records.dtype != torch.uint8 or records.dim() != 2 or (records.shape[1], weights.shape[-1]) != expected:
        raise ValueError(
            f"records must be (U, {expected[0]}) uint8 with weights (..., {expected[1]}) for this layout, got "
            f"{tuple(records.shape)} {records.dtype} with {tuple(weights.shape)}"
        )
    dtype = torch.float64 if "float64" in (layout.dtype, str(weights.dtype).removeprefix("torch.")) else torch.float32
    on_gpu = weights.device.type == "cuda" or backend == "triton"
    needs_gradient = torch.is_grad_enabled() and weights.requires_grad
    fused = backend in (None, "triton") and on_gpu and not needs_gradient and dtype == torch.float32
    if fused and find_spec("triton") is not None:
        from .triton_quantised_rows import forward

        check_range(ids, len(records), "ids")
        flat = weights.reshape(ids.numel(), layout.num_experts)
        out = forward(records, ids.reshape(-1), flat, layout)
        return out.view(*ids.shape, layout.hidden_size)
    # 16-bit rows are exact in float32, and a sum that is rounded to 16 bits would not be
    return weighted_gather_groups(layout.decode(records).to(dtype), ids, weights, backend=backend)
