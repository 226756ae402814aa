"""Where the saves of a folder live: each once under `excp/`, and under the names that people see as hard links.

A residual save needs those before it, whatever is deleted, overwritten or ranked out among the visible names. So a file
under `excp/` stays as long as a visible checkpoint, or the save that the running process goes on from, needs it.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..atomic_file import sync_folder
from .container import Identity, envelope, identity_of, is_save, read_identity, write_envelope
from .saves import EncodedSave

FOLDER = "excp"
_DIGITS = 16
# longer than writing a file takes anywhere
_ABANDONED_S = 24 * 3600
_NAME = re.compile(rf"(\d{{6}})-([0-9a-f]{{{_DIGITS}}})-([0-9a-f]{{{_DIGITS}}}|key)-([0-9a-f]{{{_DIGITS}}})\.excp")


@dataclass(frozen=True)
class Entry:
    """A file under `excp/`; its name tells all of this."""

    path: Path
    position: int
    save_id: str
    base_id: str | None
    chain_id: str


def _file_name(identity: Identity) -> str:
    base = "key" if identity.base_id is None else identity.base_id[:_DIGITS]
    return f"{identity.position:06d}-{identity.save_id[:_DIGITS]}-{base}-{identity.chain_id[:_DIGITS]}.excp"


class SaveStore:
    """The saves of one folder of checkpoints.

    Args:
        visible: where the visible checkpoints are.
        folder: where the saves are; `excp` beside the checkpoints by default.
        names: pattern of the visible checkpoints in their folder.
    """

    def __init__(self, visible: Path, *, folder: Path | None = None, names: str = "*") -> None:
        self.visible, self.names = visible, names
        self.folder = folder or visible / FOLDER
        self._locks: dict[str, FileLock] = {}
        self._swept = False

    def entries(self) -> dict[str, Entry]:
        """All saves, by the first digits of their ids."""
        found: dict[str, Entry] = {}
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if match := _NAME.fullmatch(path.name):
                    position, save_id, base, chain = match.groups()
                    found[save_id] = Entry(path, int(position), save_id, None if base == "key" else base, chain)
        return found

    def path_of(self, identity: Identity) -> Path:
        """The save's file under `excp/`."""
        return self.folder / _file_name(identity)

    def chain(self, identity: Identity) -> list[Path]:
        """Files to decode one after the other, key frame first, up to the given save's base.

        Raises:
            ValueError: one of them is not there.
        """
        entries = self.entries()
        needed: list[Path] = []
        wanted = identity.base_id
        while wanted is not None:
            entry = entries.get(wanted[:_DIGITS])
            if entry is None:
                raise ValueError(
                    f"the save {wanted[:_DIGITS]} is missing in {self.folder}, and the checkpoint after it cannot be "
                    f"decoded without it; restore the folder {FOLDER}/ that belongs to it, or use another checkpoint"
                )
            needed.append(entry.path)
            wanted = entry.base_id
        return needed[::-1]

    def holds(self, identity: Identity) -> bool:
        """Whether a save and all that it needs are there."""
        try:
            return self.path_of(identity).exists() and bool(self.chain(identity) or identity.base_id is None)
        except ValueError:
            return False

    def adopt(self, other: "SaveStore", identity: Identity) -> None:
        """Takes a save and all that it needs over from another folder, without copying where links can be had.

        Raises:
            ValueError: the other folder lacks some of it.
            OSError: neither a link nor a copy can be made.
        """
        if other.folder.resolve() == self.folder.resolve():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*other.chain(identity), other.path_of(identity)]:
            _link(path, self.folder / path.name)

    def write(self, encoded: EncodedSave, base: Identity | None) -> Identity:
        """Writes a save under `excp/`.

        Raises:
            OSError: the folder cannot be written or the disk is full; nothing else has changed then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        whole = envelope(encoded, base)
        identity = identity_of(whole)
        write_envelope(whole, self.path_of(identity))
        return identity

    def _sweep(self) -> None:
        """Removes what processes that were killed while they wrote have left, once a store."""
        if not self._swept:
            self._swept = True
            for path in self.folder.glob(".*.partial"):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()

    def show(self, identity: Identity, path: Path) -> str | None:
        """Gives a save a visible name, in place of what had it.

        Returns:
            the chain of the save that had the name, if it was one.
        """
        if path.is_dir() and not path.is_symlink():
            raise ValueError(f"{path} is a folder, a checkpoint cannot take its name; move it away")
        before = self.chain_of(path)
        _link(self.path_of(identity), path)
        return before

    def chain_of(self, path: Path) -> str | None:
        """The chain of a visible checkpoint; None if it is no save."""
        with contextlib.suppress(OSError, ValueError):
            if is_save(path):
                return read_identity(path).chain_id
        return None

    def own(self, chain_id: str) -> bool:
        """Takes a chain for this process.

        Returns:
            False if another process has it.
        """
        chain = chain_id[:_DIGITS]
        if chain in self._locks:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f".{chain}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._locks[chain] = lock
        return True

    def release(self) -> None:
        """Gives all chains back."""
        for lock in self._locks.values():
            lock.release()
        self._locks.clear()

    def collect(self, chains: Iterable[str], keep: Identity | None = None) -> list[Path]:
        """Removes the saves of some chains that nothing needs any more.

        Needed are the saves with a visible name in the folder, `keep`, and all that these are coded against. Chains of
        other running processes are left alone.

        Returns:
            what was removed.
        """
        wanted = {chain[:_DIGITS] for chain in chains if self.own(chain)}
        entries = self.entries()
        candidates = {key: entry for key, entry in entries.items() if entry.chain_id in wanted}
        if not candidates:
            return []
        shown = self._shown(entries)
        if shown is None:
            return []
        needed: set[str] = set()
        for root in [*shown, *([keep.save_id[:_DIGITS]] if keep else [])]:
            current: str | None = root
            while current is not None and current not in needed:
                needed.add(current)
                current = entries[current].base_id if current in entries else None
        removed = []
        # youngest first: a kill in between leaves no save without its base
        for key, entry in sorted(candidates.items(), key=lambda item: -item[1].position):
            if key not in needed:
                entry.path.unlink(missing_ok=True)
                removed.append(entry.path)
        for chain in wanted - {entry.chain_id for entry in entries.values() if entry.path not in removed}:
            (self.folder / f".{chain}.lock").unlink(missing_ok=True)
        return removed

    def _shown(self, entries: dict[str, Entry]) -> list[str] | None:
        """Saves with a name outside `excp/`; None if that cannot be told."""
        by_inode = {}
        found: list[str] = []
        key: str | None
        for key, entry in entries.items():
            with contextlib.suppress(FileNotFoundError):
                state = entry.path.stat()
                by_inode[state.st_dev, state.st_ino] = key
        for path in self._files():
            try:
                state = path.stat()
                key = by_inode.get((state.st_dev, state.st_ino))
                if key is None and is_save(path):
                    # a copy: no link tells what it is
                    key = read_identity(path).save_id[:_DIGITS]
                if key is not None:
                    found.append(key)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                rank_zero_warn(f"ExCP removes nothing from {self.folder}, as it cannot tell what is needed: {error}")
                return None
        return found

    def _files(self) -> Iterator[Path]:
        for path in self.visible.glob(self.names):
            if path.is_file() and not path.name.startswith("."):
                yield path


def store_of(path: Path) -> SaveStore:
    """The store that a checkpoint's bases are in: beside it, or beside what it links to."""
    for place in (path, path.resolve()):
        folder = place.parent.parent if place.parent.name == FOLDER else place.parent
        if (folder / FOLDER).is_dir():
            return SaveStore(folder)
    return SaveStore(path.parent)


def _link(source: Path, target: Path) -> None:
    """A hard link in place of whatever has the name; a copy where the file system has no links."""
    if target.exists() and not target.is_symlink() and os.path.samefile(source, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    try:
        try:
            os.link(source, partial)
        except FileNotFoundError:
            raise
        except OSError:
            shutil.copyfile(source, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(target.parent)
