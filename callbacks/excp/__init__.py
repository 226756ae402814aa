"""Checkpoints tens of times smaller (ExCP, arXiv 2406.11257); public names are imported when first used."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "checkpoint_io": ["ExCPCheckpointIO", "SaveEvent"],
        "codec": ["encode"],
        "decoding": ["advance", "decode"],
        "metrics": ["ExCPMetrics"],
        "options": ["ExCPOptions"],
        "report": ["ParameterReport", "SaveReport"],
        "saves": ["EncodedSave", "Reference"],
        "sharded": ["ExCPStorageReader", "ExCPStorageWriter"],
        "strategies": ["ExCPFSDPStrategy", "ExCPModelParallelStrategy"],
        "restore": ["Restored", "expanded", "load_checkpoint", "restore"],
    },
)
