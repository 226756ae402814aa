"""Which floating-point format a machine computes in: bfloat16 where it is fast, float32 elsewhere."""

import torch


def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have instructions of their own here, on a GPU or through oneDNN on a CPU.

    Without them torch's products in bfloat16 ran a hundred times slower than in float32 (a CPU with AVX2 only), and to
    win against them says nothing.
    """
    return torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def compute_dtype() -> torch.dtype:
    """bfloat16, or float32 where that is faster."""
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def dtype_name() -> str:
    """Name of `compute_dtype` as cases and table files have it."""
    return str(compute_dtype()).removeprefix("torch.")
