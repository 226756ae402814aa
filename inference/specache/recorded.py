"""One prefill for many caches: a comparison reads a prompt once, and all start from the same keys and values."""

import weakref
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from .decoding_cache import DecodingCache
from .eviction import EvictingLayer, attention_received
from .plan import Plan
from .session import SpeCacheSession
from .support import check_layers


class RecordedPrompt(DecodingCache):
    """A prompt's keys and values in full precision, the attention that its tokens got, and the logits after it.

    Made by `record_prompt`. It does not decode; it fills caches that do.

    Args:
        config: The model's configuration.

    Attributes:
        attention_mask: (B, T).
        logits: (B, V) of the first new token.
    """

    takes_parts = False
    observes_prefill = True

    def __init__(self, config: PreTrainedConfig) -> None:
        check_layers(config, "RecordedPrompt")
        config = config.get_text_config(decoder=True)
        super().__init__(config, [_RecordedLayer(self) for _ in range(config.num_hidden_layers)])
        self.attention_mask = torch.empty(0, 0, dtype=torch.long)
        self.logits = torch.empty(0, 0)

    def reserve(self, batch: int, capacity: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Nothing to take: the model's own tensors are kept."""

    def fill(self, cache: Cache, *, capacity: int) -> None:
        """Put the prompt into an empty cache, as a prefill would have.

        Args:
            cache: One of ours, or any of transformers'.
            capacity: Columns that will be stored in all, the prompt's included.

        Raises:
            ValueError: The cache is not empty, or has no room in memory.
        """
        if cache.get_seq_length():
            raise ValueError(f"the cache holds {cache.get_seq_length()} tokens already: use a new one")
        if not isinstance(cache, DecodingCache):
            for number, layer in enumerate(self.layers):
                cache.update(layer.keys.clone(), layer.values.clone(), number)
            return
        first = self.layers[0].keys
        batch, _, columns, _ = first.shape
        cache.reserve(batch, max(capacity, columns), dtype=first.dtype, device=first.device)
        with cache.forward_pass("prefill", columns, device=first.device, padding=self.padding):
            for number, layer in enumerate(self.layers):
                cache.update(layer.keys, layer.values, number)
                target = cache.layers[number]
                if cache.observes_prefill and isinstance(target, EvictingLayer):
                    target.hold_prompt(layer.received, self.padding)


class _RecordedLayer(CacheLayerMixin):
    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: RecordedPrompt) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.reset()

    def reset(self) -> None:
        self.keys = self.values = self.received = torch.empty(0)
        self.own: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        cache = self._cache()
        return 0 if cache is None else cache.get_seq_length()

    def get_max_length(self) -> int:
        return -1

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a recorded prompt does not decode: fill another cache from it")

    def prefill(self, keys: torch.Tensor, values: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys, self.values = keys, values
        return keys, values

    def observe(self, query: torch.Tensor, key: torch.Tensor, plan: Plan, *, scaling: float | None) -> None:
        self.received = attention_received(query, key, plan.padding, scaling=scaling)


@torch.no_grad()
def record_prompt(
    model: PreTrainedModel, input_ids: torch.Tensor, *, attention_mask: torch.Tensor | None = None
) -> RecordedPrompt:
    """Run a prompt through a model once.

    Args:
        model: A decoder whose layers all have full attention.
        input_ids: (B, T), padded on the left.
        attention_mask: (B, T).

    Raises:
        ValueError: As `SpeCacheSession.prefill`.
    """
    prompt = RecordedPrompt(model.config)
    prompt.attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    positions = (prompt.attention_mask.long().cumsum(1) - 1).clamp_min(0)
    prompt.logits = SpeCacheSession(model, prompt).prefill(
        input_ids,
        capacity=input_ids.shape[1],
        attention_mask=prompt.attention_mask,
        position_ids=positions,
        logits_to_keep=1,
    )
    return prompt


@torch.no_grad()
def decode_recorded(
    model: PreTrainedModel,
    prompt: RecordedPrompt,
    cache: Cache,
    *,
    num_tokens: int | None = None,
    stop_ids: tuple[int, ...] = (),
    continuation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode greedily, or along a given continuation, from a recorded prompt.

    Args:
        model: The model that the prompt was recorded with.
        prompt: The prompt.
        cache: An empty cache, of ours or of transformers'.
        num_tokens: Longest greedy continuation, C.
        stop_ids: Tokens that end a sequence; decoding ends when all have ended.
        continuation: (B, C) tokens to feed in place of the model's own.

    Returns:
        Tokens (B, C') and their logits (B, C', V); after its stop a sequence goes on with what the model says.

    Raises:
        ValueError: Neither or both of `num_tokens` and `continuation` are given, or as `RecordedPrompt.fill`.
    """
    if (num_tokens is None) == (continuation is None):
        raise ValueError("give num_tokens for a greedy continuation, or continuation, not both")
    length = continuation.shape[1] if continuation is not None else int(num_tokens or 0)
    columns = prompt.attention_mask.shape[1]
    prompt.fill(cache, capacity=columns + length - 1)
    kind: Any = _OwnSteps if isinstance(cache, DecodingCache) else _PlainSteps
    ended = torch.zeros(prompt.logits.shape[0], dtype=torch.bool, device=prompt.logits.device)
    stops = torch.tensor(stop_ids, device=ended.device)
    tokens: list[torch.Tensor] = []
    logits: list[torch.Tensor] = []
    current = prompt.logits
    with kind(model, cache, prompt.attention_mask) as steps:
        while True:
            token = continuation[:, len(tokens)] if continuation is not None else current.argmax(-1)
            steps.observe(token)
            tokens.append(token)
            logits.append(current)
            ended |= torch.isin(token, stops)
            if len(tokens) == length or bool(ended.all()):
                return torch.stack(tokens, dim=1), torch.stack(logits, dim=1)
            current = steps.next_logits(torch.stack(tokens, dim=1))


class _OwnSteps:
    """Steps of a cache that attends by itself."""

    def __init__(self, model: Any, cache: DecodingCache, mask: torch.Tensor) -> None:
        self.cache, self.mask = cache, mask
        self.session = SpeCacheSession(model, cache)
        self.session.adopt(mask)
        self.decoding = self.session.decoding()

    def __enter__(self) -> "_OwnSteps":
        self.decoding.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.decoding.__exit__(*error)
        self.cache.close()

    def observe(self, tokens: torch.Tensor) -> None:
        self.session.observe(tokens)

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after all new tokens (B, c), the last of which is stored now."""
        # of the prompt's ids only their number counts
        ids = torch.cat([torch.zeros_like(self.mask), tokens], dim=1)
        return self.session.step(ids, lambda _, scores, __: scores.argmax(-1))


class _PlainSteps:
    """Steps of a cache that the model's own attention reads."""

    def __init__(self, model: Any, cache: Cache, mask: torch.Tensor) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.first = mask.sum(1, keepdim=True)

    def __enter__(self) -> "_PlainSteps":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def observe(self, tokens: torch.Tensor) -> None:
        pass

    def next_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """As `_OwnSteps.next_logits`."""
        output = self.model(
            tokens[:, -1:],
            attention_mask=torch.cat([self.mask, torch.ones_like(tokens)], dim=1),
            position_ids=self.first + tokens.shape[1] - 1,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1]
