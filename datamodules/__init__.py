"""What is fed: named assets, text for language models, labelled images. Public names are imported when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assets": ["cache_dir", "find_asset", "get_asset", "resolve"],
        "documents": ["split_of"],
        "image": ["ImageDataModule"],
        "retrieval": ["KeyValueRecallDataModule", "recall_prompts"],
        "text": ["TextDataModule"],
    },
)
