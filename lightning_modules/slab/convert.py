"""Fused models as plain folders: the decoder's and Llama's types whose norms are gone or per-channel affines."""

import copy
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..decoder.configuration import DecoderConfig
from ..decoder.modeling import DecoderForCausalLM, DecoderModel
from .fusion import ChannelAffine, NormSite, check_fusion, fixed_norms, fuse_norms, plan_fusion
from .llama import PRepBNLlamaForCausalLM


class FusedDecoderConfig(DecoderConfig):
    """A `DecoderConfig` without norms. Names may hold `*`, a layer's number.

    Args:
        affine_norms: places of norms that stay as a per-channel affine; all others are gone.
        biased_layers: linear layers that have a bias beyond what the other fields say.
    """

    model_type = "tenfold-fused-decoder"

    norm: str = "identity"
    affine_norms: list[str] | None = None
    biased_layers: list[str] | None = None


class FusedDecoderModel(DecoderModel):
    """The decoder without its output layer.

    Args:
        config: sizes.
    """

    config_class = FusedDecoderConfig


class FusedDecoderForCausalLM(DecoderForCausalLM):
    """The decoder after fusion; loads with `AutoModelForCausalLM`.

    Args:
        config: sizes, and what differs from the decoder.
    """

    config_class = FusedDecoderConfig
    _model_class = FusedDecoderModel

    def __init__(self, config: FusedDecoderConfig) -> None:
        super().__init__(config)
        apply_layout(self, [], config.affine_norms or [], config.biased_layers or [], config.hidden_size)
        self.post_init()


class FusedLlamaConfig(LlamaConfig):
    """A `LlamaConfig` without norms. Names may hold `*`, a layer's number.

    Args:
        removed_norms: norms that are gone.
        affine_norms: norms that stay as a per-channel affine.
        biased_layers: linear layers that have a bias beyond what the other fields say.
    """

    model_type = "tenfold-fused-llama"

    removed_norms: list[str] | None = None
    affine_norms: list[str] | None = None
    biased_layers: list[str] | None = None


class FusedLlamaForCausalLM(LlamaForCausalLM):
    """A transformers Llama after fusion; loads with `AutoModelForCausalLM`.

    Args:
        config: sizes, and what differs from Llama.
    """

    config_class = FusedLlamaConfig

    def __init__(self, config: FusedLlamaConfig) -> None:
        super().__init__(config)
        removed, affine = config.removed_norms or [], config.affine_norms or []
        apply_layout(self, removed, affine, config.biased_layers or [], config.hidden_size)
        self.post_init()


def apply_layout(
    model: nn.Module, removed: Iterable[str], affine: Iterable[str], biased: Iterable[str], num_features: int
) -> None:
    """Give a fresh model the modules of a fused one; they are filled when weights are loaded."""
    names = [name for name, _ in model.named_modules()]
    for name in _matching(names, removed):
        model.set_submodule(name, nn.Identity())
    for name in _matching(names, affine):
        model.set_submodule(name, ChannelAffine(num_features))
    for name in _matching(names, biased):
        layer: Any = model.get_submodule(name)
        layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))


def _matching(names: Sequence[str], patterns: Iterable[str]) -> list[str]:
    patterns = list(patterns)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def condense(names: Sequence[str], among: Sequence[str]) -> list[str]:
    """The names with `*` for a layer's number, where that matches no other name of `among`.

    >>> condense(["layers.0.q", "layers.1.q", "norm"], ["layers.0.q", "layers.0.k", "layers.1.q", "layers.1.k", "norm"])
    ['layers.*.q', 'norm']
    >>> condense(["layers.0.q"], ["layers.0.q", "layers.1.q"])
    ['layers.0.q']
    """
    short: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        whole = set(_matching(among, [pattern])) <= set(names)
        short[pattern if whole else name] = None
    return list(short)


