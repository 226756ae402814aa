"""What SLAB's benchmarks share: norms with statistics, compiled forms and why there are none, bounds, rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...lightning_modules.slab import ProgressiveNorm, RepBatchNorm
from .registry import Settings
from .rows import Row, compare, missing_peer, ratio
from .timing import Timing, require_same

Call = Callable[[], Any]
NO_COMPILER = "--quick leaves the compiler out"
# it takes about a minute for a model and a shape
ONE_BATCH = "compiled at a batch of 1 alone"
MATMUL_SIDE = 1024
MATMUL_BOUND = f"its multiply-adds at the rate of a product of {MATMUL_SIDE} x {MATMUL_SIDE} matrices"
# relative, of logits
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


@torch.no_grad()
def settle(model: nn.Module, seed: int) -> None:
    """Norms as after training: lambda 0, scales and statistics near 1, shifts near 0, all different per channel."""
    generator = torch.Generator().manual_seed(seed)

    def near(middle: float, like: Tensor) -> Tensor:
        return (middle + 0.1 * torch.randn(like.shape, generator=generator)).to(like)

    for module in model.modules():
        if isinstance(module, RepBatchNorm):
            bn: Any = module.bn
            for tensor, middle in ((bn.weight, 1.0), (bn.bias, 0.0), (bn.running_mean, 0.0), (module.eta, 0.1)):
                tensor.copy_(near(middle, tensor))
            bn.running_var.copy_(near(1.0, bn.running_var).clamp_min(0.5))
        elif isinstance(module, ProgressiveNorm):
            module.set_blend(0.0)
    model.eval()


def dtype_of(settings: Settings) -> torch.dtype:
    """What is computed in."""
    return torch.bfloat16 if settings.device == "cuda" else torch.float32


def matmul(settings: Settings) -> Call:
    """The product whose time gives the rate of `MATMUL_BOUND`."""
    one, other = (
        torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=settings.device, dtype=dtype_of(settings)) for _ in range(2)
    )
    return lambda: one @ other


@torch.no_grad()
def operations(call: Call) -> int:
    """Additions and multiplications of a call's matrix products and convolutions, attention among them."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def matmul_bound(num_operations: int, product: Timing) -> dict[str, Any]:
    """`bound` and `bound_value` of a row."""
    value = num_operations / (2 * MATMUL_SIDE**3) * product.median_ms
    return {"bound": MATMUL_BOUND, "bound_value": value}


@dataclass
class Forms:
    """Calls that are timed together, and why others are not.

    Attributes:
        case: for messages.
        limit: largest relative difference of results that must be equal.
        calls: by name; each returns a tensor.
        reasons: by name.
    """

    case: str
    limit: float
    calls: dict[str, Call] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, call: Call, *, same_as: str | None = None) -> None:
        """Take a call in, after its result was compared with that of a call that is in already.

        Raises:
            WrongResult: they differ.
        """
        if same_as is not None:
            require_same(self.case, name, [call()], [self.calls[same_as]()], self.limit)
        self.calls[name] = call

    def add_compiled(self, name: str, call: Call | None, *, same_as: str, settings: Settings) -> None:
        """The same for a call that the compiler may refuse: torch.compile needs a C++ compiler on CPUs."""
        if settings.quick or call is None:
            self.reasons[name] = NO_COMPILER if settings.quick else ONE_BATCH
            return
        try:
            call()
        except Exception as error:
            self.reasons[name] = f"does not run here: {str(error).splitlines()[0][:120]}"
            return
        self.add(name, call, same_as=same_as)

    def rows(
        self,
        case: str,
        metric: str,
        ours: str,
        peers: Sequence[str],
        timings: Mapping[str, Timing],
        *,
        per_second: tuple[str, float] | None = None,
        **bound: Any,
    ) -> Iterator[Row]:
        """One row per peer, and one more with `per_second`, the metric and the number of items of a call.

        Where ours could not run, the peers' rows stand alone with the reason.
        """
        if ours not in timings:
            yield Row(case, metric, float("nan"), "ms", reason=self.reasons.get(ours, "not run"))
            return
        for peer in peers:
            row = compare(case, metric, timings[ours], peer=peer, theirs=timings.get(peer), **bound)
            yield row if peer in timings else missing_peer(row, peer, self.reasons.get(peer, "not run"))
        if per_second is None:
            return
        name, count = per_second
        for peer in peers:
            if peer in timings:
                yield _rate(case, name, count, timings[ours], peer, timings[peer])


def _rate(case: str, metric: str, count: float, ours: Timing, peer: str, theirs: Timing) -> Row:
    value, other = (1000 * count / timing.median_ms for timing in (ours, theirs))
    return Row(
        case, metric, value, metric.removesuffix("_per_s") + "/s", peer=peer, peer_value=other,
        ratio=ratio(value, other, higher_is_better=True), repeats=ours.repeats,
        # of a rate: the spread of the time, relative
        spread=value * ours.spread_ms / ours.median_ms,
    )  # fmt: skip
