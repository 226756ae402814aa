"""What a save became: sizes, sparsity and errors per tensor and per group of tensors, as plain data."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

StepSource = Literal["exact", "bound", "none"]


def _root(value: float) -> float:
    return float(value) ** 0.5


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else 0.0 if numerator == 0 else float("inf")


@dataclass(frozen=True, kw_only=True)
class ParameterReport:
    """One parameter, or several added up.

    Attributes:
        name: of the parameter; numbers are `*` in a group's name.
        numel: elements of the weight.
        raw_bytes: weight and moments as they are in memory.
        weight_bytes: coded weight.
        momentum_bytes: coded first moment.
        second_moment_bytes: coded second moment.
        bound_bytes: order-0 bound of the index streams, plus codebooks and all that is not an index.
        weight_zero_ratio: zeros among the weight's indices (0-1).
        momentum_zero_ratio: zeros in the stored first moment (0-1).
        squared_error: squared norm of stored minus true weight.
        squared_step: squared norm of the weight's change since the last save.
        update_max: largest next Adam update over the learning rate from the stored state (gradient sqrt(v)).
        exact_update_max: the same from the exact state.
        kinds: how weight, first and second moment are stored.
        notes: why something is stored otherwise than asked for.
    """

    name: str
    numel: int = 0
    raw_bytes: int = 0
    weight_bytes: int = 0
    momentum_bytes: int = 0
    second_moment_bytes: int = 0
    bound_bytes: float = 0.0
    weight_zero_ratio: float = 0.0
    momentum_zero_ratio: float = 0.0
    squared_error: float = 0.0
    squared_step: float = 0.0
    update_max: float = 0.0
    exact_update_max: float = 0.0
    kinds: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def coded_bytes(self) -> int:
        """Weight and moments as stored."""
        return self.weight_bytes + self.momentum_bytes + self.second_moment_bytes

    @property
    def error_over_step(self) -> float:
        """Norm of stored minus true weight over the norm of the step since the last save."""
        return _ratio(_root(self.squared_error), _root(self.squared_step))

    @property
    def update_ratio(self) -> float:
        """Largest next Adam update over that of the exact state."""
        return _ratio(self.update_max, self.exact_update_max)


def _add(name: str, parts: list[ParameterReport]) -> ParameterReport:
    total = sum(part.numel for part in parts)

    def mean(attribute: str) -> float:
        return sum(getattr(part, attribute) * part.numel for part in parts) / max(total, 1)

    sums = {
        key: sum(getattr(part, key) for part in parts)
        for key in ("numel", "raw_bytes", "weight_bytes", "momentum_bytes", "second_moment_bytes", "bound_bytes",
                    "squared_error", "squared_step")
    }  # fmt: skip
    return ParameterReport(
        name=name,
        **sums,
        weight_zero_ratio=mean("weight_zero_ratio"),
        momentum_zero_ratio=mean("momentum_zero_ratio"),
        update_max=max((part.update_max for part in parts), default=0.0),
        exact_update_max=max((part.exact_update_max for part in parts), default=0.0),
        kinds=sorted({kind for part in parts for kind in part.kinds}),
        notes=sorted({note for part in parts for note in part.notes}),
    )


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """One save.

    Attributes:
        key_frame: whether it can be decoded alone.
        parameters: one report each.
        raw_bytes: all tensors that are coded, as they are in memory, tied ones once.
        payload_bytes: their coded size, checksums and header not counted.
        step_source: whether steps are against the exact weights of the last save, the smallest that fit its stored
            errors, or not known (key frame).
        key_frame_advised: whether most of the weights had to be stored exactly in this residual save.
        added: parameters that the last save did not have.
        removed: parameters that only the last save had.
    """

    key_frame: bool
    parameters: list[ParameterReport]
    raw_bytes: int
    payload_bytes: int
    step_source: StepSource
    key_frame_advised: bool = False
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Raw over coded bytes."""
        return _ratio(self.raw_bytes, self.payload_bytes)

    @property
    def total(self) -> ParameterReport:
        """All parameters added up."""
        return _add("all", self.parameters)

    @property
    def largest_error_over_step(self) -> float:
        """Of all parameters with a known step."""
        return max((part.error_over_step for part in self.parameters), default=0.0)

    def by_group(self) -> dict[str, ParameterReport]:
        """Parameters whose names differ in numbers only, added up, in order of appearance."""
        groups: dict[str, list[ParameterReport]] = {}
        for part in self.parameters:
            groups.setdefault(re.sub(r"(?<![^./])\d+(?![^./])", "*", part.name), []).append(part)
        return {name: _add(name, parts) for name, parts in groups.items()}

    def metrics(self) -> dict[str, float]:
        """What a logger wants, by name."""
        total = self.total
        return {
            "ckpt/ratio": self.ratio,
            "ckpt/payload_bytes": float(self.payload_bytes),
            "ckpt/over_bound_ratio": _ratio(total.coded_bytes, total.bound_bytes),
            "ckpt/weight_zero_ratio": total.weight_zero_ratio,
            "ckpt/error_over_step": total.error_over_step,
            "ckpt/error_over_step_max": self.largest_error_over_step,
            "ckpt/first_update_ratio": total.update_ratio,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; floats rounded to 6 digits."""
        data = asdict(self)
        data["parameters"] = [
            {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in part.items()}
            for part in data["parameters"]
        ]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "SaveReport":
        """Inverse of `to_dict`; keys of later versions are ignored."""
        parameters = [ParameterReport(**_known(ParameterReport, part)) for part in data["parameters"]]
        return cls(**(_known(cls, data) | {"parameters": parameters}))


def _known(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    names: Iterable[str] = (item.name for item in fields(kind))
    return {name: data[name] for name in names if name in data}