def fused_model(
    model: Any, *, keep: Sequence[str] = (), sites: Sequence[NormSite] = (), untie_head: bool = False
) -> Any:
    """A fused copy of a decoder or Llama, of a type that saves and loads.

    Args:
        model: the trained model, which stays as it is.
        keep: see `plan_fusion`.
        sites: see `plan_fusion`.
        untie_head: give a tied output layer its own weight, so that it can take over the last norm; that costs a
            second embedding matrix, where an affine costs two values per channel.

    Raises:
        ValueError: another kind of model, or see `fuse_norms`.
    """
    if not isinstance(model, DecoderForCausalLM | PRepBNLlamaForCausalLM):
        raise ValueError(
            f"only a decoder with `norm: prepbn` or a Llama after replace_norms has a fused form that loads again, "
            f"this is a {type(model).__name__}; fuse_norms fuses any model in place"
        )
    # before the copy is paid for
    check_fusion(model, plan_fusion(model, keep=keep, sites=sites))
    fused = copy.deepcopy(model).eval()
    if untie_head and fused.lm_head.weight is fused.model.embed_tokens.weight:
        fused.lm_head.weight = nn.Parameter(fused.lm_head.weight.detach().clone())
        fused.config.tie_word_embeddings = False
    plan = fuse_norms(fused, keep=keep, sites=sites)
    names = [name for name, _ in fused.named_modules()]
    layout: dict[str, Any] = {
        "affine_norms": condense([site.norm for site in plan if site.outcome == "affine"], names),
        "biased_layers": condense([name for site in plan for name in site.consumers], names),
    }
    fields = model.config.to_dict() | {"tie_word_embeddings": fused.config.tie_word_embeddings}
    for name in ("model_type", "architectures", "transformers_version", "norm_options", "progressive_norms"):
        fields.pop(name, None)
    kind: Any
    config: Any
    if isinstance(model, DecoderForCausalLM):
        kind, config = FusedDecoderForCausalLM, FusedDecoderConfig(**(fields | {"norm": "identity"} | layout))
    else:
        removed = condense([site.norm for site in plan if site.outcome != "affine"], names)
        kind, config = FusedLlamaForCausalLM, FusedLlamaConfig(**fields, removed_norms=removed, **layout)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        empty = kind(config)
    empty.load_state_dict(fused.state_dict(), strict=True, assign=True)
    empty.tie_weights()
    # buffers that are no part of a state dict, such as rotary frequencies
    for name, buffer in fused.named_buffers():
        owner = empty.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = buffer
    empty.generation_config = fused.generation_config
    return empty.eval()


@torch.no_grad()
def export_fused(model: Any, folder: Path, *, tokenizer: Any = None, **options: Any) -> dict[str, Any]:
    """Write the fused form of a model as a folder that `AutoModelForCausalLM` loads.

    Args:
        model: the trained model.
        folder: an existing, empty folder.
        tokenizer: saved beside the model when given.
        **options: as for `fused_model`.

    Returns:
        `norms`, `affine` (names that stayed as an affine) and `max_abs_logit_diff` on random tokens.

    Raises:
        ValueError: see `fused_model`.
    """
    fused = fused_model(model, **options)
    fused.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    difference = logit_difference(model, fused)
    affine = [name for name, part in fused.named_modules() if isinstance(part, ChannelAffine)]
    return {"norms": len(fixed_norms(model)), "affine": affine, "max_abs_logit_diff": difference}


@torch.no_grad()
def logit_difference(one: Any, other: Any, *, num_tokens: int = 64) -> float:
    """Largest difference of two models' logits on random tokens."""
    size = min(one.config.vocab_size, other.config.vocab_size)
    ids: Tensor = torch.randint(size, (2, num_tokens // 2), generator=torch.Generator().manual_seed(0))
    ids = ids.to(one.device)
    return float((one.eval()(ids).logits.float() - other.eval()(ids).logits.float()).abs().max())


for _config, _kind in ((FusedDecoderConfig, FusedDecoderForCausalLM), (FusedLlamaConfig, FusedLlamaForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _kind, exist_ok=True)
AutoModel.register(FusedDecoderConfig, FusedDecoderModel, exist_ok=True)
