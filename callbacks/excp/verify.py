"""Whether the checkpoints of a folder can be restored, each save decoded once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .alias import coded_paths
from .container import is_save, read_identity, read_save
from .decoding import decode
from .restore import restore
from .saves import EncodedSave, Reference
from .store import Entry, SaveStore


@dataclass(frozen=True)
class Finding:
    """A checkpoint or a save, and what is wrong with it.

    Attributes:
        path: the file.
        problem: one line; None if it restores.
        names: visible checkpoints that are this save.
    """

    path: Path
    problem: str | None
    names: tuple[str, ...] = ()


def verify_folder(
    folder: Path, *, workers: int = 2, weights_only: bool = True, progress: Callable[[int], None] | None = None
) -> list[Finding]:
    """Decodes every save of a folder, checksums of all tensors included.

    Args:
        folder: where the visible checkpoints are.
        workers: threads.
        weights_only: refuse what is not plain values and tensors, as in `torch.load`.
        progress: called with 1 for each file.

    Returns:
        a finding for each file under `excp/`, and for each visible checkpoint that is not a link to one.
    """
    store = SaveStore(folder)
    entries = sorted(store.entries().values(), key=lambda entry: (entry.chain_id, entry.position))
    visible = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    names: dict[tuple[int, int], list[str]] = {}
    for path in visible:
        state = path.stat()
        names.setdefault((state.st_dev, state.st_ino), []).append(path.name)
    walk = _Walk(workers, weights_only)
    findings = []
    linked = set()
    for entry in entries:
        state = entry.path.stat()
        shown = tuple(names.get((state.st_dev, state.st_ino), ()))
        linked |= set(shown)
        findings.append(Finding(entry.path, walk.problem(entry), shown))
        if progress is not None:
            progress(1)
    for path in visible:
        if path.name in linked or not is_save(path):
            continue
        problem = None
        try:
            restore(path, workers=workers, weights_only=weights_only, store=store)
        except (ValueError, OSError) as error:
            problem = str(error)
        findings.append(Finding(path, problem, (path.name,)))
        if progress is not None:
            progress(1)
    return findings


class _Walk:
    """Goes through saves by chain and position, and keeps what the next one needs."""

    def __init__(self, workers: int, weights_only: bool) -> None:
        self.workers, self.weights_only = workers, weights_only
        self._held: dict[str, tuple[EncodedSave, Reference]] = {}
        self._chain = ""
        self._bad: set[str] = set()

    def problem(self, entry: Entry) -> str | None:
        if entry.chain_id != self._chain:
            self._held.clear()
            self._chain = entry.chain_id
        try:
            self._decode(entry)
        except (ValueError, OSError) as error:
            self._bad.add(entry.save_id)
            return str(error)
        return None

    def _decode(self, entry: Entry) -> None:
        if entry.base_id is not None and entry.base_id in self._bad:
            raise ValueError(f"{entry.path} needs the save {entry.base_id}, which is damaged")
        if entry.base_id is not None and entry.base_id not in self._held:
            raise ValueError(f"{entry.path} needs the save {entry.base_id}, which is missing")
        encoded = read_save(entry.path, weights_only=self.weights_only)
        if not read_identity(entry.path, weights_only=self.weights_only).save_id.startswith(entry.save_id):
            raise ValueError(f"{entry.path} holds another save than its name tells")
        base = None if entry.base_id is None else self._held[entry.base_id]
        if encoded.alias:
            assert base is not None
            if [tuple(path) for path in encoded.header["alias"]] != coded_paths(base[0]):
                raise ValueError(f"{entry.path} repeats another save than the one it names")
            return
        _, reference = decode(encoded, base[1] if base else None, workers=self.workers)
        # forks of a chain are rare: two steps back are as much as is kept
        shell = EncodedSave(encoded.header, b"", None)
        self._held[entry.save_id] = (shell, reference)
        while len(self._held) > 2:
            self._held.pop(next(iter(self._held)))
