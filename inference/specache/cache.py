"""The cache that transformers' models and `generate` are given."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from .accounting import CacheShape
from .decoding_cache import DecodingCache
from .host_store import check_host_memory
from .layer import SpeCacheLayer
from .options import SpeCacheOptions
from .prefetch import Prefetcher
from .support import check_config


class SpeCache(DecodingCache):
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

    layers: list[SpeCacheLayer]

    def __init__(self, config: PreTrainedConfig, **options: Any) -> None:
        self.options = SpeCacheOptions(**options)
        check_config(config, self.options)
        config = config.get_text_config(decoder=True)
        super().__init__(config, [SpeCacheLayer(self, index) for index in range(config.num_hidden_layers)])

    def _forget(self) -> None:
        super()._forget()
        self._pinned = False
        self._prefetcher: Prefetcher | None = None

    def __repr__(self) -> str:
        return f"SpeCache(tokens={self._lengths}, {self.options})"

    @property
    def speculative(self) -> bool:  # type: ignore[override]
        """Whether a step carries a guess at the next token."""
        return self.options.mode == "speculative"

    @property
    def greedy_guesses(self) -> bool:  # type: ignore[override]
        """Whether guesses are the likeliest token whatever the output's rule."""
        return self.options.speculation == "greedy"

    @property
    def speculation_seed(self) -> int:  # type: ignore[override]
        """Seed of the generator that draws guesses."""
        return self.options.speculation_seed

    @property
    def _plan_residual(self) -> int:
        return self.options.residual_length

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

    def full_precision(self, layer_index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Committed keys and values of a layer from the host store, (B, N, columns, D) each, zeros at padding."""
        if self._prefetcher is not None:
            self._prefetcher.drain()
        return self.layers[layer_index].from_host(self._columns, self._padding)
