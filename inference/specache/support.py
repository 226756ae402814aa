"""Which models the method covers: decoders whose every layer attends to all earlier tokens."""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from .options import SpeCacheOptions


def check_config(config: PreTrainedConfig, options: SpeCacheOptions) -> None:
    """Refuse a configuration with layers that the method does not cover, or a budget larger than its context.

    Raises:
        ValueError: As `check_layers`, or the budget.
    """
    check_layers(config, "SpeCache")
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and options.top_k > limit:
        raise ValueError(f"top_k is {options.top_k}, larger than the model's context of {limit} tokens: lower it")


def check_layers(config: PreTrainedConfig, what: str) -> None:
    """Refuse a configuration with layers whose tokens do not all see all earlier ones.

    Args:
        config: The model's configuration.
        what: The cache, for the message.

    Raises:
        ValueError: Encoder-decoder, state-space or linear attention, sliding or chunked windows, latent attention, or
            layers that share keys and values.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder: {what} is for decoders only")
    config = config.get_text_config(decoder=True)
    for index, kind in enumerate(_layer_kinds(config)):
        if kind != "full_attention":
            raise ValueError(f"layer {index} of this {name} model is {kind}: {what} needs full attention in all layers")
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"{name} has no attention heads: {what} needs full attention in all layers")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"layer 0 of this {name} model has latent attention, whose cache is compressed already")
    if shared := getattr(config, "num_kv_shared_layers", 0):
        first = config.num_hidden_layers - shared
        raise ValueError(f"layer {first} of this {name} model reads the keys and values of an earlier layer")


def _layer_kinds(config: PreTrainedConfig) -> list[str]:
    """What each layer is, as the library's own cache sees it."""
    if (block_types := getattr(config, "layers_block_type", None)) is not None:
        named = {"attention": "full_attention", "full_attention": "full_attention"}
        kinds = [named.get(kind, kind) for kind in block_types]
        if set(kinds) != {"full_attention"}:
            return kinds
    try:
        layers = DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{config.model_type} has layers that are no attention ({error})") from None
    declared = getattr(config, "layer_types", None) or [None] * len(layers)
    return [
        "full_attention" if type(layer) is DynamicLayer else kind or _spelled(type(layer).__name__)
        for layer, kind in zip(layers, declared, strict=False)
    ]


def _spelled(class_name: str) -> str:
    return "sliding_attention" if "Sliding" in class_name else class_name


def check_model(model: PreTrainedModel, config: PreTrainedConfig, what: str) -> None:
    """See `DecodingCache.check_model`."""
    own = model.config.get_text_config(decoder=True)
    if own.num_hidden_layers != config.num_hidden_layers:
        raise ValueError(
            f"the cache was made for {config.num_hidden_layers} layers, the model has {own.num_hidden_layers}: "
            "make it from model.config"
        )
    if getattr(model, "_is_stateful", False):
        raise ValueError(f"{type(model).__name__} keeps a state besides keys and values: {what} does not cover it")
    if not model._can_set_attn_implementation():
        raise ValueError(f"{type(model).__name__} does not call transformers' attention interface, which {what} needs")
