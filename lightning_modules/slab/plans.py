"""Who reads the norms of the decoder and of a transformers Llama."""

from collections.abc import Iterator

from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

from ..decoder.feed_forward import DenseFeedForward
from ..decoder.modeling import DecoderForCausalLM, DecoderLayer
from .fusion import NormSite, register_plan

TIED = "the output layer shares its weight with the embedding"


def _head(model: DecoderForCausalLM | LlamaForCausalLM) -> Iterator[NormSite]:
    if model.lm_head.weight is model.model.embed_tokens.weight:
        yield NormSite("model.norm", reason=TIED)
    else:
        yield NormSite("model.norm", consumers=("lm_head",))


@register_plan(DecoderForCausalLM)
def _decoder(model: DecoderForCausalLM) -> Iterator[NormSite]:
    yield from _head(model)


@register_plan(LlamaForCausalLM)
def _llama(model: LlamaForCausalLM) -> Iterator[NormSite]:
    yield from _head(model)


@register_plan(DecoderLayer)
def _decoder_layer(layer: DecoderLayer) -> Iterator[NormSite]:
    attention, feed_forward = layer.attention, layer.feed_forward
    projections = tuple(f"attention.{name}_proj" for name in "qkv")
    if attention.qkv_proj is None and all(isinstance(layer.get_submodule(name), nn.Linear) for name in projections):
        yield NormSite("attention_norm", consumers=projections)
    else:
        yield NormSite("attention_norm", reason="the projections are no linear layers")
    if isinstance(feed_forward, DenseFeedForward):
        names = ("gate", "up") if feed_forward.gate is not None else ("up",)
        yield NormSite("feed_forward_norm", consumers=tuple(f"feed_forward.{name}" for name in names))
    else:
        yield NormSite("feed_forward_norm", reason=f"{type(feed_forward).__name__} is more than linear layers")


@register_plan(LlamaDecoderLayer)
def _llama_layer(layer: LlamaDecoderLayer) -> Iterator[NormSite]:
    yield NormSite("input_layernorm", consumers=tuple(f"self_attn.{name}_proj" for name in "qkv"))
    yield NormSite("post_attention_layernorm", consumers=("mlp.gate_proj", "mlp.up_proj"))
