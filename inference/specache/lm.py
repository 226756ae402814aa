"""lm-eval's model interface with a cache that loses something: generation through it, likelihoods never beside it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional as F

from ..evals.model_lm import NOT_FINITE, TransformersLM
from .decoding_cache import DecodingCache
from .facts import add_facts, cache_facts
from .generation import decode_logits
from .registry import build_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Likelihood = Literal["refuse", "decode"]


class SpeCacheLM(TransformersLM):
    """A model as lm-eval sees it, answering through a cache by name.

    `generate_until` tasks go through the cache, batch by batch, each with a new one. Log-likelihood tasks are one plain
    forward pass in lm-eval, which reads no cache: whatever the cache, the score would be the full model's. They are
    therefore refused, or computed token by token.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        cache: Name of the cache, see `CACHES`.
        cache_options: Its options.
        likelihood: `refuse` log-likelihood requests, or `decode`: prefill the context, then feed the continuation
            token by token through the cache. Slow, and one request at a time.
        **options: As `TransformersLM`.

    Raises:
        ValueError: As `build_cache`, at once and not with the first request.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        cache: str = "specache",
        cache_options: dict[str, Any] | None = None,
        likelihood: Likelihood = "refuse",
        **options: Any,
    ) -> None:
        if likelihood not in ("refuse", "decode"):
            raise ValueError(f"likelihood is {likelihood!r}; use 'refuse' or 'decode'")
        self.cache_name, self.cache_options, self.likelihood = cache, dict(cache_options or {}), likelihood
        # tells of wrong options before the model has worked for an hour
        build_cache(cache, model.config, **self.cache_options)
        super().__init__(model, tokenizer, **options)
        self._facts: list[dict[str, Any]] = []

    def get_model_info(self) -> dict[str, Any]:
        """Size and dtype of the model, and the cache."""
        return {
            **super().get_model_info(),
            "cache": self.cache_name,
            "cache_options": {name: str(value) for name, value in self.cache_options.items()},
            "likelihood": self.likelihood,
        }

    def run_facts(self) -> dict[str, Any]:
        """The cache, its options, and what it did so far."""
        options = {name: value for name, value in self.cache_options.items() if value is not None}
        return {
            "cache": {"name": self.cache_name, "options": options, "likelihood": self.likelihood}
            | add_facts(self._facts)
        }

    @staticmethod
    def merge_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Facts of all processes as one."""
        named = {name: parts[0]["cache"][name] for name in ("name", "options", "likelihood")}
        counted = [{name: value for name, value in part["cache"].items() if name not in named} for part in parts]
        return {"cache": named | add_facts(counted)}

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        cache, arguments = build_cache(self.cache_name, self.model.config, **self.cache_options)
        try:
            return super()._model_generate(context, max_length, stop, **options, **arguments)
        finally:
            self._account(cache)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.cache_name == "full":
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if self.likelihood == "refuse":
            raise ValueError(
                f"this task scores log-likelihoods, which a forward pass computes without reading the "
                f"{self.cache_name} cache: use a generate_until task, or likelihood='decode'"
            )
        with self._tracked("scoring token by token", len(requests)):
            return [self._score(key, context, continuation) for key, context, continuation in requests]

    def _score(self, key: tuple[str, str] | None, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of one continuation, decoded through the cache."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"max_length {self.max_length} is too small: a continuation of {len(continuation)} tokens is to be "
                "scored; raise --max-length or choose a model with a longer context"
            )
        # as lm-eval: the last token is predicted, never read
        room = self.max_length + 1 - len(continuation)
        if len(context) > room:
            self.num_truncated += 1
        prompt = torch.tensor([context[-room:]], device=self.device)
        targets = torch.tensor([continuation], device=self.device)
        cache, _ = build_cache(self.cache_name, self.model.config, **self.cache_options)
        try:
            logits = decode_logits(self.model, prompt, targets, cache=cache)
        finally:
            self._account(cache)
        if not torch.isfinite(logits.amax()):
            raise ValueError(NOT_FINITE)
        scores = F.log_softmax(logits.float(), dim=-1)
        total = scores.gather(2, targets.unsqueeze(2)).sum().item()
        greedy = bool((scores.argmax(-1) == targets).all())
        if self._advance is not None:
            self._advance(1)
        if key is not None:
            self.cache_hook.add_partial("loglikelihood", key, (total, greedy))
        return total, greedy

    def _account(self, cache: Any) -> None:
        facts = cache_facts(cache, self.model.config, self.model.dtype, device=self.device.type)
        # one sum, not one entry per batch
        self._facts = [add_facts([*self._facts, facts])]
        if isinstance(cache, DecodingCache):
            cache.close()
