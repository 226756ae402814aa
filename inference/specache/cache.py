"""The cache that transformers' models and `generate` are given."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .accounting import CacheShape
from .attention import LayerAttention
from .device_store import DeviceStore
from .host_store import HostRows, check_host_memory
from .options import SpeCacheOptions
from .plan import Phase, Plan
from .prefetch import Prefetcher
from .statistics import SpeCacheStatistics
from .support import check_config, check_model

_USE = "model.generate(..., past_key_values=SpeCache(model.config), custom_generate=specache_generate)"


class SpeCache(Cache):
    """Keys and values in host memory, a low-bit copy on the device, and the rows that the next token will need.

    Usage: `model.generate(**inputs, past_key_values=SpeCache(model.config, bits=2), custom_generate=specache_generate)`,
    or `generate_with_specache(model, **inputs, bits=2)`. A cache serves one batch; it may be given to `generate` again
    with a longer prompt, or be emptied with `reset()`.

    Args:
        config: The model's configuration.
        **options: The fields of `SpeCacheOptions`.

    Attributes:
        options: The settings.
        statistics: Forward passes, bytes moved, hits.

    Raises:
        ValueError: A setting is out of range, or the model has layers that the method does not cover.
    """

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        self.options = SpeCacheOptions(**options)
        check_config(config, self.options)
        self.config = config.get_text_config(decoder=True)
        super().__init__(layers=[SpeCacheLayer(self, index) for index in range(self.config.num_hidden_layers)])
        self.statistics = SpeCacheStatistics()
        self.current_layer = 0
        self._forget()

    def _forget(self) -> None:
        self._lengths: list[int] = []
        self._padding: tuple[int, ...] = ()
        self._columns = 0
        self._capacity = 0
        self._pinned = False
        self._plan: Plan | None = None
        self._prefetcher: Prefetcher | None = None

    def __repr__(self) -> str:
        return f"SpeCache(tokens={self._lengths}, {self.options})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed columns, padding included, as in the attention mask. A speculative token never counts."""
        return self._columns

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take a layer's new keys and values (B, N, Q, D); called by the model.

        Returns:
            In a prefill all keys and values in full precision, (B, N, columns, D); in decoding the new ones.

        Raises:
            ValueError: The call did not come from `specache_generate`, or the shapes are not the configuration's.
        """
        if self._plan is None:
            raise ValueError(f"SpeCache decodes in passes of its own: use {_USE}")
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {layer_idx} has keys {tuple(key_states.shape)} and values {tuple(value_states.shape)}: "
                "SpeCache needs them of one size"
            )
        self.current_layer = layer_idx
        layer = self.layers[layer_idx]
        if self._plan.phase == "prefill":
            return layer.prefill(key_states, value_states, self._plan)
        layer.own = (key_states, value_states)
        return key_states, value_states

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: what was quantised cannot go back into the residual."""
        raise ValueError("SpeCache cannot remove tokens: assisted decoding and cropping need another cache")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not supported: beams would move the whole host store at every step."""
        raise ValueError("SpeCache does not support beam search: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported."""
        raise ValueError("SpeCache cannot repeat sequences: expand the inputs before the prefill")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported."""
        raise ValueError("SpeCache cannot drop sequences of a batch: start a new cache")

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        self.close()
        for layer in self.layers:
            layer.reset()
        self.statistics = SpeCacheStatistics()
        self._forget()

    def close(self) -> None:
        """End the worker thread. A cache that is used again starts a new one."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def __del__(self) -> None:
        prefetcher = getattr(self, "_prefetcher", None)
        if prefetcher is not None:
            prefetcher.close()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence, padding not counted."""
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens per sequence that there is room for."""
        return self._capacity

    @property
    def device_bytes(self) -> int:
        """Bytes that the cache holds on the device, counted over its tensors."""
        return sum(layer.store.nbytes for layer in self.layers if layer.store is not None)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host store."""
        return sum(layer.host.nbytes for layer in self.layers if layer.host is not None)

    def reserve(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Take host memory for a whole generation; the device's part is taken layer by layer in the prefill.

        Args:
            batch: Sequences.
            capacity: Tokens per sequence that will be stored.
            dtype: The model's dtype.
            device: Where the model computes.

        Raises:
            ValueError: The host store would not fit, or the batch differs from what is stored.
        """
        if self._lengths and len(self._lengths) != batch:
            raise ValueError(f"the cache holds {len(self._lengths)} sequences, this batch has {batch}: use a new cache")
        if self._lengths and capacity <= self._capacity:
            return
        shape = CacheShape.of(self.config, dtype)
        # while a layer grows, its old store is still there
        growing = shape.host_bytes(batch, self._capacity) // shape.num_layers if self._lengths else 0
        taken = self.host_bytes
        check_host_memory(
            shape.host_bytes(batch, capacity) + growing - (taken if self.options.host_limit_bytes is None else 0),
            self.options.host_limit_bytes,
            f"SpeCache for {batch} sequences of {capacity} tokens",
        )
        self._pinned = device.type == "cuda"
        asynchronous = self.options.prefetch == "async" or (self.options.prefetch is None and self._pinned)
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(
                asynchronous=asynchronous, statistics=self.statistics, measure=self.options.measure
            )
        self._prefetcher.drain()
        for layer in self.layers:
            layer.reserve(batch, capacity, shape, dtype=dtype, pinned=self._pinned)
        self._capacity = capacity

    @contextmanager
    def forward_pass(
        self,
        phase: Phase,
        num_queries: int,
        *,
        device: torch.device,
        padding: tuple[int, ...] | None = None,
    ) -> Iterator[Plan]:
        """One forward pass of the model; lengths advance when it ends without an error.

        Args:
            phase: What the pass is for.
            num_queries: Columns that the model is given.
            device: The device of the model's inputs.
            padding: In the first prefill: padding columns left of each sequence.
        """
        if self._plan is not None:
            raise ValueError("this SpeCache is already inside a forward pass: give every generation its own cache")
        if not self._lengths:
            assert padding is not None, "the first pass tells the padding"
            self._lengths, self._padding = [0] * len(padding), padding
        self._plan = Plan(phase, tuple(self._lengths), num_queries, self.options.residual_length, self._padding, device)
        try:
            yield self._plan
        finally:
            plan, self._plan = self._plan, None
            for layer in self.layers:
                layer.own = None
        if phase == "prefill":
            self._columns += num_queries
            self._lengths = [max(self._columns - pad, 0) for pad in self._padding]
            self.statistics.prefills += 1
        elif plan.commits:
            self._columns += 1
            self._lengths = [length + 1 for length in self._lengths]
            self.statistics.steps += 1
        else:
            self.statistics.pre_decodes += 1

    def attend(
        self, module: torch.nn.Module, query: torch.Tensor, *, scaling: float | None, softcap: float | None
    ) -> torch.Tensor:
        """One layer's decoding attention, the choice of the next rows, and the commit: (B, H, Q, D) to (B, Q, H, D)."""
        plan, layer = self._plan, self.layers[self.current_layer]
        assert plan is not None and layer.own is not None, "update comes before attend"
        output = layer.attend(module, query, plan.on(query.device), scaling=scaling, softcap=softcap)
        return output.transpose(1, 2).contiguous()

    def full_precision(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Committed keys and values of a layer from the host store, (B, N, columns, D) each, zeros at padding."""
        if self._prefetcher is not None:
            self._prefetcher.drain()
        return self.layers[layer_index].from_host(self._columns, self._padding)

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that this cache was not made for, or whose attention cannot be routed to it.

        Raises:
            ValueError: It has other layers, or does not call the registered attention interface.
        """
        check_model(model, self.config)


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

    def __init__(self, cache: SpeCache, index: int) -> None:
        super().__init__()
        # no cycle: the memory goes with the last reference to the cache, not with some later garbage collection
        self._cache, self.index = weakref.ref(cache), index
        self.host: HostRows | None = None
        self.store: DeviceStore | None = None
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        self._capacity = 0

    @property
    def cache(self) -> SpeCache:
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
        prefetcher = self.cache._prefetcher
        assert prefetcher is not None and self.host is not None, "reserve comes before the prefill"
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
        prefetcher, options, store = self.cache._prefetcher, self.cache.options, self.store
        assert prefetcher is not None and self.host is not None and store is not None and self.own is not None
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
