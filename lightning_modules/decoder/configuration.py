"""Configuration of the project's decoder-only transformer."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .slots import ATTENTION_PROJECTIONS, FEED_FORWARDS, NORMS, PROJECTIONS

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
DERIVED_SIZES = ("intermediate_size", "num_key_value_heads", "head_dim")


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise a ValueError with the nearest names when `name` is not among the known ones."""
    known = sorted(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
        raise ValueError(f"unknown {kind} {name!r}; nearest: {', '.join(near)}")


class DecoderConfig(PreTrainedConfig):
    """Sizes and slots of a `DecoderForCausalLM`; every field can be set from YAML.

    The block is pre-norm with sequential residuals. A slot is named by a string; `*_options` go to its builder.

    Args:
        vocab_size: rows of the embedding, padding included.
        hidden_size: width of the residual stream, d.
        intermediate_size: hidden width of the dense feed-forward (of the shared expert for MoLE); 4 d by default.
        num_hidden_layers: layers, L.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads (grouped-query attention); as many as query heads by default.
        head_dim: width of a head; `hidden_size / num_attention_heads` by default.
        hidden_act: activation by its transformers name.
        gated_feed_forward: multiply the activation with a second projection (SwiGLU form).
        norm: slot `rmsnorm`, `layernorm`, or one that a method registers.
        norm_eps: added to the variance.
        norm_options: arguments of the norm's builder.
        projection: slot of the attention projections: `linear`, or one that a method registers (`memory`).
        projection_options: arguments of the projection's builder.
        feed_forward: slot `dense`, `moe`, or one that a method registers (`mole`, `memory`).
        feed_forward_options: arguments of the feed-forward's builder.
        max_position_embeddings: longest sequence in tokens.
        rope_parameters: as in transformers: `rope_type`, `rope_theta`, `partial_rotary_factor` (the rotated fraction
            of each head, 1.0 by default).
        initializer_range: standard deviation of the normal initialisation.
        attention_bias: bias on the attention projections.
        mlp_bias: bias in the dense feed-forward.
        attention_dropout: dropout probability on attention weights.
        embedding_dropout: dropout probability on the embedding output. A model trained with it can not be turned into
            lookup tables.
        tie_word_embeddings: share the embedding with the output layer.
    """

    model_type = "tenfold-decoder"
    keys_to_ignore_at_inference = ("past_key_values", "auxiliary_losses")

    vocab_size: int = 50304
    hidden_size: int = 768
    intermediate_size: int = None  # type: ignore[assignment]  # derived in __post_init__
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = None  # type: ignore[assignment]  # derived in __post_init__
    head_dim: int = None  # type: ignore[assignment]  # derived in __post_init__
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    norm_options: dict[str, Any] | None = None
    projection: str = "linear"
    projection_options: dict[str, Any] | None = None
    feed_forward: str = "dense"
    feed_forward_options: dict[str, Any] | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # derived in __post_init__
    initializer_range: float = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    embedding_dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in derived sizes and check them.

        Raises:
            ValueError: sizes that do not divide or are out of range, or an unknown name of a slot, an activation or a
                rope type.
        """
        self._check_ranges()
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}; change one of them"
            )
        default_rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        self.rope_parameters = default_rope | (self.rope_parameters or {})
        rotated = self.head_dim * self.rope_parameters["partial_rotary_factor"]
        if rotated != int(rotated) or int(rotated) % 2:
            raise ValueError(
                f"partial_rotary_factor {self.rope_parameters['partial_rotary_factor']} of head_dim {self.head_dim} "
                f"rotates {rotated} values; it must be an even whole number"
            )
        projections = ATTENTION_PROJECTIONS if self.projection in ATTENTION_PROJECTIONS else PROJECTIONS
        for registry, name in ((NORMS, self.norm), (projections, self.projection), (FEED_FORWARDS, self.feed_forward)):
            registry.check(name)
        super().__post_init__(**kwargs)

    def _check_ranges(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is None and name in DERIVED_SIZES:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} {value!r} is not a whole number above 0")
        for name in ("attention_dropout", "embedding_dropout"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise ValueError(f"{name} {value!r} is not a probability from 0 to below 1")
        for name in ("norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} {value!r} is not a number of at least 0")
        check_name("hidden_act", self.hidden_act, ACT2FN)
        # transformers knows the default without listing it
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        check_name("rope_type", rope_type, {"default", *ROPE_INIT_FUNCTIONS})

    def options(self, slot: Literal["norm", "projection", "feed_forward"]) -> dict[str, Any]:
        """Arguments of a slot's builder."""
        return dict(getattr(self, f"{slot}_options") or {})
