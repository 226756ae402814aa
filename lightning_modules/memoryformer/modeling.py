"""The block of MemoryFormer (arXiv 2411.12992, section 2.3): what fills the decoder's slots."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...kernels.hash_gather import MAX_BITS, Weighting
from ..decoder.configuration import DecoderConfig
from ..decoder.slots import ATTENTION_PROJECTIONS, FEED_FORWARDS
from ..decoder.tokens import TokenContext
from .keyed import KeyedMemory
from .layer import MemoryLayer, Remainder, check_options
from .sizes import BlockSizes, check_memory, table_values

KeyName = Literal["sign_lsh", "token_id", "ngram_hash"]


class MemoryAttentionProjection(nn.Module):
    """Query, key and value from one hash of their common input: three memory layers whose tables lie side by side.

    There is no output projection. Tables start with GPT-NeoX's small initialisation, std = sqrt(2 / (5 d)).

    Args:
        config: the decoder's; says whether tables are trained or stored as bytes.
        in_features: width of the input, d.
        widths: of query, key and value.
        attention_bias: unused; the option `bias` says it, as this layer has one by default.
        num_bits: values per sub-vector, tau.
        weighting: see `MemoryLayer`.
        temperature: see `MemoryLayer`.
        remainder: see `MemoryLayer`.
        bias: add a learned vector.
    """

    def __init__(
        self,
        config: Any,
        in_features: int,
        widths: Sequence[int],
        attention_bias: bool,
        *,
        num_bits: int = 8,
        weighting: Weighting = "paper",
        temperature: float = 1.0,
        remainder: Remainder = "pad",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        check_options(in_features, num_bits, weighting, remainder, "parameter")
        check_tables(config)
        self.memory = MemoryLayer(
            in_features,
            sum(widths),
            bias,
            num_bits=num_bits,
            weighting=weighting,
            temperature=temperature,
            remainder=remainder,
            table_format=getattr(config, "table_format", "parameter"),
            table_on_host=getattr(config, "table_storage", "device") != "device",
            init_std=math.sqrt(2 / (5 * in_features)),
            initialise=False,
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """Map (..., d) to query, key and value."""
        return self.memory(hidden_states).split(self.widths, dim=-1)


class MemoryFeedForward(nn.Module):
    """`ML_2(LayerNorm(ML_1(x)))` without an activation between the two.

    ML_1 has tau bits and maps d to (tau + extra_bits) K values; ML_2 has tau + extra_bits bits and K sub-vectors.
    deviation: equation 13 as printed adds the residual to the normalised input; this is the usual pre-norm block, as in
    the released code.

    Args:
        config: the decoder's.
        layer_index: place in the stack.
        num_bits: tau.
        extra_bits: more bits of ML_2.
        weighting: see `MemoryLayer`.
        temperature: see `MemoryLayer`.
        remainder: see `MemoryLayer`.
        bias: add a learned vector in both.
    """

    def __init__(
        self,
        config: DecoderConfig,
        layer_index: int,
        *,
        num_bits: int = 8,
        extra_bits: int = 2,
        weighting: Weighting = "paper",
        temperature: float = 1.0,
        remainder: Remainder = "pad",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(extra_bits, int) or extra_bits < 0 or num_bits + extra_bits > MAX_BITS or num_bits < 1:
            raise ValueError(
                f"num_bits {num_bits} and extra_bits {extra_bits} make {num_bits + extra_bits} bits in the second "
                f"layer; between 1 and {MAX_BITS} work, the paper takes 8 and 2"
            )
        d = config.hidden_size
        options: dict[str, Any] = {
            "weighting": weighting,
            "temperature": temperature,
            "table_format": getattr(config, "table_format", "parameter"),
            "table_on_host": getattr(config, "table_storage", "device") != "device",
            "init_std": 0.02,
            "initialise": False,
        }
        inner = -(-d // num_bits) * (num_bits + extra_bits)
        check_tables(config)
        self.first = MemoryLayer(d, inner, bias, num_bits=num_bits, remainder=remainder, **options)
        self.norm = nn.LayerNorm(inner, eps=config.norm_eps)
        self.second = MemoryLayer(inner, d, bias, num_bits=num_bits + extra_bits, **options)

    def forward(self, hidden_states: Tensor, tokens: TokenContext | None = None) -> Tensor:
        """Map (..., d) to (..., d)."""
        return self.second(self.norm(self.first(hidden_states)))


def model_table_values(config: Any) -> int:
    """Table values of all layers of a model, both slots."""
    d, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    per_layer = 0
    if config.projection == "memory":
        width = (heads + 2 * kv_heads) * config.head_dim
        per_layer += table_values(d, width, config.options("projection").get("num_bits", 8))
    options = config.options("feed_forward")
    if config.feed_forward == "memory" and options.get("key", "sign_lsh") == "sign_lsh":
        per_layer += BlockSizes(d, options.get("num_bits", 8), options.get("extra_bits", 2)).feed_forward_values
    return config.num_hidden_layers * per_layer


def check_tables(config: Any) -> None:
    """Refuse a model that memory can't hold before its tables are made: they are filled only when all are there.

    Raises:
        ValueError: too few bytes are left; the message has both numbers.
    """
    device = torch.get_default_device()
    if device.type == "meta":
        return
    itemsize = torch.get_default_dtype().itemsize
    stored = {"int8": 1, "float16": 2}.get(getattr(config, "table_format", ""), itemsize)
    if getattr(config, "table_storage", "device") != "device":
        # they come later, or stay in the file
        stored = 0
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    what = f"a model of {config.num_hidden_layers} layers of width {config.hidden_size} with hash tables"
    check_memory(model_table_values(config) * stored + embeddings * itemsize, what, device)


def build_feed_forward(
    config: DecoderConfig,
    layer_index: int,
    *,
    key: KeyName = "sign_lsh",
    num_bits: int | None = None,
    extra_bits: int | None = None,
    weighting: Weighting | None = None,
    temperature: float | None = None,
    remainder: Remainder | None = None,
    bias: bool | None = None,
    orders: Sequence[int] | None = None,
    num_heads: int | None = None,
    num_rows: int | None = None,
    gate: Literal["none", "sigmoid", "softmax"] | None = None,
    beside_dense: bool | None = None,
) -> nn.Module:
    """Feed-forward slot `memory`: `MemoryFeedForward` for the key `sign_lsh`, else `KeyedMemory`.

    Raises:
        ValueError: an unknown key, or an option of the other kind of key.
    """
    hashed = {
        "num_bits": num_bits,
        "extra_bits": extra_bits,
        "weighting": weighting,
        "temperature": temperature,
        "remainder": remainder,
        "bias": bias,
    }
    keyed = {
        "orders": orders,
        "num_heads": num_heads,
        "num_rows": num_rows,
        "gate": gate,
        "beside_dense": beside_dense,
    }
    if key not in ("sign_lsh", "token_id", "ngram_hash"):
        raise ValueError(f"key {key!r} is not one of 'sign_lsh', 'token_id', 'ngram_hash'")
    own, other = (hashed, keyed) if key == "sign_lsh" else (keyed, hashed)
    wrong = [name for name, value in other.items() if value is not None]
    if wrong:
        raise ValueError(f"key {key!r} takes no {', '.join(wrong)}; it takes {', '.join(own)}")
    options: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    if key == "sign_lsh":
        return MemoryFeedForward(config, layer_index, **options)
    return KeyedMemory(config, layer_index, key=key, **options)


ATTENTION_PROJECTIONS.register("memory")(MemoryAttentionProjection)
FEED_FORWARDS.register("memory")(build_feed_forward)
