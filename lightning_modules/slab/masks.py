"""Tell a model's batch norms which tokens are padding."""

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .norms import RepBatchNorm


def set_token_mask(model: nn.Module, mask: Tensor | None) -> None:
    """Leave tokens out of all batch statistics of a model until the next call.

    Activation checkpointing reads the mask again in the backward pass, so it must stay until that is done.

    Args:
        model: any model with `RepBatchNorm`.
        mask: leading dimensions of the norms' inputs, (B, T) for hidden states (B, T, C); 0 or False at padding. None
            for no padding.
    """
    for module in model.modules():
        if isinstance(module, RepBatchNorm):
            module.token_mask = mask


def follow_attention_mask(model: nn.Module, argument: str = "attention_mask") -> RemovableHandle:
    """Take the token mask from an argument of every pass with batch statistics; the decoder does it by itself.

    Args:
        model: a model whose `forward` has the argument, (B, T) with 0 at padding. A mask of another number of
            dimensions, which says who attends to whom, is not looked at; a longer one (with cached tokens) is cut on
            the left.
        argument: its name.

    Returns:
        A handle whose `remove()` ends this.

    Raises:
        ValueError: `forward` has no such argument.
    """
    signature = inspect.signature(model.forward)
    if argument not in signature.parameters:
        raise ValueError(
            f"forward of {type(model).__name__} has no argument {argument!r} to take the token mask from; name another "
            f"one, or call set_token_mask before each batch"
        )

    norms = [module for module in model.modules() if isinstance(module, RepBatchNorm)]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # not the model's own mode: in recalibration only the batch norms train
        if not any(norm.bn.training for norm in norms):
            return
        given = signature.bind_partial(*args, **kwargs).arguments
        mask = given.get(argument)
        if mask is not None:
            tokens = given.get("input_ids")
            tokens = given.get("inputs_embeds") if tokens is None else tokens
            mask = mask[:, -tokens.shape[1] :] if mask.dim() == 2 and tokens is not None else mask
            mask = None if mask.dim() != 2 or bool(mask.all()) else mask
        for norm in norms:
            norm.token_mask = mask

    return model.register_forward_pre_hook(before, with_kwargs=True)
