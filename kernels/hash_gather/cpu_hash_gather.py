"""CPU path: the hash in a handful of torch calls, the rows through `embedding_bag`, for few tokens on all threads."""

from functools import lru_cache

import torch
from torch import Tensor

from ..weighted_gather import weighted_gather
from .reference import Weighting, bucket_weights, split

# float32 holds row numbers exactly up to here
_EXACT_ROWS = 2**24


@lru_cache(maxsize=64)
def _bag_starts(num_bags: int, num_terms: int, parts: int) -> Tensor:
    """Where bags begin when the terms of each token are dealt out to `parts` bags."""
    with torch.inference_mode(False):
        within = torch.arange(parts) * num_terms // parts
        return (torch.arange(num_bags)[:, None] * num_terms + within).reshape(-1)


@lru_cache(maxsize=64)
def _constants(num_terms: int, num_bits: int) -> tuple[Tensor, Tensor]:
    """Powers of two of a sub-vector's bits, and the first row of every table: (num_bits,) and (K,) float32."""
    with torch.inference_mode(False):
        powers = 2.0 ** torch.arange(num_bits - 1, -1, -1, dtype=torch.float32)
        return powers, torch.arange(num_terms, dtype=torch.float32) * 2.0**num_bits


def hash_rows(x: Tensor, num_bits: int, weighting: Weighting, temperature: float) -> tuple[Tensor, Tensor]:
    """`sign_hash` of (T, d) without a gradient: for a few tokens the number of calls is the cost, so it is kept low."""
    z, padding = split(x, num_bits)
    num_tokens, num_terms, _ = z.shape
    powers, first = _constants(num_terms, num_bits)
    codes = torch.mv(z.ge(0).float().view(-1, num_bits), powers).view(num_tokens, num_terms)
    rows = (codes + first).long() if num_terms << num_bits <= _EXACT_ROWS else codes.long() + first.long()
    return rows, bucket_weights(z, padding, weighting, temperature)


def _parts(num_tokens: int, num_terms: int) -> int:
    """Bags per token: `embedding_bag` gives threads whole bags, so that a single token would run on one."""
    return max(1, min(num_terms, torch.get_num_threads() // num_tokens))


def forward(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """(T, H) sums of rows (T, K) without a gradient."""
    num_tokens, num_terms = rows.shape
    parts = _parts(num_tokens, num_terms) if num_tokens else 1
    # a small sum is done before a second thread is awake
    if parts == 1 or num_terms * table.shape[1] < 2**15 or table.dtype.itemsize == 8:
        return weighted_gather(table, rows, weights)
    starts = _bag_starts(num_tokens, num_terms, parts)
    weights = weights.to(table.dtype)
    sums = torch.embedding_bag(table, rows.reshape(-1), starts, False, 0, False, weights.reshape(-1), False)[0]
    return sums.view(num_tokens, parts, -1).sum(1)


def forward_int8(records: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """(T, H) float32 sums of decoded records, by FBGEMM's kernel in torch."""
    num_tokens, num_terms = rows.shape
    if torch.compiler.is_compiling():
        # the compiler asks for no number of threads
        parts, starts = 1, torch.arange(num_tokens) * num_terms
    else:
        parts = _parts(num_tokens, num_terms) if num_tokens else 1
        starts = _bag_starts(num_tokens, num_terms, parts)
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        records,
        rows.reshape(-1),
        starts,
        False,
        0,
        False,
        weights.float().reshape(-1),
        None,
        False,
    )
    return sums.view(num_tokens, parts, -1).sum(1) if parts > 1 else sums
