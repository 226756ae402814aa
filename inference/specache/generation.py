"""Decoding with a SpeCache: the loop for `generate`, one call that does both, and teacher-forced decoding."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from .cache import SpeCache
from .decoding_cache import DecodingCache
from .session import SpeCacheSession

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def generate_with_specache(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    cache: SpeCache | None = None,
    specache: dict[str, Any] | None = None,
    streamer: "BaseStreamer | None" = None,
    **generate_kwargs: Any,
) -> Any:
    """`model.generate` with a SpeCache of its own.

    Args:
        model: A decoder whose layers all have full attention.
        inputs: (B, T) prompt ids, padded on the left; or pass `input_ids=` and `attention_mask=`.
        cache: A cache to use, for its statistics or a further turn; None for a new one.
        specache: Options of the new cache, the fields of `SpeCacheOptions`.
        streamer: Receives output tokens as they come.
        **generate_kwargs: Everything else that `generate` takes.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: As `SpeCache` and `specache_generate`, or both `cache` and `specache` are given.
    """
    if cache is not None and specache:
        raise ValueError("cache and specache were both given: options belong to a new cache, leave one out")
    own = cache is None
    if cache is None:
        cache = SpeCache(model.config, **(specache or {}))
    arguments = {"custom_generate": partial(specache_generate, streamer=streamer), "streamer": streamer}
    try:
        # it comes from a mixin that the type does not name
        return model.generate(inputs, past_key_values=cache, **arguments, **generate_kwargs)  # type: ignore[operator]
    finally:
        if own:
            cache.close()


@torch.no_grad()
def specache_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: "BaseStreamer | None" = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """The decoding loop for `model.generate(..., custom_generate=specache_generate)`: greedy search and sampling.

    Algorithms 1 to 3 of the paper. Every step gives exactly one token; the speculative one only chooses which rows to
    fetch, it is never stored and never an output.

    Args:
        model: A decoder.
        input_ids: (B, T) prompt.
        logits_processor: Prepared by `generate`.
        stopping_criteria: Prepared by `generate`.
        generation_config: Prepared by `generate`.
        streamer: Receives output tokens; `generate` does not hand its own on, `generate_with_specache` does.
        **model_kwargs: Further model inputs, among them the cache as `past_key_values`: a `SpeCache` or
            another `DecodingCache`.

    Returns:
        (B, T + new) ids, or with `return_dict_in_generate` also scores, logits and the cache.

    Raises:
        ValueError: `past_key_values` is no such cache, the generation mode is neither greedy search nor sampling, or
            attentions or hidden states are asked for.
    """
    cache = model_kwargs.pop("past_key_values", None)
    if not isinstance(cache, DecodingCache):
        raise ValueError(f"specache_generate needs past_key_values=SpeCache(model.config), got {type(cache).__name__}")
    _check_generation(generation_config, type(cache).__name__)
    for name in ("use_cache", "output_attentions", "output_hidden_states"):
        model_kwargs.pop(name, None)
    sampling, as_dict = generation_config.do_sample, generation_config.return_dict_in_generate
    guesses = torch.Generator(input_ids.device).manual_seed(cache.speculation_seed)

    def draw_scores(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        return logits_processor(ids, scores)  # type: ignore[arg-type]

    def pick(scores: torch.Tensor, speculative: bool) -> torch.Tensor:
        if not sampling or (speculative and cache.greedy_guesses):
            return scores.argmax(-1)
        generator = guesses if speculative else None
        return torch.multinomial(scores.softmax(-1), 1, generator=generator).squeeze(1)

    def draw(ids: torch.Tensor, logits: torch.Tensor, speculative: bool) -> torch.Tensor:
        return pick(draw_scores(ids, logits), speculative)

    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    pad = generation_config._pad_token_tensor
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.long, device=input_ids.device)
    all_scores: tuple[torch.Tensor, ...] = ()
    all_logits: tuple[torch.Tensor, ...] = ()
    session = SpeCacheSession(model, cache)
    logits = session.prefill(
        input_ids,
        # the last token is an output only
        capacity=generation_config.max_length - 1,
        chunk_size=generation_config.prefill_chunk_size,
        **model_kwargs,
    )
    with session.decoding():
        while True:
            scores = draw_scores(input_ids, logits)
            if as_dict and generation_config.output_scores:
                all_scores += (scores,)
            if as_dict and generation_config.output_logits:
                all_logits += (logits.to(copy=True, dtype=torch.float32),)
            tokens = pick(scores, False)
            if has_eos and pad is not None:
                tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
            session.observe(tokens)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            if streamer is not None:
                streamer.put(tokens.cpu())
            unfinished = unfinished & ~stopping_criteria(input_ids, all_scores or None)
            if unfinished.max() == 0:
                break
            logits = session.step(input_ids, draw)
    if streamer is not None:
        streamer.end()
    if not as_dict:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,  # type: ignore[arg-type]
        scores=all_scores or None,  # type: ignore[arg-type]
        logits=all_logits or None,  # type: ignore[arg-type]
        past_key_values=cache,
    )


def _check_generation(config: GenerationConfig, name: str) -> None:
    if (config.num_beams or 1) > 1:
        raise ValueError(f"num_beams is {config.num_beams}: {name} does not support beam search, use num_beams=1")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"generation mode {mode.value} is not supported with {name}: use greedy search or sampling")
    for output in ("output_attentions", "output_hidden_states"):
        if getattr(config, output):
            raise ValueError(f"{output} is not supported with {name}: attention weights are never whole in memory")


@torch.no_grad()
def decode_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    continuation: torch.Tensor,
    *,
    cache: Cache,
    attention_mask: torch.Tensor | None = None,
    guesses: "Iterable[torch.Tensor] | None" = None,
) -> torch.Tensor:
    """Logits of given tokens as decoding would compute them: the prompt is prefilled, then token by token.

    A plain forward pass never reads the low-bit copy, so this is the only honest way to score text with a cache that
    loses something.

    Args:
        model: A decoder.
        input_ids: (B, T) prompt, padded on the left.
        continuation: (B, C) tokens to score, C at least 1.
        cache: The cache, empty: one of ours, or any of transformers'.
        attention_mask: (B, T).
        guesses: (B,) speculative tokens to use in place of the model's own, first come first used.

    Returns:
        (B, C, V): position c predicts token c of the continuation.

    Raises:
        ValueError: As `SpeCacheSession.prefill`, or there is no continuation.
    """
    if continuation.dim() != 2 or continuation.shape[1] < 1 or continuation.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"continuation is {tuple(continuation.shape)}; it must be ({input_ids.shape[0]}, at least 1 token)"
        )
    if cache.get_seq_length():
        raise ValueError(f"the cache holds {cache.get_seq_length()} tokens already: use a new one")
    if not isinstance(cache, DecodingCache):
        return _plain_logits(model, input_ids, continuation, cache, attention_mask)
    session = SpeCacheSession(model, cache)
    given = iter(guesses) if guesses is not None else iter(())
    total = input_ids.shape[1] + continuation.shape[1]
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    # padding has no position of its own
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits = [
        session.prefill(input_ids, capacity=total - 1, attention_mask=mask, position_ids=positions, logits_to_keep=1)
    ]
    ids = input_ids

    def draw(_: torch.Tensor, scores: torch.Tensor, __: bool) -> torch.Tensor:
        guess = next(given, None)
        return scores.argmax(-1) if guess is None else guess

    with session.decoding():
        for column in range(continuation.shape[1] - 1):
            ids = torch.cat([ids, continuation[:, column : column + 1]], dim=1)
            logits.append(session.step(ids, draw))
            session.observe(continuation[:, column + 1])
    return torch.stack(logits, dim=1)


def _plain_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    continuation: torch.Tensor,
    cache: Cache,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """As `decode_logits`, with a cache that the model's own attention reads."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    mask = torch.cat([mask, torch.ones_like(continuation)], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    logits, start, given = [], 0, input_ids
    for column in range(continuation.shape[1]):
        end = start + given.shape[1]
        output = model(
            given,
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits.append(output.logits[:, -1])
        start, given = end, continuation[:, column : column + 1]
    return torch.stack(logits, dim=1)
