"""Both of Adam's moments of one parameter, with the first update after a resume kept within its bound."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adam import AdamRule
from .first_moment import encode_first_moment
from .histogram import Float32
from .options import ExCPOptions
from .second_moment import SecondMomentForms, exact_tensor
from .weights import CodedTensor, as_float32

# levels are found anew without the dropped entries, which can take others past the target
_DROP_ROUNDS = 4


@dataclass
class CodedAdamState:
    """Both moments as stored.

    Attributes:
        first: exp_avg.
        second: exp_avg_sq.
        scaled: whether the first moment was divided by the square root of the stored second one.
        masked: whether the first moment is stored only where the weight's residual is not zero.
        update_max: largest next update over the learning rate from the stored state.
        exact_update_max: the same from the exact state.
        notes: why a moment is stored otherwise than asked for.
    """

    first: CodedTensor
    second: CodedTensor
    scaled: bool = False
    masked: bool = False
    update_max: float = 0.0
    exact_update_max: float = 0.0
    notes: list[str] = field(default_factory=list)


class AdamStateEncoder:
    """Codes the moments of one parameter, going to finer forms where the first update would be too large.

    Args:
        exp_avg: first moment, any shape.
        exp_avg_sq: second moment, same shape.
        weight: the coded residual; None in a key frame or where the weight has none.
        rule: Adam's constants.
        options: settings.
    """

    def __init__(
        self, exp_avg: Tensor, exp_avg_sq: Tensor, *, weight: CodedTensor | None, rule: AdamRule, options: ExCPOptions
    ) -> None:
        self.exp_avg, self.exp_avg_sq, self.weight, self.rule, self.options = exp_avg, exp_avg_sq, weight, rule, options
        self.momentum, self.variance = as_float32(exp_avg), as_float32(exp_avg_sq)
        self.exact_updates = np.empty(0, np.float32)
        self.exact_max = 0.0

    def encode(self) -> CodedAdamState:
        """The coded moments."""
        # NaN and infinities show in the extremes
        extremes = [np.min(self.momentum), np.max(self.momentum), np.max(self.variance), np.min(self.variance)]
        if not np.isfinite(extremes).all() or extremes[-1] < 0:
            state = CodedAdamState(self._exact(self.exp_avg), self._exact(self.exp_avg_sq))
            state.notes.append("moments exact: not finite, or a negative second moment")
            return state
        self.exact_updates = self.rule.updates(self.momentum, self.variance, self.variance)
        self.exact_max = float(self.exact_updates.max(initial=0.0))
        scaled = self.options.mode == "sparsity" and self.options.second_moment != "masked"
        state = self._second_first() if scaled else self._first_first()
        state.exact_update_max = self.exact_max
        return state

    def _exact(self, tensor: Tensor) -> CodedTensor:
        return exact_tensor(tensor, self.options)

    def _forms(self, momentum: Float32) -> SecondMomentForms:
        return SecondMomentForms(
            self.exp_avg_sq, momentum=momentum, exact_updates=self.exact_updates, rule=self.rule, options=self.options
        )

    def _within(self, largest: float) -> bool:
        target = self.options.update_target
        return target is None or largest <= target * self.exact_max

    def _second(self, momentum: Float32, notes: list[str]) -> CodedTensor:
        """The first form of the second moment that keeps updates within the bound."""
        forms = self._forms(momentum)
        for coded in forms:
            # rank 1 has its exceptions so that it is within the bound
            if coded.kind == "rank1" or self._within(forms.largest_update(coded)):
                if coded.kind != self.options.second_moment:
                    notes.append(f"second moment {coded.kind} instead of {self.options.second_moment}")
                return coded
        notes.append("second moment exact: update target out of reach")
        return self._exact(self.exp_avg_sq)

    def _largest_update(self, momentum: Float32, variance: Float32) -> float:
        """The largest update of a state most of whose first moment is zero, without going through all of it."""
        kept = np.flatnonzero(momentum != 0)
        # where there is no momentum, the update grows with true over stored second moment alone
        worst = int(np.argmax(self.variance / np.maximum(variance, np.float32(1e-37))))
        some = np.append(kept, worst)
        return float(self.rule.updates(momentum[some], variance[some], self.variance[some]).max(initial=0.0))

    def _first_first(self) -> CodedAdamState:
        notes: list[str] = []
        first = encode_first_moment(
            self.exp_avg, weight=self.weight, variance=None, options=self.options, bits=self.options.momentum_bits
        )
        if isinstance(first, str):
            notes.append(f"first moment exact: {first}")
            first = self._exact(self.exp_avg)
        momentum = as_float32(first.decoded)
        second = self._second(momentum, notes)
        largest = self._forms(momentum).largest_update(second)
        masked = self.weight is not None and first.kind != "exact"
        return CodedAdamState(first, second, masked=masked, update_max=largest, notes=notes)

    def _second_first(self) -> CodedAdamState:
        notes: list[str] = []
        second = self._second(self.momentum, notes)
        variance = as_float32(second.decoded)
        for bits in range(self.options.momentum_bits, 9):
            exp_avg, num_dropped = self.exp_avg, 0
            for _ in range(_DROP_ROUNDS):
                first = encode_first_moment(
                    exp_avg, weight=self.weight, variance=variance, options=self.options, bits=bits
                )
                if isinstance(first, str):
                    break
                momentum = as_float32(first.decoded)
                largest = self._largest_update(momentum, variance)
                if self._within(largest):
                    if num_dropped:
                        notes.append(f"{num_dropped} entries of the first moment dropped for the update target")
                    masked = self.weight is not None
                    return CodedAdamState(first, second, scaled=True, masked=masked, update_max=largest, notes=notes)
                places = self._too_large(momentum, variance)
                num_dropped += len(places)
                exp_avg = exp_avg.clone()
                exp_avg.view(-1)[torch.from_numpy(places)] = 0
        notes.append("first moment exact: update target out of reach")
        exact = self._exact(self.exp_avg)
        largest = self._forms(self.momentum).largest_update(second)
        return CodedAdamState(exact, second, update_max=largest, notes=notes)

    def _too_large(self, momentum: Float32, variance: Float32) -> NDArray[np.int64]:
        """Entries whose stored momentum takes the first update past the target; as zeros they are within it."""
        assert self.options.update_target is not None
        kept = np.flatnonzero(momentum != 0)
        updates = self.rule.updates(momentum[kept], variance[kept], self.variance[kept])
        return kept[updates > self.options.update_target * self.exact_max]
