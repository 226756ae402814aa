"""Fold fixed norms into the linear layers around them: the plan, its check, and the arithmetic.

A batch norm with running statistics is `a * x + b` per channel (SLAB, arXiv 2405.11582, section 3.2). A linear layer
W, d that reads it takes it over with `W diag(a)` and `d + W b`; one that feeds it, and nothing else, with `diag(a) W`
and `a * d + b`. deviation: the released code leaves `eta * d` out of the second, which is wrong by that much.

Models of other kinds plug in with `register_plan`: a function from a module to the `NormSite`s inside it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .norms import ProgressiveNorm, RepBatchNorm
from .replace import norm_features

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
FixedNorm = ProgressiveNorm | RepBatchNorm


@dataclass(frozen=True)
class NormSite:
    """A norm, and what becomes of it in the fused model.

    Attributes:
        norm: dotted name of the norm.
        consumers: names of all linear layers or unpadded convolutions that read its output, and nothing else does.
            In between only reshapes, the choice of tokens, or averages over tokens (mean pooling).
        producer: in place of consumers, the one linear layer or convolution whose output the norm alone reads.
        reason: with neither, why the norm stays as a per-channel affine.
    """

    norm: str
    consumers: tuple[str, ...] = ()
    producer: str | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        """Check that the site says one thing."""
        if self.consumers and self.producer is not None:
            raise ValueError(f"{self.norm}: a norm goes into its consumers or into its producer, not both; name one")

    @property
    def outcome(self) -> Literal["consumers", "producer", "affine"]:
        """Where the norm goes."""
        if self.consumers:
            return "consumers"
        return "affine" if self.producer is None else "producer"


Planner = Callable[[Any], Iterable[NormSite]]
_PLANNERS: dict[type[nn.Module], Planner] = {}


def register_plan(kind: type[nn.Module]) -> Callable[[Planner], Planner]:
    """Decorator: the function gives the sites of norms of a module of this type, by names relative to it."""

    def add(planner: Planner) -> Planner:
        _PLANNERS[kind] = planner
        return planner

    return add


def fixed_norms(model: nn.Module) -> dict[str, FixedNorm]:
    """The norms that can be fused, by name."""
    found: dict[str, FixedNorm] = {}
    for name, module in model.named_modules():
        if isinstance(module, ProgressiveNorm) or (
            isinstance(module, RepBatchNorm) and name.rpartition(".")[0] not in found
        ):
            found[name] = module
    return found


def statistics_norms(model: nn.Module) -> list[str]:
    """Names of all modules that compute statistics or hold a norm, of whatever library."""
    known = (
        RepBatchNorm,
        ProgressiveNorm,
        nn.modules.batchnorm._NormBase,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.LocalResponseNorm,
    )
    return [name for name, part in model.named_modules() if isinstance(part, known) or norm_features(part) is not None]


def plan_fusion(model: nn.Module, *, keep: Sequence[str] = (), sites: Sequence[NormSite] = ()) -> list[NormSite]:
    """Where each norm of a model goes.

    Args:
        model: with norms that can be fused.
        keep: names of norms that stay as an affine whatever the plan says.
        sites: for norms that no registered plan covers, or covers otherwise.

    Raises:
        ValueError: nothing to fuse; a norm without a site; a name that is no norm.
    """
    norms = fixed_norms(model)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no norm that can be fused; train it with `norm: prepbn` or replace_norms first"
        )
    planned: dict[str, NormSite] = {}
    for prefix, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind in _PLANNERS:
                for site in _PLANNERS[kind](module):
                    absolute = _absolute(site, prefix)
                    planned[absolute.norm] = absolute
                break
    planned |= {site.norm: site for site in sites}
    for name in [*keep, *(site.norm for site in sites)]:
        if name not in norms:
            raise ValueError(f"{name} is no norm that can be fused; there are {', '.join(list(norms)[:5])}, ...")
    for name in keep:
        planned[name] = NormSite(name, reason="asked for")
    for name in norms:
        if name not in planned:
            raise ValueError(
                f"no consumer is known for the norm {name}; say who reads it, "
                f"sites=[NormSite({name!r}, consumers=(...,))], or keep it as a per-channel affine, keep=[{name!r}]"
            )
    # norms that were left as they are, such as a Llama's excluded ones, are planned for in vain
    return [planned[name] for name in norms]


def _absolute(site: NormSite, prefix: str) -> NormSite:
    if not prefix:
        return site
    return replace(
        site,
        norm=f"{prefix}.{site.norm}",
        consumers=tuple(f"{prefix}.{name}" for name in site.consumers),
        producer=None if site.producer is None else f"{prefix}.{site.producer}",
    )


def check_fusion(model: nn.Module, sites: Sequence[NormSite]) -> None:
    """Refuse before anything is changed.

    Raises:
        ValueError: a norm still in the blend; a layer that is no plain linear layer or convolution, has other channels,
            pads, is shared, or is named twice.
    """
    norms = fixed_norms(model)
    owners = Counter(id(p) for part in model.modules() for p in part._parameters.values() if p is not None)
    taken: dict[str, str] = {}
    places: dict[int, str] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, ProgressiveNorm) and places.setdefault(id(part), name) != name:
            raise ValueError(f"{places[id(part)]} and {name} are one norm; give each place its own before fusing")
    for site in sites:
        norm = norms[site.norm]
        if isinstance(norm, ProgressiveNorm):
            value, warming = norm.blend_state()
            if value != 0.0 or warming:
                raise ValueError(
                    f"{site.norm} is still in the blend, lambda {value:.4g}: its batch norm alone is not what was "
                    f"trained; train until the schedule ends, then fuse"
                )
        channels = _batch_norm(norm).num_features
        for name in (*site.consumers, *([] if site.producer is None else [site.producer])):
            _check_layer(model, name, site, channels, owners)
            if name in taken and taken[name] != site.norm:
                raise ValueError(f"{name} would take over both {taken[name]} and {site.norm}; keep one as an affine")
            taken[name] = site.norm


def _check_layer(model: nn.Module, name: str, site: NormSite, channels: int, owners: Counter[int]) -> None:
    layer: Any = _named(model, name, site)
    forward = site.outcome == "consumers"
    if not isinstance(layer, nn.Linear | Convolution):
        raise ValueError(
            f"{name}, which {'reads' if forward else 'feeds'} {site.norm}, is a {type(layer).__name__}, no plain "
            f"linear layer or convolution; merge adapters and dequantise first, or keep the norm as an affine"
        )
    if isinstance(layer, nn.Linear):
        width = layer.in_features if forward else layer.out_features
    else:
        width = layer.in_channels if forward else layer.out_channels
    if width != channels:
        raise ValueError(f"{site.norm} has {channels} channels, {name} {width}; the plan names the wrong layer")
    if forward and isinstance(layer, Convolution) and (isinstance(layer.padding, str) or any(layer.padding)):
        raise ValueError(
            f"{name} pads, and the shift of {site.norm} is not zero there; keep the norm as an affine, "
            f"keep=[{site.norm!r}]"
        )
    if owners[id(layer.weight)] > 1:
        raise ValueError(
            f"the weight of {name} is shared with another layer, which would change with it; untie them, or keep "
            f"{site.norm} as an affine"
        )


def _named(model: nn.Module, name: str, site: NormSite) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{site.norm} is planned to go into {name}, which the model does not have") from None


def _batch_norm(norm: FixedNorm) -> RepBatchNorm:
    return norm.new_norm if isinstance(norm, ProgressiveNorm) else norm


class ChannelAffine(nn.Module):
    """`scale * x + shift` per channel: what is left of a norm that no linear layer can take over.

    Args:
        num_features: channels.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)


