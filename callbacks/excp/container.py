"""The file of an ExCP save: a torch archive whose clear part Lightning's tools read, with the coded parts as bytes.

`torch.load(path, weights_only=True)` gives a dictionary with the checkpoint's small top-level entries as they are
(`hyper_parameters`, `epoch`, `global_step`, versions) and, under `tenfold_excp`, magic, version, the save's identity
and three byte tensors: the header (JSON, compressed), the rest of the checkpoint (a torch archive of its own, so that
it can be checked before it is trusted) and the payload. Weights are not in the clear part: whoever looks for
`state_dict` finds none.
"""

import hashlib
import io
import json
import os
import pickle
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic_file import replacing
from .saves import EncodedSave

MAGIC = "tenfold-excp"
VERSION = 1
KEY = "tenfold_excp"
_SECTIONS = ("header", "rest", "payload")
# what Lightning's command line, `load_from_checkpoint` and people look at; everything else may be large
_CLEAR = (
    "epoch",
    "global_step",
    "pytorch-lightning_version",
    "hyper_parameters",
    "hparams_name",
    "hparams_type",
    "datamodule_hyper_parameters",
    "datamodule_hparams_name",
    "datamodule_hparams_type",
)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which save a file holds, and where in its chain.

    Attributes:
        save_id: digest of the content.
        base_id: the save that it is coded against; None for a key frame.
        chain_id: the chain's key frame.
        position: saves between the key frame and this one, this one included; 0 for the key frame.
        alias: whether it holds nothing but small values, its tensors being those of the base.
    """

    save_id: str
    base_id: str | None = None
    chain_id: str
    position: int = 0
    alias: bool = False


def _bytes_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def write_save(encoded: EncodedSave, path: str | os.PathLike[str], base: Identity | None = None) -> Identity:
    """Writes a save under its final name as a whole or not at all, and flushed to the disk.

    Args:
        encoded: the save.
        path: the file; its folder is made.
        base: the save that this one is coded against; None for a key frame.

    Returns:
        what names the save.

    Raises:
        OSError: the disk is full or the folder not writable; what was under `path` is untouched then.
    """
    whole = envelope(encoded, base)
    write_envelope(whole, Path(path))
    return identity_of(whole)


def write_envelope(whole: dict[str, Any], path: Path) -> None:
    """Writes what `envelope` gave, as `write_save` does."""
    with replacing(path) as file:
        torch.save(whole, file)


def identity_of(whole: dict[str, Any]) -> Identity:
    """The identity in what `envelope` gave."""
    return Identity(**whole[KEY]["identity"])


def envelope(encoded: EncodedSave, base: Identity | None = None) -> dict[str, Any]:
    """The dictionary that the file holds."""
    assert encoded.key_frame == (base is None), "a residual save names its base, a key frame has none"
    rest = io.BytesIO()
    torch.save(encoded.rest, rest)
    sections = {
        "header": zlib.compress(json.dumps(encoded.header, separators=(",", ":")).encode(), 9),
        "rest": rest.getvalue(),
        "payload": encoded.payload,
    }
    clear = {key: encoded.rest[key] for key in _CLEAR if isinstance(encoded.rest, dict) and key in encoded.rest}
    block: dict[str, Any] = {"magic": MAGIC, "version": VERSION}
    for name, data in sections.items():
        block[name] = _bytes_tensor(data)
        block[f"{name}_crc32"] = zlib.crc32(data)
    block["identity"] = asdict(_identify(sections, base, alias=encoded.alias))
    return clear | {KEY: block}


def _identify(sections: dict[str, bytes], base: Identity | None, *, alias: bool) -> Identity:
    base_id, position = (base.save_id, base.position + 1) if base else (None, 0)
    digest = hashlib.sha256(json.dumps([base_id, base.chain_id if base else None, position, alias]).encode())
    for name in _SECTIONS:
        digest.update(sections[name])
    save_id = digest.hexdigest()[:32]
    chain_id = base.chain_id if base else save_id
    return Identity(save_id=save_id, base_id=base_id, chain_id=chain_id, position=position, alias=alias)


def read_identity(path: str | os.PathLike[str], *, weights_only: bool = True) -> Identity:
    """Which save a file holds, without reading its payload.

    Args:
        path: the file.
        weights_only: refuse hyper-parameters that are not plain values, as in `torch.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, of a newer version or damaged.
    """
    path = Path(path)
    return _identity(_block(_open(path, weights_only=weights_only), path), path)


def _identity(block: dict[str, Any], path: Path) -> Identity:
    try:
        return Identity(**block["identity"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: its identity is missing or damaged; restore the file from a copy") from error


def is_save(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an ExCP save, by its looks alone; never raises for an existing file."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return bool(names) and MAGIC.encode() in archive.read(names[0])
    except (zipfile.BadZipFile, OSError, zlib.error, ValueError):
        return False


def read_save(path: str | os.PathLike[str], *, weights_only: bool = True) -> EncodedSave:
    """Reads a save and checks its sections and identity; `codec.decode` checks each tensor.

    Args:
        path: the file.
        weights_only: refuse a rest that holds other than plain values and tensors, as in `torch.load`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is something else, of a newer version, cut off or altered.
    """
    path = Path(path)
    outer = _open(path, weights_only=weights_only)
    block = _block(outer, path)
    identity = _identity(block, path)
    sections = {name: _section(block, name, path) for name in _SECTIONS}
    base = None
    if identity.base_id is not None:
        base = Identity(save_id=identity.base_id, chain_id=identity.chain_id, position=identity.position - 1)
    if _identify(sections, base, alias=identity.alias) != identity:
        raise ValueError(f"{path}: its identity does not fit its content; restore the file from a copy")
    try:
        header = json.loads(zlib.decompress(sections["header"]))
    except (zlib.error, ValueError) as error:
        raise ValueError(f"{path}: header is damaged ({error}); restore the file from a copy") from error
    rest = _load(io.BytesIO(sections["rest"]), path, weights_only=weights_only)
    encoded = EncodedSave(header, sections["payload"], rest)
    clear = {key: value for key, value in outer.items() if key != KEY}
    if not _equal(clear, {key: encoded.rest[key] for key in _CLEAR if isinstance(rest, dict) and key in rest}):
        raise ValueError(f"{path}: its clear part was altered; restore the file from a copy")
    return encoded


def _open(path: Path, *, weights_only: bool = True) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    # mapped: whoever wants the identity alone does not read the payload
    return _load(path, path, weights_only=weights_only, mmap=True)


def _block(outer: Any, path: Path) -> dict[str, Any]:
    block = outer.get(KEY) if isinstance(outer, dict) else None
    if not isinstance(block, dict) or block.get("magic") != MAGIC:
        raise ValueError(f"{path} is not an ExCP checkpoint; a plain one needs no ExCP to be loaded")
    if block.get("version") != VERSION:
        raise ValueError(
            f"{path} has ExCP version {block.get('version')!r}, this tenfold reads version {VERSION}; upgrade tenfold"
        )
    return block


def _load(source: Path | io.BytesIO, path: Path, *, weights_only: bool, mmap: bool = False) -> Any:
    try:
        return torch.load(source, map_location="cpu", weights_only=weights_only, mmap=mmap)
    except pickle.UnpicklingError as error:
        # torch's message is long and tells how to switch its check off; its first line names the type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "not a torch archive"
        raise ValueError(f"{path} cannot be read as an ExCP checkpoint: damaged, or {reason}") from error
    except (
        RuntimeError,
        EOFError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        ValueError,
        OverflowError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is cut off or damaged ({reason}); restore the file from a copy") from error


def _section(block: dict[str, Any], name: str, path: Path) -> bytes:
    data = block.get(name)
    if not isinstance(data, Tensor) or data.dtype != torch.uint8:
        raise ValueError(f"{path}: {name} is missing; restore the file from a copy")
    found = data.numpy().tobytes()
    if zlib.crc32(found) != block.get(f"{name}_crc32"):
        # a damaged payload is told by the tensor it hits, where that can be told
        raise ValueError(f"{path}: {name} is damaged (checksum differs); restore the file from a copy")
    return found


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return list(first) == list(second) and all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(_equal, first, second))
    try:
        # NaN equals itself here
        return bool(first == second) or bool(first != first and second != second)
    except (TypeError, ValueError, RuntimeError):
        return True
