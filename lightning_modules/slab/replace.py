"""Put progressive norms into anybody's model."""

import difflib
import inspect
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import nn

from .llama import adopt_llama
from .masks import follow_attention_mask
from .norms import Initialisation, ProgressiveNorm, RepBatchNorm

# what is no norm of tokens although its name ends like one, or is one of ours
OURS = (ProgressiveNorm, RepBatchNorm)


def norm_features(module: nn.Module) -> int | None:
    """Channels of a LayerNorm or RMSNorm over the last dimension, from torch or from a model's own code; else None."""
    name = type(module).__name__
    if not (isinstance(module, nn.LayerNorm | nn.RMSNorm) or name.endswith(("LayerNorm", "RMSNorm"))):
        return None
    shape: Any = getattr(module, "normalized_shape", None)
    if shape is None:
        weight = getattr(module, "weight", None)
        shape = () if weight is None else tuple(weight.shape)
    return int(shape[0]) if len(shape) == 1 else None


def norm_eps(module: nn.Module) -> float:
    """What a norm adds to the variance; 1e-5 where it does not say, as transformers' and torch's names differ."""
    for name in ("eps", "variance_epsilon"):
        value = getattr(module, name, None)
        if value is not None:
            return float(value)
    return 1e-5


def progressive_norm(
    old_norm: nn.Module,
    num_features: int,
    *,
    initial: Initialisation | Literal["auto"] = "auto",
    eps: float | None = None,
    momentum: float | None = 0.1,
) -> ProgressiveNorm:
    """A blend that starts at `old_norm`, on its device and in its dtype.

    Args:
        old_norm: the norm to fade out.
        num_features: channels.
        initial: start of the batch norm; `auto` is `language` after an RMSNorm and `vision` after a LayerNorm.
        eps: of the batch norm; by default the old norm's for `language`, 1e-5 for `vision` (released code).
        momentum: of the running statistics.
    """
    if initial == "auto":
        is_rms = isinstance(old_norm, nn.RMSNorm) or type(old_norm).__name__.endswith("RMSNorm")
        initial = "language" if is_rms else "vision"
    if eps is None:
        eps = norm_eps(old_norm) if initial == "language" else 1e-5
    new_norm = RepBatchNorm(num_features, eps=eps, momentum=momentum, initial=initial)
    reference = next(old_norm.parameters(), torch.empty(0))
    norm = ProgressiveNorm(old_norm, new_norm.to(device=reference.device, dtype=reference.dtype))
    norm.blend, norm.warming = norm.blend.to(reference.device), norm.warming.to(reference.device)
    return norm.train(old_norm.training)


def replace_norms(
    model: nn.Module,
    *,
    exclude: Iterable[str] = (),
    initial: Initialisation | Literal["auto"] = "auto",
    eps: float | None = None,
    momentum: float | None = 0.1,
    mask_argument: str | None = "attention_mask",
) -> list[str]:
    """Put a `ProgressiveNorm` in the place of every LayerNorm and RMSNorm of a model, in place.

    Only norms over the last dimension of channels-last tensors are touched. The model computes what it did until a
    schedule (`PRepBNSchedule`) moves lambda, except that evaluation shows the new norm, which is still untrained. Build
    optimisers afterwards. A `LlamaForCausalLM` becomes a `PRepBNLlamaForCausalLM`, whose folders and checkpoints load.

    Args:
        model: any model.
        exclude: names of norms to leave alone, `*` matches any text: `model.norm`, `*.q_norm`.
        initial: see `progressive_norm`.
        eps: see `progressive_norm`.
        momentum: see `progressive_norm`.
        mask_argument: argument of the model's `forward` with 0 at padding, which is then left out of the statistics;
            not used where the model has no such argument. None for no mask.

    Returns:
        Names of the replaced norms.

    Raises:
        ValueError: nothing to replace, or a name in `exclude` that matches nothing.
    """
    exclude = list(exclude)
    blends = {name for name, module in model.named_modules() if isinstance(module, OURS)}
    found: dict[str, tuple[nn.Module, str, nn.Module]] = {}
    known: dict[str, nn.Module] = {}
    for parent_name, parent in model.named_modules():
        for name, module in parent.named_children():
            full = f"{parent_name}.{name}".lstrip(".")
            inside = any(full.startswith(f"{blend}.") for blend in blends)
            if not inside and (features := norm_features(module)) is not None and features > 0:
                found[full], known[full] = (parent, name, module), module
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or sorted(known)[:3]
            raise ValueError(f"exclude: no norm is called {pattern!r}; nearest: {', '.join(near)}")
    # one norm may serve in two places: it is replaced by one blend
    blend_of: dict[int, ProgressiveNorm] = {}
    replaced = []
    for name, (parent, attribute, module) in found.items():
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            continue
        if id(module) not in blend_of:
            features = norm_features(module)
            assert features is not None
            blend_of[id(module)] = progressive_norm(module, features, initial=initial, eps=eps, momentum=momentum)
        setattr(parent, attribute, blend_of[id(module)])
        replaced.append(name)
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} has no LayerNorm or RMSNorm over its last dimension"
            + (" outside `exclude`" if exclude else "")
            + "; there is nothing to replace"
        )
    norms = [norm.new_norm for norm in blend_of.values()]
    if {norm.bn.eps for norm in norms} == {getattr(getattr(model, "config", None), "rms_norm_eps", None)}:
        adopt_llama(model, replaced, {"initial": "language" if initial == "auto" else initial, "momentum": momentum})
    if mask_argument is not None and mask_argument in inspect.signature(model.forward).parameters:
        follow_attention_mask(model, mask_argument)
    return replaced
