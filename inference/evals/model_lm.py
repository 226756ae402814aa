"""lm-eval's model interface around a transformers model: data parallel, with progress, refusing what is no number."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import LogitsProcessor, LogitsProcessorList

from .distributed import Processes
from .loading import check_tokenizer
from .progress import Mode, track

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# tokens of one forward pass that batch_size="auto" allows on a CPU, where running out of memory kills the process
# instead of raising an error that a smaller batch could answer
CPU_BATCH_TOKENS = 8192


class TransformersLM(HFLM):
    """A loaded transformers model as lm-eval sees it.

    Log-likelihoods and generations are `HFLM`'s own, batch for batch. What differs: processes started by torchrun share
    the documents; a NaN or infinite logit or log-likelihood is refused before it is cached or scored; contexts that had
    to be cut are counted; `batch_size="auto"` is safe on a CPU; no call goes to the hub.

    Args:
        model: The model, on its device.
        tokenizer: Its tokenizer.
        batch_size: Sequences per forward pass, or `auto`, or `auto:N` to find it anew N times.
        max_length: Longest input in tokens; the model's own limit when None.
        processes: The processes that share the documents.
        progress: How progress is shown.

    Attributes:
        num_truncated: Requests whose context did not fit and lost its left end.

    Raises:
        ValueError: The tokenizer cannot belong to the model, or `max_length` is below 2.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        processes: Processes | None = None,
        progress: Mode = "auto",
    ) -> None:
        check_tokenizer(model, tokenizer)
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}, but a context token and a scored token need at least 2")
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        self.processes = processes or Processes()
        self._rank, self._world_size = self.processes.rank, self.processes.world_size
        self.num_truncated = 0
        self._progress: Mode = progress if self.processes.is_main else "off"
        self._advance: Callable[[int], None] | None = None
        self._longest_window: int | None = None

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the tensors of all processes."""
        return self.processes.all_gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect one object from each process on `dst`."""
        return self.processes.gather_object(obj, dst)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.processes.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """Size and dtype of the model; `HFLM`'s version asks the hub for a commit."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": "",
            "model_sha": "",
        }

    def run_facts(self) -> dict[str, Any]:
        """What a run tells about this model beside its scores, for the block `tenfold` of the results."""
        return {}

    @staticmethod
    def merge_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
        """`run_facts` of all processes as one."""
        return parts[0]

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of `max_length` tokens."""
        lengths = [max(len(self.tok_encode(request.args[0])), 1) for request in requests]
        self._longest_window = min(max(lengths, default=1), self.max_length)
        num_windows = sum(math.ceil(length / self.max_length) for length in lengths)
        with self._tracked("scoring texts", num_windows):
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self._longest_window = None

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """Generate an answer to each prompt.

        Raises:
            ValueError: The tokens to generate leave no room for a prompt.
        """
        for request in requests:
            wanted = normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks)["max_gen_toks"]
            if self.backend == "causal" and wanted >= self.max_length:
                raise ValueError(
                    f"max_length {self.max_length} is too small for task {request.task_name}: it generates up to "
                    f"{wanted} tokens after the prompt; raise --max-length or choose a model with a longer context"
                )
        return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _tracked(self, description: str, total: int) -> Iterator[None]:
        """Count forward rows as progress, unless an outer piece of work counts them already."""
        if self._advance is not None:
            yield
            return
        with track(description, total, mode=self._progress) as self._advance:
            try:
                yield
            finally:
                self._advance = None

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"max_length {self.max_length} is too small: a continuation of {len(continuation)} tokens is to be "
                    "scored; raise --max-length or choose a model with a longer context"
                )
            if self.backend == "causal" and len(context) + len(continuation) > self.max_length + 1:
                self.num_truncated += 1
        # one forward row serves all continuations that differ in their last token only
        num_rows = len({tuple(context + continuation[:-1]) for _, context, continuation in requests})
        with self._tracked("scoring", num_rows):
            results = super()._loglikelihood_tokens(list(requests), disable_tqdm=True, override_bs=override_bs)
        if not all(math.isfinite(value) for value, _ in results):
            raise ValueError(NOT_FINITE)
        return results

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        _refuse_not_finite(logits)
        if self._advance is not None:
            self._advance(inps.shape[0])
        return logits

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> torch.Tensor:
        options["logits_processor"] = LogitsProcessorList([_RefuseNotFinite()])
        return super()._model_generate(context, max_length, stop, **options)

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            return super()._detect_batch_size(requests, pos)
        if requests:
            _, context, continuation = requests[pos]
            length = min(len(context) + len(continuation), self.max_length)
        else:
            length = self._longest_window or self.max_length
        return max(1, min(self.max_batch_size or 1, CPU_BATCH_TOKENS // max(length, 1)))


NOT_FINITE = (
    "the model gives logits or log-likelihoods that are NaN or infinite and is not scored: "
    "check its weights, or try --dtype float32"
)


class _RefuseNotFinite(LogitsProcessor):
    """Stops a generation whose logits are not numbers; greedy search would silently pick token 0."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        _refuse_not_finite(scores)
        return scores


def _refuse_not_finite(logits: torch.Tensor) -> None:
    # the maximum is NaN if any entry is; single entries of -inf, such as padded vocabulary rows, are fine
    if not torch.isfinite(logits.amax()):
        raise ValueError(NOT_FINITE)
