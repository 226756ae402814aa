"""What runs and scores a trained model; public names are imported when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["evals", "specache"],
    submod_attrs={
        "evals": ["WandbOptions", "build_wikipedia_tasks", "evaluate_model", "model_digest"],
        "specache": [
            "SpeCache",
            "SpeCacheLM",
            "SpeCacheOptions",
            "build_cache",
            "generate_with_specache",
            "specache_generate",
        ],
    },
)
