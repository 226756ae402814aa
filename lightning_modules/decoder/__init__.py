"""The one decoder-only transformer of the project, registered with transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration import DecoderConfig
from .modeling import DecoderForCausalLM, DecoderModel, DecoderOutput
from .presets import PRESETS, decoder_config, register_preset
from .slots import ATTENTION_PROJECTIONS, FEED_FORWARDS, NORMS, PROJECTIONS
from .tokens import DistinctTokens, TokenContext

AutoConfig.register(DecoderConfig.model_type, DecoderConfig, exist_ok=True)
AutoModel.register(DecoderConfig, DecoderModel, exist_ok=True)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM, exist_ok=True)

__all__ = [
    "ATTENTION_PROJECTIONS",
    "FEED_FORWARDS",
    "NORMS",
    "PRESETS",
    "PROJECTIONS",
    "DecoderConfig",
    "DecoderForCausalLM",
    "DecoderModel",
    "DecoderOutput",
    "DistinctTokens",
    "TokenContext",
    "decoder_config",
    "register_preset",
]
