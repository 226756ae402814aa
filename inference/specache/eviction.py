"""Caches that keep a fixed number of tokens and drop the rest: what SpeCache is compared with at equal device bytes."""

import weakref
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin

from ...kernels.low_bit_kv.reference import accumulation_dtype
from .decoding_cache import DecodingCache
from .plan import Plan
from .support import check_layers

# queries whose attention weights are in memory at once while a prompt is observed
_OBSERVED_QUERIES = 256


class EvictingCache(DecodingCache):
    """Holds at most `budget` tokens per sequence, layer and key/value head; the prompt itself is read in full.

    The last tokens lie in a ring, the others in places of their own: which tokens have these is a subclass's matter.
    Keys keep the positions that they were stored with.

    Args:
        config: The model's configuration.
        budget: Tokens held.
        num_kept: Places outside the ring.

    Raises:
        ValueError: A number is out of range, or the model has layers that are not full attention.
    """

    takes_parts = False

    def __init__(self, config: PreTrainedConfig, *, budget: int, num_kept: int) -> None:
        name = type(self).__name__
        check_layers(config, name)
        if budget < 1:
            raise ValueError(f"budget is {budget}; {name} must hold at least 1 token")
        if not 0 <= num_kept < budget:
            raise ValueError(f"{num_kept} of {budget} tokens are kept for good; give 0 to {budget - 1}")
        config = config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and budget > limit:
            raise ValueError(f"budget is {budget}, larger than the model's context of {limit} tokens: lower it")
        self.budget, self.num_kept = budget, num_kept
        super().__init__(config, [EvictingLayer(self) for _ in range(config.num_hidden_layers)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(tokens={self._lengths}, budget={self.budget}, kept={self.num_kept})"

    @property
    def device_bytes(self) -> int:
        """Bytes that the cache holds on the device, counted over its tensors."""
        held = (tensor for layer in self.layers for tensor in (layer.keys, layer.values, layer.scores))
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def reserve(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Note how long it will get; each layer takes its memory in the prefill."""
        self._capacity = max(self._capacity, capacity)


class WindowCache(EvictingCache):
    """The first tokens and the most recent ones, after StreamingLLM (arXiv 2309.17453, section 3.2).

    deviation: the paper counts positions inside the cache, so that a text may be longer than the model's context. Here
    keys keep their own positions: texts are within the context, as for every cache that this one is compared with.

    Args:
        config: The model's configuration.
        budget: Tokens held per sequence, layer and key/value head.
        num_sinks: How many of them are the first ones (the paper's 4).

    Raises:
        ValueError: As `EvictingCache`.
    """

    def __init__(self, config: PreTrainedConfig, *, budget: int, num_sinks: int = 4) -> None:
        super().__init__(config, budget=budget, num_kept=num_sinks)


class HeavyHitterCache(EvictingCache):
    """The most recent tokens, and those that got the most attention so far, after H2O (arXiv 2306.14048, section 4).

    A token's score is the sum of all attention weights that it got, over the queries of the prompt and every token
    since, and over the query heads that share its key/value head. When a token leaves the recent ones, the one with
    the smallest score among it and the heavy hitters is dropped (algorithm 1).

    deviation: the prompt is read in full and the heavy hitters are chosen at its end, as in the authors' released code;
    algorithm 1 drops tokens inside the prompt as well.

    Args:
        config: The model's configuration.
        budget: Tokens held per sequence, layer and key/value head.
        num_recent: How many of them are the last ones; half by default, as in the paper.

    Raises:
        ValueError: As `EvictingCache`.
    """

    observes_prefill = True

    def __init__(self, config: PreTrainedConfig, *, budget: int, num_recent: int | None = None) -> None:
        super().__init__(config, budget=budget, num_kept=budget // 2 if num_recent is None else budget - num_recent)


class EvictingLayer(CacheLayerMixin):
    """One layer of an `EvictingCache`.

    Args:
        cache: The cache it belongs to.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: EvictingCache) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.reset()

    @property
    def cache(self) -> EvictingCache:
        """The cache it belongs to."""
        cache = self._cache()
        assert cache is not None, "a layer does not outlive its cache"
        return cache

    def reset(self) -> None:
        """Give the memory back."""
        self.keys: torch.Tensor | None = None  # (B, N, W, D)
        self.values: torch.Tensor | None = None
        self.scores: torch.Tensor | None = None  # (B, N, W), of a HeavyHitterCache
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None
        self._prompt: tuple[torch.Tensor, torch.Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the prefill takes the memory."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask covers, and where they begin."""
        return self.cache.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Committed columns."""
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        """-1: any number of tokens may pass through."""
        return -1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `EvictingCache.update` for this layer."""
        return self.cache.update(key_states, value_states, self.cache.layers.index(self))

    def prefill(self, keys: torch.Tensor, values: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what will be held of the prompt (B, N, T, D), at once or when its attention has been seen."""
        if self.cache.observes_prefill:
            self._prompt = keys, values
        else:
            self._hold(keys, values, plan.padding, None)
        return keys, values

    def observe(self, query: torch.Tensor, key: torch.Tensor, plan: Plan, *, scaling: float | None) -> None:
        """Sum the prompt's attention weights per token, then keep the heavy hitters."""
        self.hold_prompt(attention_received(query, key, plan.padding, scaling=scaling), plan.padding)

    def hold_prompt(self, received: torch.Tensor, padding: tuple[int, ...]) -> None:
        """Keep the heavy hitters of the prompt, given the attention (B, N, T) that its tokens got."""
        assert self._prompt is not None, "update comes before observe"
        (keys, values), self._prompt = self._prompt, None
        self._hold(keys, values, padding, received)

    def _hold(
        self, keys: torch.Tensor, values: torch.Tensor, padding: tuple[int, ...], received: torch.Tensor | None
    ) -> None:
        """Keep `budget` tokens of every sequence: the last, and the first or those with the most attention."""
        batch, num_heads, columns, head_dim = keys.shape
        width, num_kept = self._sizes()
        shape = (batch, num_heads, width)
        self.keys, self.values = keys.new_zeros(*shape, head_dim), values.new_zeros(*shape, head_dim)
        if received is not None:
            self.scores = torch.zeros(shape, dtype=received.dtype, device=keys.device)
        for sequence, pad in enumerate(padding):
            length = columns - pad
            own = None if received is None else received[sequence, :, pad:]
            slots = self._held_slots(length, width, num_kept, own)
            slots = slots.to(keys.device).expand(num_heads, -1) + pad
            places = slots.shape[1]
            index = slots.unsqueeze(2).expand(-1, -1, head_dim)
            self.keys[sequence, :, :places] = keys[sequence].gather(1, index)
            self.values[sequence, :, :places] = values[sequence].gather(1, index)
            if self.scores is not None and received is not None:
                self.scores[sequence, :, :places] = received[sequence].gather(1, slots)
        self.is_initialized = True

    def _sizes(self) -> tuple[int, int]:
        """Places in all, and outside the ring."""
        cache = self.cache
        return min(cache.budget, cache.capacity), min(cache.num_kept, cache.capacity)

    @staticmethod
    def _held_slots(length: int, width: int, num_kept: int, received: torch.Tensor | None) -> torch.Tensor:
        """(N or 1, places) which token of a prompt lies at each place."""
        if length <= width:
            return torch.arange(length).unsqueeze(0)
        ring = width - num_kept
        last = torch.arange(length - ring, length)
        in_ring = torch.empty_like(last)
        in_ring[(last - num_kept) % ring] = last
        if received is None:
            return torch.cat([torch.arange(num_kept), in_ring]).unsqueeze(0)
        heavy = received[:, : length - ring].topk(num_kept, dim=1, sorted=False).indices
        return torch.cat([heavy, in_ring.to(heavy.device).expand(heavy.shape[0], -1)], dim=1)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        plan: Plan,
        *,
        scaling: float | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """One token (B, H, 1, D) over what is held and itself; it is then held, and another is dropped."""
        assert self.own is not None, "update comes before attend"
        assert self.keys is not None, "a prefill comes before decoding"
        assert self.values is not None, "a prefill comes before decoding"
        key, value = self.own
        batch, num_heads, width, head_dim = self.keys.shape
        dtype = accumulation_dtype(query.dtype)
        rows = query.reshape(batch, num_heads, -1, head_dim).to(dtype)  # (B, N, G, D)
        keys = torch.cat([self.keys, key], dim=2).to(dtype)
        values = torch.cat([self.values, value], dim=2).to(dtype)
        scores = rows @ keys.transpose(2, 3) * (head_dim**-0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        places = torch.arange(width + 1, device=query.device)
        there = (places < plan.lengths_tensor.unsqueeze(1)) | (places == width)
        weights = scores.masked_fill(~there[:, None, None], -torch.inf).softmax(3)
        output = (weights @ values).reshape(batch, -1, 1, head_dim).to(query.dtype)
        received = weights.sum(2)
        if self.scores is not None:
            self.scores += received[..., :width]
        self._replace(key[:, :, 0], value[:, :, 0], received[..., width], plan)
        return output

    def _replace(self, key: torch.Tensor, value: torch.Tensor, received: torch.Tensor, plan: Plan) -> None:
        """Hold a token (B, N, D); the one in its place of the ring may take the place of a lighter one."""
        assert self.keys is not None, "a prefill comes before decoding"
        assert self.values is not None, "a prefill comes before decoding"
        batch, _, width, _ = self.keys.shape
        num_kept = min(self._sizes()[1], width - 1)
        lengths = plan.lengths_tensor
        place = torch.where(lengths < num_kept, lengths, num_kept + (lengths - num_kept) % (width - num_kept))
        sequences = torch.arange(batch, device=key.device)
        if self.scores is not None:
            if num_kept:
                self._promote(sequences, place, lengths >= width, num_kept)
            self.scores[sequences, :, place] = received
        self.keys[sequences, :, place], self.values[sequences, :, place] = key, value

    def _promote(self, sequences: torch.Tensor, place: torch.Tensor, full: torch.Tensor, num_kept: int) -> None:
        """Let the token that leaves the ring replace the lightest of those kept, where it is heavier."""
        assert self.keys is not None, "a prefill comes before decoding"
        assert self.values is not None, "a prefill comes before decoding"
        assert self.scores is not None, "only scored tokens compete"
        leaving = self.scores[sequences, :, place]  # (B, N)
        lightest = self.scores[..., :num_kept].min(2)
        sequence, head = ((leaving > lightest.values) & full.unsqueeze(1)).nonzero(as_tuple=True)
        target, source = lightest.indices[sequence, head], place[sequence]
        for tensor in (self.keys, self.values, self.scores):
            tensor[sequence, head, target] = tensor[sequence, head, source]


def attention_received(
    query: torch.Tensor, key: torch.Tensor, padding: tuple[int, ...], *, scaling: float | None
) -> torch.Tensor:
    """Sums of causal attention weights that each token gets from all later ones and itself.

    Args:
        query: (B, H, T, D).
        key: (B, N, T, D).
        padding: Padding columns left of each sequence; they neither give nor get.
        scaling: Factor on the scores; None for `D ** -0.5`.

    Returns:
        (B, N, T), summed over the query heads of each key/value head.
    """
    batch, num_heads, columns, head_dim = key.shape
    dtype = accumulation_dtype(query.dtype)
    factor = head_dim**-0.5 if scaling is None else scaling
    rows = query.unflatten(1, (num_heads, -1))  # (B, N, G, T, D)
    pads = torch.tensor(padding, device=key.device).view(-1, 1, 1)
    places = torch.arange(columns, device=key.device)
    total = torch.zeros(batch, num_heads, columns, dtype=dtype, device=key.device)
    padded = any(padding)
    for start in range(0, columns, _OBSERVED_QUERIES):
        part = rows[:, :, :, start : start + _OBSERVED_QUERIES].to(dtype) * factor
        end = start + part.shape[3]
        scores = part @ key[:, :, None, :end].to(dtype).transpose(3, 4)
        # only the last block holds columns that are later than some query
        later = places[start:end] > places[start:end, None]
        scores[..., start:].masked_fill_(later, -torch.inf)
        if padded:
            unseen = (places[:end] < pads) | (places[start:end, None] < pads)
            # a padding column sees itself, and what it gives is dropped
            unseen &= places[:end] != places[start:end, None]
            scores.masked_fill_(unseen[:, None, None], -torch.inf)
        weights = scores.softmax(4)
        if padded:
            weights.masked_fill_((places[start:end, None] < pads)[:, None, None], 0.0)
        total[..., :end] += weights.sum((2, 3))
    return total