@torch.no_grad()
def fold_into_consumer(layer: nn.Linear | Convolution, scale: Tensor, shift: Tensor) -> None:
    """`layer(scale * x + shift)` becomes `layer(x)`; float64, rounded once.

    Args:
        layer: its weight and bias are replaced, a bias is made where there is none.
        scale: (C,) float64.
        shift: (C,) float64.
    """
    weight: Tensor = layer.weight.double()  # (out, C, ...), of a grouped convolution (out, C / groups, ...)
    groups = getattr(layer, "groups", 1)
    by_group = weight.view(groups, -1, *weight.shape[1:])
    shape = (groups, 1, -1, *(1,) * (weight.dim() - 2))
    added = (by_group * shift.view(shape)).flatten(2).sum(2).flatten()
    _set(layer, (by_group * scale.view(shape)).view_as(weight), added, layer.bias)


@torch.no_grad()
def fold_into_producer(layer: nn.Linear | Convolution, scale: Tensor, shift: Tensor) -> None:
    """`scale * layer(x) + shift` becomes `layer(x)`; float64, rounded once. Arguments as for `fold_into_consumer`."""
    weight: Tensor = layer.weight.double()
    bias = None if layer.bias is None else scale * layer.bias.double()
    _set(layer, weight * scale.view(-1, *(1,) * (weight.dim() - 1)), shift, bias)


def _set(layer: nn.Linear | Convolution, weight: Tensor, added: Tensor, bias: Tensor | None) -> None:
    dtype, trained = layer.weight.dtype, layer.weight.requires_grad
    total = added if bias is None else added + bias.double()
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=trained)
    layer.bias = nn.Parameter(total.to(dtype), requires_grad=trained)


def fuse_norms(model: nn.Module, *, keep: Sequence[str] = (), sites: Sequence[NormSite] = ()) -> list[NormSite]:
    """Fold every fixed norm of a model into its neighbours, in place; what it computes in evaluation stays.

    Args:
        model: after training, with lambda at 0.
        keep: see `plan_fusion`.
        sites: see `plan_fusion`.

    Returns:
        Where each norm went.

    Raises:
        ValueError: see `plan_fusion` and `check_fusion`; nothing has been changed then.
    """
    plan = plan_fusion(model, keep=keep, sites=sites)
    check_fusion(model, plan)
    norms = fixed_norms(model)
    for site in plan:
        norm = _batch_norm(norms[site.norm])
        scale, shift = norm.affine(torch.float64)
        left: nn.Module = nn.Identity()
        for name in site.consumers:
            layer: Any = model.get_submodule(name)
            fold_into_consumer(layer, scale, shift)
        if site.producer is not None:
            producer: Any = model.get_submodule(site.producer)
            fold_into_producer(producer, scale, shift)
        elif not site.consumers:
            left = ChannelAffine(norm.num_features).to(scale.device, norm.bn.weight.dtype)  # type: ignore[arg-type]
            with torch.no_grad():
                left.scale.copy_(scale)
                left.shift.copy_(shift)
        model.set_submodule(site.norm, left.train(norm.training))
    return plan
