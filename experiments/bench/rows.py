"""One measured number against one peer, as it stands in the JSON."""

from dataclasses import dataclass

from .timing import Timing


@dataclass(frozen=True)
class Row:
    """A result. `ratio` above 1 means that ours is better, whichever way the metric points.

    Attributes:
        case: the shape or setting.
        metric: what was measured.
        value: ours, in `unit`.
        unit: unit of `value`, `peer_value`, `bound_value` and `spread`.
        peer: whom we compare with; None for a number that stands alone.
        peer_value: the peer's number; None where the peer did not run.
        ratio: ours against the peer's.
        bound: what limits the number physically; for a score, what it takes no knowledge to reach.
        bound_value: that limit, measured on the same machine in the same run where it is physical.
        repeats: samples behind `value`.
        spread: interquartile range of our samples.
        reason: why there is no peer value.
    """

    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    bound: str | None = None
    bound_value: float | None = None
    repeats: int = 1
    spread: float | None = None
    reason: str | None = None


def ratio(value: float, peer_value: float, *, higher_is_better: bool = False) -> float | None:
    """How many times better ours is: above 1 is better for times and sizes as well as for rates and scores.

    Returns:
        The ratio, or None where a zero makes it meaningless.
    """
    better, worse = (value, peer_value) if higher_is_better else (peer_value, value)
    return better / worse if worse else None


def compare(
    case: str,
    metric: str,
    ours: Timing,
    *,
    peer: str | None = None,
    theirs: Timing | None = None,
    bound: str | None = None,
    bound_value: float | None = None,
) -> Row:
    """A row of timings in milliseconds."""
    peer_value = None if theirs is None else theirs.median_ms
    return Row(
        case=case,
        metric=metric,
        value=ours.median_ms,
        unit="ms",
        peer=peer,
        peer_value=peer_value,
        ratio=None if peer_value is None else ratio(ours.median_ms, peer_value),
        bound=bound,
        bound_value=bound_value,
        repeats=ours.repeats,
        spread=ours.spread_ms,
    )


def missing_peer(row: Row, peer: str, reason: str) -> Row:
    """The same measurement with a peer that could not run here, and why."""
    fields = {**row.__dict__, "peer": peer, "peer_value": None, "ratio": None, "reason": reason}
    return Row(**fields)
