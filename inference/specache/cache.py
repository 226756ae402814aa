"""The cache that transformers' models and `generate` are given."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .accounting import CacheShape
from .attention import attending
from .host_store import check_host_memory
from .layer import SpeCacheLayer
from .options import SpeCacheOptions
from .plan import Phase, Plan
from .prefetch import Prefetcher
from .statistics import SpeCacheStatistics
from .support import check_config, check_model

_USE = "model.generate(..., past_key_values=SpeCache(model.config), custom_generate=specache_generate)"


class SpeCache(Cache):
    """Keys and values in host memory, a low-bit copy on the device, and the rows that the next token will need.

    Usage: `model.generate(**inputs, past_key_values=SpeCache(model.config), custom_generate=specache_generate)`, or
    `generate_with_specache(model, **inputs)`. A cache serves one batch; it may be given to `generate` again with a
    longer prompt, or be emptied with `reset()`.

    Args:
        config: The model's configuration.
        **options: The fields of `SpeCacheOptions`.

    Attributes:
        options: The settings.
        statistics: Forward passes, bytes moved, hits.

    Raises:
        ValueError: A setting is out of range, or the model has layers that the method does not cover.
    """

    layers: list[SpeCacheLayer]  # type: ignore[assignment]

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
    def prefetcher(self) -> Prefetcher:
        """The traffic between host and device; there from `reserve` on."""
        assert self._prefetcher is not None, "reserve comes first"
        return self._prefetcher

    @property
    def padding(self) -> tuple[int, ...]:
        """Padding columns left of each sequence."""
        return self._padding

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
            with attending(self):
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
        assert plan is not None, "attention was called outside a forward pass"
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
