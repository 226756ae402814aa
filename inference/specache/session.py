"""The passes of one generation: prefill, pre-decode, and steps of two tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import OBSERVED, specache_attention
from .decoding_cache import DecodingCache

# what draws a token: (ids so far (B, T), logits (B, V), whether it is speculative) to (B,) tokens
Draw = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def left_padding(attention_mask: torch.Tensor | None, batch: int, num_columns: int) -> tuple[int, ...]:
    """Padding columns left of each sequence.

    Args:
        attention_mask: (B, columns), or None where nothing is padded.
        batch: B.
        num_columns: Columns that the mask must have.

    Raises:
        ValueError: A sequence is padded on the right or inside, is empty, or the mask has another form.
    """
    if attention_mask is None:
        return (0,) * batch
    if attention_mask.dim() != 2 or attention_mask.shape != (batch, num_columns):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; this cache needs ({batch}, {num_columns}): one column "
            "for every token of the prompt and of the cache"
        )
    mask = attention_mask.bool().cpu()
    counts = mask.sum(1)
    padding = num_columns - counts
    for sequence, pad in enumerate(padding.tolist()):
        if pad == num_columns:
            raise ValueError(f"sequence {sequence} of the batch is padding only: remove it")
        if not mask[sequence, pad:].all():
            raise ValueError(
                f"sequence {sequence} of the batch is padded on the right or inside: this cache needs padding on the "
                "left (tokenizer.padding_side = 'left')"
            )
    return tuple(padding.tolist())


class SpeCacheSession:
    """One batch on its way through a model.

    `prefill` once, then `step` for every further token, inside `decoding()`.

    Args:
        model: A decoder.
        cache: The cache.

    Attributes:
        speculative: (B,) the guess at the token after the one that the next step is given, or None.
        guessed: (B,) the guess that went along in the last step, until it was observed.

    Raises:
        ValueError: The cache does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, cache: DecodingCache) -> None:
        cache.check_model(model)
        # its generation methods come from a mixin that its type does not name
        self.model: Any = model
        self.cache = cache
        self.speculative: torch.Tensor | None = None
        self.guessed: torch.Tensor | None = None
        self.model_kwargs: dict[str, Any] = {}

    def prefill(
        self,
        input_ids: torch.Tensor,
        *,
        capacity: int,
        chunk_size: int | None = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Run the prompt through the model in full precision, with the model's own attention.

        Args:
            input_ids: (B, columns): the prompt. Where the cache already holds its beginning, either the whole or only
                what is new; `attention_mask` then tells which.
            capacity: Columns that will be stored in all, padding included; memory is taken for them now.
            chunk_size: Tokens per forward pass; None for all at once.
            **model_kwargs: Further inputs, as `generate` hands them to a decoding loop.

        Returns:
            Logits (B, V) of the first new token.

        Raises:
            ValueError: The prompt is empty, longer than the model's maximum, or not padded on the left; the host store
                does not fit.
        """
        cache, model = self.cache, self.model
        model_kwargs = {**model_kwargs, "past_key_values": cache, "use_cache": True}
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        past, given = cache.get_seq_length(), (input_ids if embeds is None else embeds)
        num_columns = given.shape[1]
        if past and not (mask is not None and mask.shape[1] > num_columns):
            num_new = num_columns - past
        else:
            num_new, num_columns = num_columns, num_columns + past
        if num_new < 1:
            raise ValueError(f"the prompt has {num_new + past} tokens, {past} of them are in the cache: nothing is new")
        limit = getattr(cache.config, "max_position_embeddings", None)
        if limit is not None and num_columns > limit:
            raise ValueError(f"the prompt has {num_columns} tokens, the model's maximum is {limit}: shorten it")
        padding = left_padding(mask, given.shape[0], num_columns)
        if past and len(padding) == len(cache.lengths) and padding != cache.padding:
            raise ValueError("attention_mask has other padding than when the cache was filled: keep it as it was")
        cache.reserve(given.shape[0], max(capacity, num_columns), dtype=model.dtype, device=given.device)
        if embeds is not None and chunk_size is not None:
            raise ValueError("prefill_chunk_size does not go with inputs_embeds: leave one out")
        if not cache.takes_parts and (past or (chunk_size or num_new) < num_new):
            raise ValueError(
                f"{type(cache).__name__} has dropped earlier tokens, so that a prompt must come whole: leave out "
                "prefill_chunk_size, and start every turn with a new cache"
            )
        chunk_size = chunk_size or num_new
        observing = specache_attention(model, OBSERVED) if cache.observes_prefill else nullcontext()
        for start in range(0, num_new, chunk_size):
            num_tokens = min(chunk_size, num_new - start)
            end = num_columns - num_new + start + num_tokens
            part = dict(model_kwargs)
            if mask is not None:
                part["attention_mask"] = mask[:, :end]
            if (positions := part.get("position_ids")) is not None and end < num_columns:
                part["position_ids"] = positions[..., : positions.shape[-1] - (num_columns - end)]
            ids = input_ids if embeds is not None else input_ids[:, : input_ids.shape[1] - (num_columns - end)]
            inputs = model.prepare_inputs_for_generation(
                ids, next_sequence_length=num_tokens, is_first_iteration=True, **part
            )
            with observing, cache.forward_pass("prefill", num_tokens, device=given.device, padding=padding):
                outputs = model(**inputs, return_dict=True)
        model_kwargs.pop("inputs_embeds", None)
        self.model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        self.speculative = self.guessed = None
        return outputs.logits[:, -1]

    def adopt(self, attention_mask: torch.Tensor) -> None:
        """Go on from a cache that was filled without this session, instead of `prefill`.

        Args:
            attention_mask: (B, columns) of what the cache holds.
        """
        positions = (attention_mask.long().cumsum(1) - 1).clamp_min(0)
        kwargs = {
            "past_key_values": self.cache,
            "use_cache": True,
            "attention_mask": attention_mask,
            "position_ids": positions,
            "logits_to_keep": 1,
        }
        self.model_kwargs = self.model._update_model_kwargs_for_generation({}, kwargs)
        self.speculative = self.guessed = None

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Within it the model attends through the cache."""
        with specache_attention(self.model):
            yield

    def step(self, input_ids: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Process the last token of `input_ids`, which is stored, and return the logits (B, V) of the next.

        In speculative mode the pass also carries the guess at the next token, which chooses the rows to fetch and
        draws the guess after it. Before the first step one extra pass makes the first guess.

        Args:
            input_ids: (B, T) all ids so far; the last column is new.
            draw: Draws a token from logits.
        """
        if not self.cache.speculative:
            return self._forward(input_ids, "step")[:, -1]
        if self.speculative is None:
            guess = draw(input_ids, self._forward(input_ids, "pre_decode")[:, -1], True)
        else:
            guess = self.speculative
        pair = torch.cat([input_ids, guess[:, None]], dim=1)
        logits = self._forward(pair, "step")
        self.guessed, self.speculative = guess, draw(pair, logits[:, -1], True)
        return logits[:, -2]

    def observe(self, tokens: torch.Tensor) -> None:
        """Count whether the guess that went along in the last step was the token (B,) that its logits led to."""
        if self.guessed is not None:
            self.cache.statistics.add_hits(self.guessed == tokens)
            self.guessed = None

    def _forward(self, input_ids: torch.Tensor, phase: str) -> torch.Tensor:
        cache, model = self.cache, self.model
        num_queries = 2 if phase == "step" and cache.speculative else 1
        kwargs = dict(self.model_kwargs)
        if num_queries == 2:
            # the guess's own column
            kwargs = model._update_model_kwargs_for_generation({}, kwargs)
        if "logits_to_keep" in kwargs:
            kwargs["logits_to_keep"] = num_queries
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=num_queries, **kwargs)
        with cache.forward_pass(phase, num_queries, device=input_ids.device):  # type: ignore[arg-type]
            outputs = model(**inputs, return_dict=True)
        if phase == "step":
            self.model_kwargs = model._update_model_kwargs_for_generation(outputs, self.model_kwargs)
        return outputs.logits
