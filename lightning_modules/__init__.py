"""What is trained: models, registered with transformers' auto classes on import, and their LightningModules."""

import lazy_loader

# models register themselves with transformers and with the decoder's slots when they are imported
from . import decoder as _decoder  # noqa: F401
from . import memoryformer as _memoryformer  # noqa: F401
from . import mole as _mole  # noqa: F401
from . import slab as _slab  # noqa: F401
from . import vision as _vision  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "decoder": ["DecoderConfig", "DecoderForCausalLM", "decoder_config"],
        "image_classification": ["ImageClassificationModule"],
        "language_model": ["CausalLMModule"],
        "memoryformer": ["KeyedMemory", "MemoryFormerConfig", "MemoryFormerForCausalLM", "MemoryLayer"],
        "memoryformer.module": ["MemoryFormerLightning"],
        "mole": ["MoLEForCausalLM", "MoLELookupConfig", "MoLELookupForCausalLM"],
        "mole.module": ["MoLELightning"],
        "object_detection": ["ObjectDetectionModule"],
        "slab": [
            "FusedDecoderForCausalLM",
            "FusedLlamaForCausalLM",
            "NormSite",
            "PRepBNLlamaForCausalLM",
            "ProgressiveNorm",
            "RepBatchNorm",
            "SimplifiedLinearAttention",
            "follow_attention_mask",
            "fuse_norms",
            "fused_classifier",
            "fused_detector",
            "fused_model",
            "progressive_norm",
            "register_plan",
            "replace_norms",
            "set_token_mask",
        ],
        "slab.module": ["SLABLightning"],
        "vision": ["VisionBackbone", "VisionConfig", "VisionForImageClassification", "vision_config"],
    },
)
