"""What is fed: named assets, text, labelled images, images with boxes. Public names are imported when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assets": ["cache_dir", "find_asset", "get_asset", "resolve"],
        "detection": ["CocoDetectionDataModule"],
        "documents": ["split_of"],
        "image": ["ImageDataModule"],
        "retrieval": ["KeyValueRecallDataModule", "recall_prompts"],
        "stamp_scenes": ["StampScenesDataModule", "build_stamp_scenes"],
        "text": ["TextDataModule"],
    },
)
