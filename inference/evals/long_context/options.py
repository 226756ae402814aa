"""What the long-context tasks need to know, and the lengths they are made at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
DEFAULT_DEPTHS = tuple(float(depth) for depth in range(0, 101, 10))
# a prompt of fewer tokens holds no haystack
SHORTEST_LENGTH = 64


@dataclass(frozen=True, kw_only=True)
class LongContextOptions:
    """Settings of the long-context tasks.

    Args:
        lengths: Lengths of generated tasks in tokens, prompt, chat template and answer together; all of
            `DEFAULT_LENGTHS` that the model's window holds when None.
        num_samples: Samples per length (needle: per length and depth); each suite's own number when None.
        depths: Where the needle lies, in percent of the context.
        prompt_tokens: LongBench's longest prompt before the chat template; by the official rule when None.
        skip_malformed: Whether malformed LongBench lines are left out and counted; else they are refused.
        seed: Seed of generated tasks.
        documents: Articles with `title` and `text`: the haystack, and the passages of `longbench_local`.
        hub_dataset: Where LongBench is taken from without a local folder.
    """

    lengths: Sequence[int] | None = None
    num_samples: int | None = None
    depths: Sequence[float] = DEFAULT_DEPTHS
    prompt_tokens: int | None = None
    skip_malformed: bool = False
    seed: int = 0
    documents: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    hub_dataset: str = "THUDM/LongBench"

    def check(self) -> None:
        """Refuse settings that no task can be made with.

        Raises:
            ValueError: A number is out of its range.
        """
        if self.lengths is not None and not self.lengths:
            raise ValueError("lengths is empty: give at least one number of tokens")
        for length in self.lengths or ():
            if length < SHORTEST_LENGTH:
                raise ValueError(f"length {length} is too short: give at least {SHORTEST_LENGTH} tokens")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}: it must be at least 1")
        if not self.depths or any(not 0 <= depth <= 100 for depth in self.depths):
            raise ValueError(f"depths are {list(self.depths)}: give percentages from 0 to 100")

    def lengths_for(self, window: int) -> list[int]:
        """Lengths in a model's window, ascending.

        Raises:
            ValueError: A length that was asked for passes it, or it holds none of the default ones.
        """
        if self.lengths is None:
            if window < SHORTEST_LENGTH:
                raise ValueError(f"the model's window of {window} tokens holds no long context")
            return [length for length in DEFAULT_LENGTHS if length <= window] or [window]
        lengths = sorted(set(self.lengths))
        if lengths[-1] > window:
            raise ValueError(
                f"length {lengths[-1]} passes the model's window of {window} tokens: "
                "give shorter --lengths, or raise --max-length if the model can take it"
            )
        return lengths
