"""A checkpoint back from its chain: as a dictionary, or as a plain file for whatever reads files by itself."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .alias import decode_alias
from .container import Identity, is_save, read_identity, read_save
from .decoding import advance, decode
from .saves import EncodedSave, Reference
from .store import SaveStore, store_of

Progress = Callable[[int, int], None]


@dataclass
class Restored:
    """A checkpoint, and what the next save of its chain needs.

    Attributes:
        checkpoint: as it was saved, weights and moments in their stored form.
        reference: for the next save.
        identity: of the save; of the one that it repeats where it is an alias.
        store: where its chain is.
    """

    checkpoint: dict[str, Any]
    reference: Reference
    identity: Identity
    store: SaveStore


def restore(
    path: str | os.PathLike[str],
    *,
    weights_only: bool = True,
    verify: bool = True,
    workers: int = 2,
    progress: Progress | None = None,
    store: SaveStore | None = None,
) -> Restored:
    """Decodes a checkpoint from its key frame on.

    Args:
        path: the checkpoint; its bases are looked for in `excp/` beside it.
        weights_only: refuse what is not plain values and tensors, as in `torch.load`.
        verify: compare each decoded tensor with its checksum.
        workers: threads.
        progress: called with the number of decoded saves and of all.
        store: where its bases are, if not in `excp/` beside it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ExCP checkpoint, is damaged, or a save that it needs is missing or damaged.
    """
    path = Path(path)
    identity = read_identity(path, weights_only=weights_only)
    store = store or store_of(path)
    try:
        bases = store.chain(identity)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    total = len(bases) + 1
    reference: Reference | None = None
    # an alias needs the moments of the save that it repeats
    whole: dict[str, Any] | None = None
    for number, base in enumerate(bases):
        encoded = _read(base, path, weights_only=weights_only)
        if identity.alias and number == len(bases) - 1:
            whole, reference = decode(encoded, reference, verify=verify, workers=workers)
        else:
            reference = advance(encoded, reference, verify=verify, workers=workers)
        if progress is not None:
            progress(number + 1, total)
    encoded = read_save(path, weights_only=weights_only)
    if encoded.alias:
        assert whole is not None
        assert reference is not None
        repeated = read_identity(bases[-1], weights_only=weights_only)
        result = Restored(decode_alias(encoded, whole, reference), reference, repeated, store)
    else:
        checkpoint, reference = decode(encoded, reference, verify=verify, workers=workers)
        result = Restored(checkpoint, reference, identity, store)
    if progress is not None:
        progress(total, total)
    return result


def _read(base: Path, path: Path, *, weights_only: bool) -> EncodedSave:
    try:
        return read_save(base, weights_only=weights_only)
    except ValueError as error:
        raise ValueError(f"{path} needs a save that is damaged: {error}") from error


def read_rest(path: str | os.PathLike[str], *, weights_only: bool = True) -> dict[str, Any]:
    """What a coded checkpoint holds besides its coded tensors, which are None, without decoding any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a save that it needs is not there.
    """
    path = Path(path)
    encoded = read_save(path, weights_only=weights_only)
    try:
        store_of(path).chain(read_identity(path, weights_only=weights_only))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return encoded.rest


def load_checkpoint(
    path: str | os.PathLike[str], *, weights_only: bool = True, workers: int = 2, progress: Progress | None = None
) -> dict[str, Any]:
    """The checkpoint of a file, coded or plain, on the CPU.

    Arguments and errors are those of `restore`.
    """
    if is_save(path):
        return restore(path, weights_only=weights_only, workers=workers, progress=progress).checkpoint
    return torch.load(path, map_location="cpu", weights_only=weights_only)


@contextlib.contextmanager
def expanded(path: str | os.PathLike[str], *, weights_only: bool = True) -> Iterator[Path]:
    """A plain file with a checkpoint's content, for as long as the context lasts.

    For what reads files without asking a `CheckpointIO`: `with expanded(path) as plain:
    Module.load_from_checkpoint(plain)`. A plain checkpoint is handed on as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded.
    """
    path = Path(path)
    if not is_save(path):
        yield path
        return
    checkpoint = load_checkpoint(path, weights_only=weights_only)
    with tempfile.TemporaryDirectory(prefix="tenfold-excp-") as folder:
        plain = Path(folder, path.name)
        torch.save(checkpoint, plain)
        del checkpoint
        yield plain
