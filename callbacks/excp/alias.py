"""A save whose large tensors are all those of the save before it: its small values, and which save it repeats.

`last.ckpt` beside `step100.ckpt` is the common case: the same state, another record of which file is the best.
"""

from collections.abc import Mapping
from typing import Any

from .saves import EncodedSave, Reference
from .tree import Path, replace


def coded_paths(encoded: EncodedSave) -> list[Path]:
    """Where a checkpoint's coded tensors are."""
    return [tuple(record["path"]) for record in encoded.header["records"]]


def encode_alias(checkpoint: Mapping[str, Any], repeated: EncodedSave) -> EncodedSave:
    """A save that repeats another one.

    Args:
        checkpoint: the same bits as the repeated one's at all `coded_paths`; anything may differ elsewhere.
        repeated: the other save, itself no alias.
    """
    paths = coded_paths(repeated)
    header = {
        "options": repeated.header["options"],
        "base_digest": repeated.digest,
        "digest": repeated.digest,
        "records": [],
        "alias": [list(path) for path in paths],
        "report": repeated.header["report"] | {"payload_bytes": 0},
    }
    return EncodedSave(header, b"", replace(checkpoint, dict.fromkeys(paths)))


def decode_alias(encoded: EncodedSave, repeated: Mapping[str, Any], reference: Reference) -> dict[str, Any]:
    """The checkpoint of an alias.

    Args:
        encoded: the alias.
        repeated: the decoded checkpoint that it repeats.
        reference: what that one led to.

    Raises:
        ValueError: it repeats another save than the given one.
    """
    if encoded.base_digest != reference.digest:
        raise ValueError("ExCP: a checkpoint repeats another one than the one it names; restore the file from a copy")
    values = {}
    for keys in encoded.header["alias"]:
        value: Any = repeated
        for key in keys:
            value = value[key]
        values[tuple(keys)] = value
    return replace(encoded.rest, values)
