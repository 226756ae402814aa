"""`--storage` of `tenfold generate` and `tenfold evaluate`: where a model's tables lie, MoLE's or MemoryFormer's."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STORAGES = ("memory", "pinned", "mmap", "direct")
MODEL_TYPES = ("tenfold-mole-lookup", "tenfold-memoryformer")


def has_stored_tables(folder: str | Path) -> bool:
    """Whether a folder holds a model of a form with tables, MoLE's or MemoryFormer's."""
    try:
        fields = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(fields, dict) and fields.get("model_type") in MODEL_TYPES


@contextmanager
def table_storage(storage: Any) -> Iterator[None]:
    """Tables of models that are loaded meanwhile lie there; None leaves that to their configurations.

    Raises:
        ValueError: a place where no tables of the model that is loaded can lie.
    """
    if storage is None:
        yield
        return
    from ..lightning_modules.memoryformer import inference
    from ..lightning_modules.mole import lookup

    with lookup.table_storage(storage), inference.table_storage(storage):
        yield
