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


class TokenHistory:
    """Token ids that a cache of keys and values has seen; they follow it when it is cut or its rows are reordered.

    Args:
        cache: what they belong to.
    """

    def __init__(self, cache: Any) -> None:
        self.ids: Tensor | None = None
        reorder = cache.reorder_cache

        def reorder_both(beams: Tensor) -> None:
            reorder(beams)
            if self.ids is not None:
                self.ids = self.ids.index_select(0, beams.to(self.ids.device))

        cache.reorder_cache = reorder_both

    @classmethod
    def of(cls, cache: Any) -> "TokenHistory":
        """The history of a cache; a new one where it has none."""
        if not hasattr(cache, "token_history"):
            cache.token_history = cls(cache)
        return cache.token_history

    def extend(self, ids: Tensor, num_seen: int) -> Tensor:
        """Add (B, T) ids behind the first `num_seen`, and return those.

        Raises:
            ValueError: the cache was filled without this history.
        """
        known = self.ids if self.ids is not None else ids[:, :0]
        if num_seen and (len(known) != len(ids) or known.shape[1] < num_seen):
            raise ValueError(
                f"the cache holds {num_seen} tokens whose ids are not known; keys of n-grams need a cache that this "
                f"model filled from the start"
            )
        # a cache that was cut is shorter than what was seen
        seen = known[:, :num_seen] if num_seen else ids[:, :0]
        self.ids = torch.cat([seen, ids], dim=1)
        return seen


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
        self._cache: Any = None
        self._num_seen = 0
        # values that one layer computes and later layers use again, by name
        self.shared: dict[str, Any] = {}

    def begin(self, cache: Any) -> None:
        """Remember the cache of keys and values, and how many tokens it holds before the first layer adds to it."""
        self._cache = cache
        self._num_seen = 0 if cache is None else cache.get_seq_length()

    def ids_with_history(self, num_before: int) -> Tensor:
        """Token ids (B, num_before + T) with those before the current ones, -1 where there are none or only padding.

        Ids of earlier passes are kept with the cache. Every pass of a model asks for the same number.

        Raises:
            ValueError: the caller passed embeddings, or the cache was filled by another model.
        """
        if self.input_ids is None:
            raise ValueError("keys made of token ids need input_ids; the model was given inputs_embeds")
        if "ids_with_history" not in self.shared:
            ids = self.input_ids
            if self.attention_mask is not None:
                ids = ids.masked_fill(self.attention_mask == 0, -1)
            before = ids.new_full((len(ids), num_before), -1)
            if self._cache is not None:
                seen = TokenHistory.of(self._cache).extend(ids, self._num_seen)
                before = torch.cat([before, seen], dim=1)[:, seen.shape[1] :]
            self.shared["ids_with_history"] = torch.cat([before, ids], dim=1)
        return self.shared["ids_with_history"]

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
