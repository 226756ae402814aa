"""Who reads the norms of the image backbones."""

from collections.abc import Iterator

from torch import nn

from ..vision.attention import ReducedAttention
from ..vision.layers import Block, ConvEmbedding, PatchMerging
from ..vision.modeling import VisionBackbone, VisionForImageClassification
from .fusion import NormSite, register_plan
from .vision import ReducedLinearAttention


@register_plan(VisionForImageClassification)
def _classifier(model: VisionForImageClassification) -> Iterator[NormSite]:
    yield NormSite("norm", consumers=("head",))


@register_plan(VisionBackbone)
def _backbone(model: VisionBackbone) -> Iterator[NormSite]:
    for name in model.norms:
        yield NormSite(f"norms.{name}", reason="whoever reads the map is no part of the backbone")


@register_plan(ConvEmbedding)
def _embedding(embedding: ConvEmbedding) -> Iterator[NormSite]:
    if embedding.norm is not None:
        yield NormSite("norm", producer="projection")


@register_plan(PatchMerging)
def _merging(merging: PatchMerging) -> Iterator[NormSite]:
    yield NormSite("norm", consumers=("reduction",))


@register_plan(Block)
def _block(block: Block) -> Iterator[NormSite]:
    attention: nn.Module = block.attention
    if not isinstance(attention, ReducedAttention | ReducedLinearAttention):
        names: tuple[str, ...] = ("qkv",)
    elif attention.reduction is None:
        names = ("query", "key_value")
    else:
        names = ("query", "reduction")
        yield NormSite("attention.norm", consumers=("attention.key_value",))
    yield NormSite("norm1", consumers=tuple(f"attention.{name}" for name in names))
    yield NormSite("norm2", consumers=("fc1",))
