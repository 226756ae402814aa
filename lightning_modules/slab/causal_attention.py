"""ReLU linear attention for causal language models, under the name `relu_linear` of transformers' attention interface.

An extension: SLAB (arXiv 2405.11582) keeps softmax attention in its language model. Any model that takes its attention
from the interface, the decoder and transformers' Llama among them, runs with it: `attn_implementation="relu_linear"`.
"""

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

from ...kernels.linear_attention import causal_linear_attention

NAME = "relu_linear"


def relu_linear_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention with weights `relu(q) . relu(k)`, for the last N of M tokens.

    Args:
        module: the attention layer.
        query: (B, H, N, d).
        key: (B, H_kv, M, d).
        value: (B, H_kv, M, d).
        attention_mask: (B, M) with 0 at padding, or None.
        dropout: must be 0: there is no matrix of weights to drop from.
        **kwargs: not used; the scale of the weights cancels.

    Returns:
        (B, N, H, d), and None in place of the weights.

    Raises:
        ValueError: dropout, a mask of another form, or a module that is not causal.
    """
    if dropout:
        raise ValueError(f"attention_dropout {dropout} cannot be had with {NAME}; set it to 0")
    if not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} is causal, {type(module).__name__} is not; use linear_attention for it")
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(
                f"{NAME} takes a mask of padding (B, M), got {tuple(attention_mask.shape)}; packed documents that "
                f"do not see each other need softmax attention"
            )
        # a key of zeros has no weight anywhere
        key = key.masked_fill(~attention_mask.bool()[:, None, :, None], 0.0)
    groups = query.shape[1] // key.shape[1]
    out = causal_linear_attention(query, repeat_kv(key, groups), repeat_kv(value, groups))
    return out.transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(NAME, relu_linear_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, flash_attention_mask)
