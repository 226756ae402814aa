"""One layer of a SpeCache: what it does in a prefill and in a decoding pass."""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .accounting import CacheShape
from .attention import LayerAttention
from .device_store import DeviceStore
from .host_store import HostRows
from .plan import Plan

if TYPE_CHECKING:
    from .cache import SpeCache


class SpeCacheLayer(CacheLayerMixin):
    """One layer of a `SpeCache`: its host and device stores.

    Args:
        cache: The cache it belongs to.
        index: Its place in the model.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: "SpeCache", index: int) -> None:
        super().__init__()
        # no cycle: the memory goes with the last reference to the cache, not with some later garbage collection
        self._cache, self.index = weakref.ref(cache), index
        self.host: HostRows | None = None
        self.store: DeviceStore | None = None
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        self._capacity = 0

    @property
    def cache(self) -> "SpeCache":
        """The cache it belongs to."""
        cache = self._cache()
        assert cache is not None, "a layer does not outlive its cache"
        return cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: `reserve` and the prefill take the memory."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and where they begin."""
        return self.cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Committed columns."""
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        """-1: the stores grow when a longer generation is reserved."""
        return -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SpeCache.update` for this layer."""
        return self.cache.update(key_states, value_states, self.index)

    def reset(self) -> None:
        """Give the memory back."""
        self.host, self.store, self.own, self._capacity, self.is_initialized = None, None, None, 0, False

    def reserve(self, batch: int, capacity: int, shape: CacheShape, *, dtype: torch.dtype, pinned: bool) -> None:
        """Take or enlarge the host store, and enlarge the device store where there is one."""
        if self.host is None:
            self.host = HostRows(batch, capacity, shape.num_heads, shape.head_dim, dtype=dtype, pinned=pinned)
        elif capacity > self._capacity:
            self.host = self.host.grown(capacity, self._capacity, pinned=pinned)
            if self.store is not None:
                self.store.grow(capacity)
        self._capacity = capacity

    def prefill(self, keys: torch.Tensor, values: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a part of the prompt; return all keys and values so far, exact, for this layer's attention only."""
        prefetcher = self.cache.prefetcher
        assert self.host is not None, "reserve comes before the prefill"
        batch, num_heads, _, head_dim = keys.shape
        if self.host.rows.shape[2:] != (num_heads, 2, head_dim) or self.host.rows.dtype != keys.dtype:
            raise ValueError(
                f"layer {self.index} has {num_heads} key/value heads of {head_dim} channels in {keys.dtype}, the "
                f"configuration and the model say {self.host.rows.shape[2]} of {self.host.rows.shape[4]} in "
                f"{self.host.rows.dtype}: give SpeCache the model's own configuration, without autocast"
            )
        if self.store is None:
            self.store = DeviceStore(
                self.cache.options, batch, num_heads, head_dim, self._capacity, dtype=keys.dtype, device=keys.device
            )
            self.is_initialized = True
        past = None
        if any(plan.lengths):
            # before this part is added
            past = self.cache.full_precision(self.index)
        groups: dict[tuple[int, int], list[int]] = {}
        columns = self.cache.get_seq_length()
        for sequence, (length, pad) in enumerate(zip(plan.lengths, plan.padding, strict=True)):
            skip = max(pad - columns, 0)
            groups.setdefault((length, skip), []).append(sequence)
            prefetcher.store_prompt(self.host, sequence, length, keys[sequence, :, skip:], values[sequence, :, skip:])
        for (length, skip), members in groups.items():
            sequences: list[int] | slice = slice(None) if len(members) == batch else members
            self.store.append(keys[sequences][:, :, skip:], values[sequences][:, :, skip:], sequences, length)
        if past is None:
            return keys, values
        past_keys, past_values = (tensor.to(keys.device) for tensor in past)
        return torch.cat([past_keys, keys], dim=2), torch.cat([past_values, values], dim=2)

    def from_host(self, columns: int, padding: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Committed keys and values at their columns."""
        assert self.host is not None, "nothing is stored"
        rows = self.host.rows
        batch, _, num_heads, _, head_dim = rows.shape
        placed = rows.new_zeros(batch, columns, num_heads, 2, head_dim)
        for sequence, pad in enumerate(padding):
            placed[sequence, pad:] = rows[sequence, : max(columns - pad, 0)]
        return placed[..., 0, :].transpose(1, 2), placed[..., 1, :].transpose(1, 2)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        plan: Plan,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """See `SpeCache.attend`; (B, H, Q, D) to the same shape."""
        prefetcher, options, store = self.cache.prefetcher, self.cache.options, self.store
        assert self.host is not None, "reserve comes before decoding"
        assert store is not None, "a prefill comes before decoding"
        assert self.own is not None, "update comes before attend"
        key, value = self.own
        layer = LayerAttention(store, plan, options, query, key, value, scaling=scaling, softcap=softcap)
        dense = options.attention == "dense"
        prefetcher.wait(self.index, store.fetched.device)
        if options.mode == "exact_fetch" and store.indices.shape[2]:
            # chosen by this token itself among what it sees in low bits; the thread then waits for the rows
            weights = (
                layer.dense_weights(layer.dense(use_fetched=False)[0]) if dense else layer.weights(use_fetched=False)
            )
            store.indices.copy_(layer.choose(weights, 0, before_commit=True))
            prefetcher.advance(self.index, self.host, store, token=None, slots=[], fetch=True)
            prefetcher.wait(self.index, store.fetched.device)
        use_fetched = plan.phase == "step"
        if dense:
            keys, values = layer.dense(use_fetched=use_fetched)
            output = layer.dense_output(module, keys, values)
        else:
            weights = layer.weights(use_fetched=use_fetched)
            output = layer.output(weights, use_fetched=use_fetched)
        selects = options.mode == "speculative" and store.indices.shape[2] > 0
        if selects:
            if dense:
                weights = layer.dense_weights(keys)
            if options.measure and plan.commits:
                self._measure(layer.choose(weights, 0, before_commit=True), store.indices)
            store.indices.copy_(layer.choose(weights, query.shape[2] - 1, before_commit=False))
        token, slots = None, list(plan.lengths)
        if plan.commits:
            # the first token only: the second is a guess
            token = torch.stack([key[:, :, 0], value[:, :, 0]], dim=2)
            store.append_token(key[:, :, 0], value[:, :, 0], plan)
        prefetcher.advance(self.index, self.host, store, token=token, slots=slots, fetch=selects)
        return output

    def _measure(self, wanted: torch.Tensor, fetched: torch.Tensor) -> None:
        """Count the rows that this token would have chosen itself, and how many of them were there."""
        valid = wanted >= 0
        covered = ((wanted.unsqueeze(3) == fetched.unsqueeze(2)).any(3) & valid).sum()
        self.cache.statistics.add_coverage(covered, int(valid.sum()))
