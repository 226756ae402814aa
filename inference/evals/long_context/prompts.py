"""Makes prompts fit: cuts the middle out by tokens, wraps in a chat template, and counts as the model will."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# a prompt, and whether the chat template is to be used if one is asked for at all
Wrap = Callable[[str, bool], str]
# below this a template leaves nothing of the context
_FEWEST_PROMPT_TOKENS = 2


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt as the model gets it.

    Args:
        text: The prompt.
        num_tokens: Its tokens, with those that the tokenizer adds.
        num_removed: Tokens cut out of its middle.
    """

    text: str
    num_tokens: int
    num_removed: int


def default_prompt_tokens(window: int) -> int | None:
    """LongBench's longest prompt before the chat template for a context window, both in tokens.

    The official table has 3,500 for 4k, 7,500 for 8k, 15,500 for 16k and 31,500 for 32k. None below 1,000, where the
    rule leaves nothing.

    Examples:
        >>> [default_prompt_tokens(window) for window in (4096, 8192, 16384, 32768)]
        [3500, 7500, 15500, 31500]
    """
    return 1000 * (window // 1000) - 500 if window >= 1000 else None


def cut_middle(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], limit: int, *, join: bool = False) -> str:
    """The text of the first and last tokens, `limit` in all.

    Each half is decoded alone without special tokens (LongBench v1: an odd limit loses one token, and the text may
    become some tokens longer or shorter when read again), or both as one with the odd token at the end (v2).

    Args:
        tokenizer: Where the ids come from.
        ids: The prompt, longer than the limit.
        limit: Tokens to keep, at least 2.
        join: Whether the halves are decoded as one.
    """
    half = limit // 2
    if join:
        return str(tokenizer.decode([*ids[:half], *ids[half - limit :]], skip_special_tokens=True))
    first, last = (tokenizer.decode(list(part), skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return f"{first}{last}"


class PromptFitter:
    """Fits prompts into a model's window.

    Args:
        tokenizer: The model's tokenizer.
        window: Longest input and output together, in tokens.
        prompt_tokens: Longest prompt before the chat template; `default_prompt_tokens` when None.
        wrap: Puts a prompt into the chat template and the system message; None without both.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        window: int,
        prompt_tokens: int | None = None,
        wrap: Wrap | None = None,
    ) -> None:
        if prompt_tokens is not None and not _FEWEST_PROMPT_TOKENS <= prompt_tokens <= window:
            raise ValueError(
                f"prompt_tokens is {prompt_tokens}: it must be {_FEWEST_PROMPT_TOKENS} to {window}, the model's window"
            )
        self.tokenizer, self.window, self.wrap = tokenizer, window, wrap
        self.prompt_tokens = default_prompt_tokens(window) if prompt_tokens is None else prompt_tokens

    def count(self, text: str) -> int:
        """Tokens of a text as lm-eval encodes a prompt: with special tokens, but no second BOS."""
        bos = self.tokenizer.bos_token
        has_bos = isinstance(bos, str) and text.startswith(bos)
        return len(self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"])

    def wrapped(self, prompt: str, *, chat: bool = True, prefix: str = "") -> str:
        """The prompt in the chat template, if one is used, and the start of the answer."""
        return (prompt if self.wrap is None else self.wrap(prompt, chat)) + prefix

    def fit(self, prompt: str, *, max_new_tokens: int, chat: bool = True, join: bool = False) -> FittedPrompt:
        """Cut the middle out of a prompt that is too long, then wrap it.

        The prompt is cut to `prompt_tokens`. Where it then still does not fit into the window together with its chat
        template and the answer, it is cut further. deviation: the official code lets it overflow.

        Args:
            prompt: The prompt.
            max_new_tokens: Room for the answer.
            chat: Whether the chat template, if any, is used here.
            join: As in `cut_middle`.

        Raises:
            ValueError: The window is too small for the answer.
        """
        room = self.window - max_new_tokens
        ids = list(self.tokenizer(prompt)["input_ids"])
        limit = room if self.prompt_tokens is None else self.prompt_tokens
        while True:
            kept = prompt if len(ids) <= limit else self._cut(ids, limit, join)
            text = self.wrapped(kept, chat=chat)
            num_tokens = self.count(text)
            if num_tokens <= room:
                num_kept = limit if join else limit - limit % 2
                return FittedPrompt(text, num_tokens, len(ids) - num_kept if len(ids) > limit else 0)
            limit = min(limit, len(ids)) - (num_tokens - room)
            if limit < _FEWEST_PROMPT_TOKENS:
                raise ValueError(
                    f"a window of {self.window} tokens is too small for {max_new_tokens} new tokens after a prompt "
                    "and its template: raise --max-length, or choose a model with a longer context"
                )

    def check_template(self, empty: str, *, max_new_tokens: int, name: str) -> None:
        """Refuse a set whose template alone is too long.

        Args:
            empty: Its prompt without a context.
            max_new_tokens: Room for the answer.
            name: The set, for the message.

        Raises:
            ValueError: Nothing of any context would be left.
        """
        room = self.window - max_new_tokens
        limit = room if self.prompt_tokens is None else min(self.prompt_tokens, room)
        if (num_tokens := self.count(empty)) >= limit:
            raise ValueError(
                f"{name}: the template alone has {num_tokens} tokens and a prompt may have {limit} (window "
                f"{self.window}, {max_new_tokens} new tokens): raise --max-length or --prompt-tokens"
            )

    def check_whole(self, text: str, *, max_new_tokens: int) -> FittedPrompt:
        """A prompt that must not be cut.

        Raises:
            ValueError: It does not fit.
        """
        num_tokens = self.count(text)
        if num_tokens + max_new_tokens > self.window:
            raise ValueError(
                f"a prompt of {num_tokens} tokens and {max_new_tokens} new ones pass the window of {self.window}: "
                "give shorter --lengths"
            )
        return FittedPrompt(text, num_tokens, 0)

    def _cut(self, ids: Sequence[int], limit: int, join: bool) -> str:
        return cut_middle(self.tokenizer, ids, limit, join=join)
