"""What a feed-forward layer may know about the tokens beside their hidden states."""

from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.weighted_gather import Segments, sort_segments


class DistinctTokens(NamedTuple):
    """The distinct token ids of a micro-batch.

    ids: (U,) sorted; inverse: (B*T,) position of each token's id in `ids`; embeddings: (U, d) with gradient.
    """

    ids: Tensor
    inverse: Tensor
    embeddings: Tensor


class TokenContext:
    """Made once per forward pass and handed to every layer.

    Args:
        input_ids: (B, T), or None when the caller passed embeddings.
        embeddings: (B, T, d), output of the embedding before any layer.
        embed: the embedding module.
        attention_mask: (B, T) with 0 at padding, when the caller passed one of that shape.
    """

    def __init__(
        self,
        input_ids: Tensor | None,
        embeddings: Tensor,
        embed: Callable[[Tensor], Tensor],
        attention_mask: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.embeddings = embeddings
        self._embed = embed
        self.attention_mask = attention_mask
        self.losses: dict[str, list[Tensor]] = defaultdict(list)
        # values that one layer computes and later layers use again, by name
        self.shared: dict[str, Any] = {}

    @cached_property
    def segments(self) -> Segments:
        """Tokens sorted by distinct id, for backward passes that sum over equal ids."""
        return sort_segments(self.distinct.inverse, len(self.distinct.ids))

    @cached_property
    def distinct(self) -> DistinctTokens:
        """Distinct ids of the micro-batch with their embeddings."""
        assert self.input_ids is not None
        ids, inverse = torch.unique(self.input_ids, return_inverse=True)
        return DistinctTokens(ids, inverse.reshape(-1), self._embed(ids))

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add one layer's auxiliary loss; the model sums over layers."""
        self.losses[name].append(value)
