"""Which slots a forward pass reads and writes: computed once, used by every layer.

A slot is a token's place in its own sequence, padding not counted, so that quantisation groups never depend on what a
sequence is batched with. Columns are the model's own count, padding included.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

Phase = Literal["prefill", "pre_decode", "step"]


@dataclass(frozen=True)
class Plan:
    """One forward pass.

    Attributes:
        phase: `prefill` stores what it sees, `step` stores the first of its tokens, `pre_decode` nothing.
        lengths: Tokens that each sequence has stored before this pass.
        num_queries: Tokens of this pass (columns, in a prefill).
        residual_length: Size of the residual.
        padding: Padding columns left of each sequence.
        device: Where the index tensors are.
    """

    phase: Phase
    lengths: tuple[int, ...]
    num_queries: int
    residual_length: int
    padding: tuple[int, ...]
    device: torch.device
    _copies: dict[torch.device, "Plan"] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> "Plan":
        """The same plan for the layers on another device."""
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = Plan(
                self.phase, self.lengths, self.num_queries, self.residual_length, self.padding, device
            )
        return self._copies[device]

    @property
    def commits(self) -> bool:
        """Whether the first token's key and value are stored."""
        return self.phase == "step"

    @property
    def width(self) -> int:
        """Slots that scores are kept for: those of the longest sequence and this pass's own."""
        return max(self.lengths) + self.num_queries

    @cached_property
    def lengths_tensor(self) -> torch.Tensor:
        """(B,) int64."""
        return torch.tensor(self.lengths, device=self.device)

    @cached_property
    def key_lengths(self) -> torch.Tensor:
        """(B,) keys that are low-bit: whole blocks of the residual's size."""
        return self.lengths_tensor // self.residual_length * self.residual_length

    @cached_property
    def value_lengths(self) -> torch.Tensor:
        """(B,) values that are low-bit: all but the last of the residual's size."""
        return (self.lengths_tensor - self.residual_length).clamp_min(0)

    @property
    def num_packed_keys(self) -> int:
        """The most low-bit keys of a sequence."""
        return max(self.lengths) // self.residual_length * self.residual_length

    @property
    def num_packed_values(self) -> int:
        """The most low-bit values of a sequence."""
        return max(max(self.lengths) - self.residual_length, 0)

    @cached_property
    def residual_slots(self) -> torch.Tensor:
        """(B, R): the slot held at each place of the residual; negative where there is none yet."""
        last = self.lengths_tensor.unsqueeze(1) - 1
        return last - (last - torch.arange(self.residual_length, device=self.device)) % self.residual_length

    def _places(self, valid: torch.Tensor) -> torch.Tensor:
        """(B, 1, 1, R) columns of the score buffer; what is not valid goes to the spare column at the end."""
        return torch.where(valid, self.residual_slots, self.width)[:, None, None]

    @cached_property
    def residual_key_places(self) -> torch.Tensor:
        """Where the scores of exact keys go."""
        return self._places(self.residual_slots >= self.key_lengths.unsqueeze(1))

    @cached_property
    def residual_value_places(self) -> torch.Tensor:
        """Where the weights of exact values come from."""
        return self._places(self.residual_slots >= 0)

    @cached_property
    def own_places(self) -> torch.Tensor:
        """(B, 1, 1, Q) columns of this pass's own tokens."""
        own = self.lengths_tensor.unsqueeze(1) + torch.arange(self.num_queries, device=self.device)
        return own[:, None, None]

    @cached_property
    def allowed(self) -> torch.Tensor:
        """(B, 1, Q, width) bool, explicit and causal: every stored token, and own tokens up to the query's."""
        return torch.arange(self.width, device=self.device) <= self.own_places.transpose(2, 3)

    @cached_property
    def future(self) -> torch.Tensor:
        """(Q, Q) bool: own tokens that come after the query's."""
        ones = torch.ones(self.num_queries, self.num_queries, dtype=torch.bool, device=self.device)
        return ones.triu(1)

    @property
    def lengths_after(self) -> tuple[int, ...]:
        """Tokens stored after this pass."""
        return tuple(length + int(self.commits) for length in self.lengths)

    def num_candidates(self, length: int, *, select_residual: bool) -> int:
        """Tokens of a sequence of this length that may be wanted exact: the low-bit ones, or all."""
        return length if select_residual else length // self.residual_length * self.residual_length

    def candidates(self, *, before_commit: bool, select_residual: bool) -> torch.Tensor:
        """(B,) `num_candidates` of every sequence, before or after this pass's token is stored."""
        lengths = self.lengths_tensor + int(self.commits and not before_commit)
        return lengths if select_residual else lengths // self.residual_length * self.residual_length
