"""What runs and scores a trained model; public names are imported when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["evals"],
    submod_attrs={
        "evals": ["WandbOptions", "build_wikipedia_tasks", "evaluate_model", "model_digest"],
    },
)
