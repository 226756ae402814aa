"""The project's decoder-only transformer: a transformers model whose norm, projections and feed-forward are slots."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration import DecoderConfig
from .feed_forward import StackedExperts
from .slots import ATTENTION_PROJECTIONS, FEED_FORWARDS, NORMS, PROJECTIONS
from .tokens import TokenContext


@dataclass
class DecoderModelOutput(BaseModelOutputWithPast):
    """Hidden states and cache, and the context that the layers shared."""

    tokens: Any = None


@dataclass
class DecoderOutput(CausalLMOutputWithPast):
    """Loss, logits and cache.

    `loss` is the next-token loss plus the auxiliary losses; `auxiliary_losses` holds each of them, weighted and
    summed over layers.
    """

    auxiliary_losses: dict[str, Tensor] | None = None


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, through transformers' attention interface.

    Args:
        config: sizes and the projection slot.
        layer_index: place in the stack, which is also the cache's layer.
    """

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        d, bias, options = config.hidden_size, config.attention_bias, config.options("projection")
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim

        def project(num_in: int, num_out: int) -> nn.Module:
            return PROJECTIONS.build(config.projection, config, num_in, num_out, bias, **options)

        self.qkv_proj: nn.Module | None = None
        if config.projection in ATTENTION_PROJECTIONS:
            if width != d:
                raise ValueError(
                    f"projection {config.projection!r} has no output projection, so num_attention_heads x head_dim = "
                    f"{width} must be hidden_size {d}; change one of them"
                )
            widths = (width, kv_width, kv_width)
            self.qkv_proj = ATTENTION_PROJECTIONS.build(config.projection, config, d, widths, bias, **options)
        else:
            self.q_proj, self.k_proj, self.v_proj = project(d, width), project(d, kv_width), project(d, kv_width)
            self.o_proj = project(width, d)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map (B, T, d) to (B, T, d) and, for the eager implementation, the attention weights (B, H, T, S)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        if self.qkv_proj is None:
            projected = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        else:
            projected = self.qkv_proj(hidden_states)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in projected)  # (B, H, T, head_dim)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return (out if self.qkv_proj is not None else self.o_proj(out)), weights


@runtime_checkable
class SelfInitialised(Protocol):
    """A module of a method that fills its own parameters, through `transformers.initialization`."""

    def initialise(self, initializer_range: float) -> None:
        """Fill the parameters; the argument is the configuration's standard deviation."""


class DecoderLayer(GradientCheckpointingLayer):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Args:
        config: sizes and slots.
        layer_index: place in the stack.
    """

    def __init__(self, config: DecoderConfig, layer_index: int) -> None:
        super().__init__()
        norm_options = config.options("norm")
        self.attention_norm = NORMS.build(config.norm, config, config.hidden_size, **norm_options)
        self.attention = Attention(config, layer_index)
        self.feed_forward_norm = NORMS.build(config.norm, config, config.hidden_size, **norm_options)
        self.feed_forward = FEED_FORWARDS.build(
            config.feed_forward, config, layer_index, **config.options("feed_forward")
        )

    def forward(
        self,
        hidden_states: Tensor,
        tokens: TokenContext,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map the residual stream (B, T, d) to (B, T, d)."""
        attended, _ = self.attention(
            self.attention_norm(hidden_states), position_embeddings, attention_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states), tokens)


class DecoderPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, save, initialise and place the model."""

    config_class = DecoderConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}  # noqa: RUF012

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True loses the gradients that layers share through the tokens; pass use_reentrant=False"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StackedExperts):
            initialization.normal_(module.up, std=self.config.initializer_range)
            initialization.normal_(module.down, std=self.config.initializer_range)
        elif isinstance(module, SelfInitialised):
            module.initialise(self.config.initializer_range)


class DecoderRotaryEmbedding(GPTNeoXRotaryEmbedding):
    """Rotary positions whose frequencies stay in float32 when the model is cast.

    In bfloat16 they would be wrong by up to 0.4 %, and a model trained so would be loaded with the exact ones.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


class DecoderModel(DecoderPreTrainedModel):
    """Embedding, layers and final norm.

    Args:
        config: sizes and slots.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        # a layer that looks up what came before the current tokens says so
        self._reads_history = any(getattr(layer.feed_forward, "reads_history", False) for layer in self.layers)
        self.norm = NORMS.build(config.norm, config, config.hidden_size, **config.options("norm"))
        # norms with statistics over tokens leave padding out
        self._masked_norms: list[Any] = [module for module in self.modules() if hasattr(module, "token_mask")]
        self.rotary = DecoderRotaryEmbedding(config)  # type: ignore[arg-type]  # reads the same fields
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value

    def token_context(
        self, input_ids: Tensor | None, embeddings: Tensor, attention_mask: Tensor | None
    ) -> TokenContext:
        """What the layers may know about the tokens. A method that reads tables overrides this."""
        mask = attention_mask
        if mask is not None and (mask.dim() != 2 or mask.shape != embeddings.shape[:2]):
            mask = None
        return TokenContext(input_ids, embeddings, self.embed_tokens, mask)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DecoderModelOutput:
        """Hidden states (B, T, d) after the final norm.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, S) with 0 at padding, or a prepared 4-d mask.
            position_ids: (B, T); counted on from the cache by default.
            past_key_values: cache of earlier tokens.
            inputs_embeds: (B, T, d) in place of `input_ids`.
            use_cache: return a cache.
            **kwargs: handed to the attention implementation.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        tokens = self.token_context(input_ids, inputs_embeds, attention_mask)
        if self.gradient_checkpointing and self.training and input_ids is not None:
            # made here: made by the first layer that asks, they would belong to that layer's checkpoint
            _ = tokens.distinct
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self._reads_history:
            tokens.begin(past_key_values)
        if self._masked_norms:
            padded = tokens.attention_mask is not None and not tokens.attention_mask.all()
            for norm in self._masked_norms:
                norm.token_mask = tokens.attention_mask if padded else None
        hidden_states = F.dropout(inputs_embeds, self.config.embedding_dropout, self.training)
        position_embeddings = self.rotary(hidden_states, position_ids=position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                tokens=tokens,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return DecoderModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, tokens=tokens
        )


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """The decoder with its output layer; loads with `AutoModelForCausalLM`.

    Args:
        config: sizes and slots.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _model_class: type[DecoderModel] = DecoderModel

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> DecoderOutput:
        """Logits (B, T, V), and the loss when labels are given.

        Args:
            input_ids: (B, T) token ids.
            attention_mask: (B, S) with 0 at padding, or a prepared 4-d mask.
            position_ids: (B, T); counted on from the cache by default.
            past_key_values: cache of earlier tokens.
            inputs_embeds: (B, T, d) in place of `input_ids`.
            labels: (B, T) ids, -100 where none; position t is predicted from t - 1 (the shift happens here).
            use_cache: return a cache.
            logits_to_keep: logits of only the last so many positions, or of these positions; 0 for all.
            **kwargs: handed to the attention implementation and the loss.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, keep])
        # the sum over layers, as in Megatron-LM, with which MoLE's baselines were trained
        auxiliary = {name: torch.stack(values).sum() for name, values in outputs.tokens.losses.items()}
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss + sum(auxiliary.values())
        return DecoderOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            auxiliary_losses=auxiliary or None,
        )
