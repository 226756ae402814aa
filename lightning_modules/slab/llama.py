"""A transformers Llama with progressive norms, as a model type of its own, so that its folders and checkpoints load."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ..decoder.modeling import SelfInitialised
from .norms import ProgressiveNorm, RepBatchNorm


class PRepBNLlamaConfig(LlamaConfig):
    """A `LlamaConfig` that says which norms are progressive.

    Args:
        progressive_norms: names of the replaced norms.
        norm_options: `initial` and `momentum` of the batch norms, and `old_norm: null` once the old norms are gone.
    """

    model_type = "tenfold-prepbn-llama"

    progressive_norms: list[str] | None = None
    norm_options: dict[str, Any] | None = None


class PRepBNLlamaForCausalLM(LlamaForCausalLM):
    """What `replace_norms` makes of a `LlamaForCausalLM`.

    Args:
        config: sizes and names of the progressive norms.
    """

    config_class = PRepBNLlamaConfig

    def __init__(self, config: PRepBNLlamaConfig) -> None:
        super().__init__(config)
        options = config.norm_options or {}
        for name in config.progressive_norms or []:
            new = RepBatchNorm(
                config.hidden_size,
                eps=config.rms_norm_eps,
                momentum=options.get("momentum", 0.1),
                initial=options.get("initial", "language"),
            )
            old = None if options.get("old_norm", "rmsnorm") is None else self.get_submodule(name)
            self.set_submodule(name, norm := ProgressiveNorm(old, new))
            norm.config = config
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SelfInitialised):
            module.initialise(self.config.initializer_range)


def adopt_llama(model: nn.Module, replaced: Iterable[str], options: dict[str, Any]) -> None:
    """Make a `LlamaForCausalLM` whose norms were replaced say so in its type and configuration; others stay.

    Args:
        model: with the blends in place.
        replaced: their names.
        options: `norm_options`.
    """
    if type(model) is not LlamaForCausalLM:
        return
    config: Any = model.config
    # the same objects, which layers and generation already refer to
    config.__class__, model.__class__ = PRepBNLlamaConfig, PRepBNLlamaForCausalLM
    config.progressive_norms, config.norm_options = list(replaced), dict(options)
    config.architectures = [PRepBNLlamaForCausalLM.__name__]
    for module in model.modules():
        if isinstance(module, ProgressiveNorm):
            module.config = config


AutoConfig.register(PRepBNLlamaConfig.model_type, PRepBNLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(PRepBNLlamaConfig, PRepBNLlamaForCausalLM, exist_ok=True)
