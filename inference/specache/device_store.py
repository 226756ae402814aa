"""One layer's tensors on the device: packed tokens, the exact residual, and the fetched rows."""

import torch

from ...kernels.low_bit_kv import LowBit, pack
from .options import SpeCacheOptions
from .plan import Plan

Sequences = list[int] | slice


class DeviceStore:
    """What a layer keeps on the device. The tensors here are all of it, and `nbytes` counts them.

    Args:
        options: The method's settings.
        batch: Sequences.
        num_heads: Key/value heads.
        head_dim: Channels per head.
        capacity: Tokens per sequence.
        dtype: The model's dtype.
        device: Where the layer computes.
    """

    def __init__(
        self,
        options: SpeCacheOptions,
        batch: int,
        num_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.options, self.capacity = options, capacity
        shape = (batch, num_heads)
        residual, fetched = options.residual_length, min(options.num_fetched, capacity)
        self.keys, self.values = self._packed(*shape, head_dim, capacity, dtype, device)
        # the token in slot s lies at s % residual_length
        self.residual_keys = torch.zeros(*shape, residual, head_dim, dtype=dtype, device=device)
        self.residual_values = torch.zeros(*shape, residual, head_dim, dtype=dtype, device=device)
        self.fetched = torch.zeros(*shape, fetched, 2, head_dim, dtype=dtype, device=device)
        self.indices = torch.full((*shape, fetched), -1, dtype=torch.int32, device=device)

    def _packed(
        self, batch: int, num_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[LowBit, LowBit]:
        residual, shape = self.options.residual_length, (batch, num_heads)
        kind = {"bits": self.options.bits, "group_size": self.options.group_size, "dtype": dtype, "device": device}
        keys = LowBit.empty(*shape, capacity // residual * residual, head_dim, per="channel", **kind)  # type: ignore[arg-type]
        values = LowBit.empty(*shape, max(capacity - residual, 0), head_dim, per="token", **kind)  # type: ignore[arg-type]
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        exact = (self.residual_keys, self.residual_values, self.fetched, self.indices)
        return self.keys.nbytes + self.values.nbytes + sum(tensor.nbytes for tensor in exact)

    def grow(self, capacity: int) -> None:
        """Make room for more tokens; what is stored stays."""
        batch, num_heads, _, head_dim = self.residual_keys.shape
        keys, values = self._packed(
            batch, num_heads, head_dim, capacity, self.residual_keys.dtype, self.residual_keys.device
        )
        for larger, smaller in ((keys, self.keys), (values, self.values)):
            if smaller.num_tokens:
                larger.write(smaller, slice(None), 0)
        fetched = min(self.options.num_fetched, capacity)
        rows = self.fetched.new_zeros(batch, num_heads, fetched, 2, head_dim)
        indices = self.indices.new_full((batch, num_heads, fetched), -1)
        rows[:, :, : self.fetched.shape[2]], indices[:, :, : self.indices.shape[2]] = self.fetched, self.indices
        self.keys, self.values, self.fetched, self.indices, self.capacity = keys, values, rows, indices, capacity

    def append(self, keys: torch.Tensor, values: torch.Tensor, sequences: Sequences, length: int) -> None:
        """Store any number of tokens (B', N, T, D) of sequences that have the same length so far."""
        residual = self.options.residual_length
        num_keys, num_values = length // residual * residual, max(length - residual, 0)
        held = torch.arange(num_values, length, device=keys.device) % residual
        late_keys = torch.cat([self.residual_keys[sequences][:, :, held[num_keys - num_values :]], keys], dim=2)
        late_values = torch.cat([self.residual_values[sequences][:, :, held], values], dim=2)
        after = length + keys.shape[2]
        leaving = after // residual * residual - num_keys
        if leaving:
            self.keys.write(self._pack_keys(late_keys[:, :, :leaving]), sequences, num_keys)
        leaving = max(after - residual, 0) - num_values
        if leaving:
            self.values.write(self._pack_values(late_values[:, :, :leaving]), sequences, num_values)
        recent = min(residual, keys.shape[2])
        places = torch.arange(after - recent, after, device=keys.device) % residual
        for kept, new in ((self.residual_keys, keys), (self.residual_values, values)):
            part = kept[sequences]
            part[:, :, places] = new[:, :, -recent:]
            kept[sequences] = part

    def append_token(self, key: torch.Tensor, value: torch.Tensor, plan: Plan) -> None:
        """Store one token (B, N, D) per sequence; lengths may differ."""
        residual, lengths = self.options.residual_length, plan.lengths
        batch = torch.arange(len(lengths), device=key.device)
        places = plan.lengths_tensor % residual
        full = [index for index, length in enumerate(lengths) if length >= residual]
        if full:
            # the value in the new token's place is the one that leaves
            chosen = batch if len(full) == len(lengths) else torch.tensor(full, device=key.device)
            leaving = self._pack_values(self.residual_values[chosen, :, places[chosen]].unsqueeze(2))
            slots = plan.value_lengths[chosen]
            self.values.codes[chosen, :, slots] = leaving.codes[:, :, 0]
            self.values.scale[chosen, :, slots] = leaving.scale[:, :, 0]
            self.values.zero[chosen, :, slots] = leaving.zero[:, :, 0]
        self.residual_keys[batch, :, places] = key
        self.residual_values[batch, :, places] = value
        blocks: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            if (length + 1) % residual == 0:
                blocks.setdefault(length + 1 - residual, []).append(index)
        for first, members in blocks.items():
            sequences: Sequences = slice(None) if len(members) == len(lengths) else members
            self.keys.write(self._pack_keys(self.residual_keys[sequences]), sequences, first)

    def _pack_keys(self, keys: torch.Tensor) -> LowBit:
        return self._pack(keys, "channel")

    def _pack_values(self, values: torch.Tensor) -> LowBit:
        return self._pack(values, "token")

    def _pack(self, x: torch.Tensor, per: str) -> LowBit:
        options = self.options
        return pack(
            x,
            bits=options.bits,
            group_size=options.group_size,
            per=per,  # type: ignore[arg-type]
            rule=options.rule,
            backend=options.backend,
        )
