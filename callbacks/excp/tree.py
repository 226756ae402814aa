"""A checkpoint as a tree: which tensors can be coded, which belong together, and everything else left in place."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .exact import DTYPE_NAMES

# keys from the root to a value; lists and tuples are indexed by integers
Path = tuple[str | int, ...]
LOSSY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """What belongs to one parameter.

    Attributes:
        name: its name in the state dict, or its place in the optimiser where no weight fits.
        weight: path of the weight, if it is in the checkpoint.
        exp_avg: path of Adam's first moment, if any.
        exp_avg_sq: path of Adam's second moment, if any.
        step: updates so far.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
    """

    name: str
    weight: Path | None = None
    exp_avg: Path | None = None
    exp_avg_sq: Path | None = None
    step: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def _plain(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
        and not tensor.is_conj()
        and tensor.dtype in DTYPE_NAMES
    )


def tensors_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Dense tensors inside plain dicts, lists and tuples, in order, with their paths."""
    if isinstance(tree, Tensor):
        if _plain(tree):
            yield path, tree
    elif type(tree) in (dict, OrderedDict):
        for key, value in tree.items():
            if type(key) in (str, int):
                yield from tensors_of(value, (*path, key))
    elif type(tree) in (list, tuple):
        for index, value in enumerate(tree):
            yield from tensors_of(value, (*path, index))


def replace(tree: Any, values: Mapping[Path, Any], path: Path = ()) -> Any:
    """A copy of the tree's containers with other values at some paths; everything else is shared."""
    if path in values:
        return values[path]
    if type(tree) in (dict, OrderedDict):
        copy = type(tree)((key, replace(value, values, (*path, key))) for key, value in tree.items())
        if type(tree) is OrderedDict:
            # a module's state dict carries the version of its layout as an attribute
            copy.__dict__.update(tree.__dict__)
        return copy
    if type(tree) in (list, tuple):
        return type(tree)(replace(value, values, (*path, index)) for index, value in enumerate(tree))
    return tree


def state_dict_path(checkpoint: Mapping[str, Any]) -> Path | None:
    """Where the weights are: under `state_dict`, or at the root of a bare state dict."""
    if isinstance(checkpoint.get("state_dict"), Mapping):
        return ("state_dict",)
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return ()
    return None


def _state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    path = state_dict_path(checkpoint)
    return {} if path is None else checkpoint if not path else checkpoint["state_dict"]


@dataclass
class _Slot:
    """One entry of an optimiser: where its state is, and the group's settings."""

    path: Path
    state: Mapping[str, Any]
    group: Mapping[str, Any]
    name: str | None

    @property
    def shape(self) -> torch.Size | None:
        shapes = {value.shape for value in self.state.values() if isinstance(value, Tensor) and value.dim()}
        return shapes.pop() if len(shapes) == 1 else None


def _slots(checkpoint: Mapping[str, Any]) -> Iterator[list[_Slot]]:
    for number, optimiser in enumerate(checkpoint.get("optimizer_states") or []):
        if not (isinstance(optimiser, Mapping) and isinstance(optimiser.get("state"), Mapping)):
            continue
        for group in optimiser.get("param_groups") or []:
            names = group.get("param_names") or [None] * len(group.get("params", []))
            yield [
                _Slot(
                    ("optimizer_states", number, "state", key),
                    optimiser["state"].get(key) or {},
                    group,
                    key if isinstance(key, str) else name,
                )
                for key, name in zip(group.get("params", []), names, strict=False)
            ]


def _is_adam(slot: _Slot) -> bool:
    first, second = slot.state.get("exp_avg"), slot.state.get("exp_avg_sq")
    return isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape


def _parameter(slot: _Slot, name: str | None) -> Parameter:
    label = name or "/".join(map(str, slot.path))
    weight = None
    moments: dict[str, Any] = {}
    if _is_adam(slot):
        betas = slot.group.get("betas") or (0.9, 0.999)
        moments = {
            "exp_avg": (*slot.path, "exp_avg"),
            "exp_avg_sq": (*slot.path, "exp_avg_sq"),
            "step": float(slot.state.get("step", 1.0)),
            "betas": (float(betas[0]), float(betas[1])),
            "eps": float(slot.group.get("eps", 1e-8)),
        }
    return Parameter(name=label, weight=weight, **moments)


def find_parameters(checkpoint: Mapping[str, Any], *, frozen: Collection[str] = ()) -> list[Parameter]:
    """The parameters of a checkpoint with their moments, weights first in the state dict's order.

    Optimisers know parameters by name (`param_names`, or states keyed by names) or by number. Numbers are matched to
    the state dict in order and by shape, group by group. Where every entry of every optimiser finds its weight, other
    tensors of the state dict are buffers; otherwise tensors of two and more dimensions count as weights too.

    Args:
        checkpoint: as Lightning writes it, or a bare state dict.
        frozen: weights that are known not to be trained; numbers are not matched to them.
    """
    weights = {
        name: tensor
        for name, tensor in _state_dict(checkpoint).items()
        if isinstance(tensor, Tensor) and _plain(tensor) and tensor.is_floating_point()
    }
    root = state_dict_path(checkpoint) or ()
    free = [name for name in weights if name not in frozen]
    found: list[tuple[str | None, _Slot]] = []
    complete = bool(checkpoint.get("optimizer_states"))
    for slots in _slots(checkpoint):
        position = 0
        for slot in slots:
            name: str | None = None
            if slot.name is not None:
                matches = [key for key in free if key == slot.name or key.endswith("." + slot.name)]
                name = matches[0] if len(matches) == 1 else None
            elif slot.shape is not None:
                name = next((key for key in free[position:] if weights[key].shape == slot.shape), None)
            if name is not None and (slot.shape is None or weights[name].shape == slot.shape):
                position = free.index(name)
                free.remove(name)
            else:
                name = None
                complete = False
            found.append((name, slot))
    taken: dict[str, Parameter] = {}
    loose: list[Parameter] = []
    for name, slot in found:
        parameter = _parameter(slot, name)
        if name is not None:
            taken[name] = Parameter(**{**parameter.__dict__, "weight": (*root, name)})
        elif parameter.exp_avg is not None:
            loose.append(parameter)
    in_order = []
    for name, tensor in weights.items():
        if name in taken:
            in_order.append(taken[name])
        elif not complete and tensor.dim() >= 2 and name not in frozen:
            in_order.append(Parameter(name=name, weight=(*root, name)))
    return in_order + loose
