"""CPU path: the hash in a handful of torch calls, the rows through `embedding_bag`, for few tokens on all threads."""

from functools import lru_cache

import torch
from torch import Tensor

from ..weighted_gather import weighted_gather


@lru_cache(maxsize=64)
def _bag_starts(num_bags: int, num_terms: int, parts: int) -> Tensor:
    """Where bags begin when the terms of each token are dealt out to `parts` bags."""
    with torch.inference_mode(False):
        within = torch.arange(parts) * num_terms // parts
        return (torch.arange(num_bags)[:, None] * num_terms + within).reshape(-1)


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
    parts = _parts(num_tokens, num_terms) if num_tokens else 1
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        records,
        rows.reshape(-1),
        _bag_starts(num_tokens, num_terms, parts),
        False,
        0,
        False,
        weights.float().reshape(-1),
        None,
        False,
    )
    return sums.view(num_tokens, parts, -1).sum(1) if parts > 1 else sums
