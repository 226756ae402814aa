"""What a cache costs in bytes, from its shape alone."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ...kernels.low_bit_kv import packed_bytes
from .options import SpeCacheOptions


@dataclass(frozen=True)
class CacheShape:
    """Sizes of a model's keys and values.

    Attributes:
        num_layers: Attention layers.
        num_heads: Key/value heads per layer.
        head_dim: Channels per head.
        itemsize: Bytes of a number in the model's dtype.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype) -> "CacheShape":
        """Read the sizes from a model's configuration."""
        config = config.get_text_config(decoder=True)
        num_query_heads = config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or num_query_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_query_heads
        return cls(config.num_hidden_layers, num_heads, head_dim, dtype.itemsize)

    def full_bytes(self, batch: int, num_tokens: int) -> int:
        """Bytes of a plain cache of `num_tokens` tokens for each sequence."""
        return batch * num_tokens * self.num_layers * self.num_heads * self.head_dim * 2 * self.itemsize

    def host_bytes(self, batch: int, capacity_tokens: int) -> int:
        """Bytes of the host store: the whole cache in full precision."""
        return self.full_bytes(batch, capacity_tokens)

    def device_bytes(self, options: SpeCacheOptions, batch: int, capacity_tokens: int) -> int:
        """Bytes of everything a SpeCache keeps on the device.

        Codes, scales and zeros of all tokens that can have left the residual, the residual, and the top-k rows with
        their indices (4 bytes each).
        """
        residual = options.residual_length
        per_head = packed_bytes(
            capacity_tokens // residual * residual,
            self.head_dim,
            bits=options.bits,
            group_size=options.group_size,
            per="channel",
            itemsize=self.itemsize,
        )
        per_head += packed_bytes(
            max(capacity_tokens - residual, 0),
            self.head_dim,
            bits=options.bits,
            group_size=options.group_size,
            per="token",
            itemsize=self.itemsize,
        )
        per_head += 2 * self.head_dim * self.itemsize * residual
        per_head += (2 * self.head_dim * self.itemsize + 4) * min(options.num_fetched, capacity_tokens)
        return batch * self.num_layers * self.num_heads * per_head

    def held_bytes(self, batch: int, num_tokens: int, *, scored: bool) -> int:
        """Bytes of `num_tokens` tokens in full precision, each with a 4-byte score per head if `scored`."""
        return self.full_bytes(batch, num_tokens) + batch * num_tokens * self.num_layers * self.num_heads * 4 * scored

    def fetched_bytes_per_step(self, options: SpeCacheOptions, batch: int, capacity_tokens: int) -> int:
        """Bytes of rows that one decoding step copies from host to device."""
        rows = min(options.num_fetched, capacity_tokens)
        return batch * self.num_layers * self.num_heads * rows * 2 * self.head_dim * self.itemsize
