"""Plain torch formulation of the sign hash and the gather behind it, any device and dtype, differentiable by autograd.

Source: MemoryFormer, arXiv 2411.12992, section 2.2; the released code for the weighting `l1` and the bit order.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..weighted_gather.reference import weighted_gather_reference

MAX_BITS = 16
Weighting = Literal["l1", "paper"]


def num_tables(width: int, num_bits: int) -> int:
    """Sub-vectors of `num_bits` values that `width` values are cut into, K; the last one may be shorter."""
    return -(-width // num_bits)


def split(x: Tensor, num_bits: int) -> tuple[Tensor, int]:
    """Sub-vectors (..., K, num_bits) in the dtype of the sums, padded with zeros, and how many zeros those are."""
    padding = -x.shape[-1] % num_bits
    z = x if x.dtype == torch.float64 else x.float()
    if padding:
        z = F.pad(z, (0, padding))
    return z.unflatten(-1, (z.shape[-1] // num_bits, num_bits)), padding


def sign_codes(z: Tensor) -> Tensor:
    """Bucket of each sub-vector: (..., K, num_bits) to (..., K) int64, most significant bit first.

    A bit is 1 where the value is at least 0; -0.0 is 0, NaN gives 0. deviation: equation 4 as printed has the least
    significant bit first, the paper's figures and the released code the most significant.
    """
    powers = 2.0 ** torch.arange(z.shape[-1] - 1, -1, -1, dtype=torch.float32, device=z.device)
    # float products, exact to 16 bits: integer ones are slow on CPUs and missing on GPUs
    return torch.mv((z >= 0).float().flatten(0, -2), powers).long().view(z.shape[:-1])


def bucket_weights(z: Tensor, padding: int, weighting: Weighting, temperature: float) -> Tensor:
    """Weight of each sub-vector's row: (..., K, num_bits) to (..., K).

    `paper`: p = prod_i sigmoid(2 |z_i| / t), the largest of a softmax over all sign patterns s with scores <z, s> / t.
    `l1`: p * sum_i |z_i|, as in the released code.
    """
    size = z.abs()
    p = torch.sigmoid(size * (2 / temperature)).prod(-1)
    weights = p * size.sum(-1) if weighting == "l1" else p
    if padding:
        # every zero of the padding brought a factor of one half
        weights = torch.cat([weights[..., :-1], weights[..., -1:] * 2.0**padding], dim=-1)
    return weights


def hash_gather_reference(
    x: Tensor, table: Tensor, num_bits: int, weighting: Weighting = "paper", temperature: float = 1.0
) -> Tensor:
    """Sum over sub-vectors of their bucket's row times their weight: (T, d) and (K * 2^num_bits, H) to (T, H)."""
    z, padding = split(x, num_bits)
    rows = sign_codes(z) + torch.arange(z.shape[-2], device=x.device) * 2**num_bits
    return weighted_gather_reference(table, rows, bucket_weights(z, padding, weighting, temperature))
