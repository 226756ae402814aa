"""What a lookup is keyed by: the token's id, or a hash of the last few ids (arXiv 2503.15798 has the first only).

Keys of n-grams need the ids before the current ones, which a decoding step does not get: `TokenHistory` keeps them.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ..decoder.tokens import TokenHistory

Key = Literal["token_id", "ngram_hash"]
# odd constants of 64-bit multiplicative hashing (the golden ratio's and splitmix's), as signed numbers
_STEP, _MIX = -7046029254386353131, -4658895280553007687
_SHIFT = 31


def ngram_keys(ids: Tensor, *, order: int, num_keys: int) -> Tensor:
    """Keys (B, T - order + 1) of the n-grams that end at each position of (B, T) ids; equal n-grams have equal keys.

    deviation: n-gram tables in the literature (arXiv 2601.07372) use several hashes per position; this is one.
    """
    windows = ids.unfold(1, order, 1)
    state = torch.zeros_like(windows[..., 0])
    for place in range(order):
        state = (state ^ (windows[..., place] + 1)) * _STEP
        state = (state ^ (state >> _SHIFT)) * _MIX
    # the low bits of a product depend on few bits of its factors
    return (state >> 16 & 2**47 - 1).remainder(num_keys)


def keys_of(
    ids: Tensor, key: Key, *, order: int, num_keys: int, cache: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Keys (B, T) of a forward pass.

    Args:
        ids: (B, T) token ids.
        key: `token_id` or `ngram_hash`.
        order: ids in an n-gram, the current one included.
        num_keys: rows of the table.
        cache: of keys and values, when decoding.
        mask: (B, S) attention mask; ids at its zeros are as if they were not there.
    """
    if key == "token_id":
        return ids
    num_rows, num_tokens = ids.shape
    # one below every id: in front of a text, and where it is padded
    absent = torch.full((num_rows, order - 1), -1, dtype=ids.dtype, device=ids.device)
    if mask is not None and mask.dim() == 2:
        ids = ids.masked_fill(mask[:, -num_tokens:] == 0, -1)
    before = absent
    if cache is not None:
        seen = TokenHistory.of(cache).extend(ids, cache.get_seq_length())
        before = torch.cat([absent, seen], dim=1)[:, seen.shape[1] :]
    return ngram_keys(torch.cat([before, ids], dim=1), order=order, num_keys=num_keys)
