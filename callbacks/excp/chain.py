"""One save after the other: which is coded against which, when a new chain begins, and what may be removed."""

from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from .alias import encode_alias
from .codec import encode
from .container import Identity
from .options import ExCPOptions
from .report import SaveReport
from .restore import Restored
from .saves import EncodedSave, Reference
from .staging import Staged
from .store import SaveStore


@dataclass
class _Tail:
    """The end of the running chain.

    Attributes:
        store: where the chain is.
        identity: its last save.
        reference: what that led to.
        encoded: it, without payload; None where it was read from a file.
        weights: as they were before they were coded, for measuring steps.
        state: what was staged for it, to be recognised by identity.
    """

    store: SaveStore
    identity: Identity
    reference: Reference
    encoded: EncodedSave | None = None
    weights: dict[str, Tensor] | None = None
    state: object = None


class ChainWriter:
    """Codes and writes saves of one run.

    Args:
        options: settings of the codec.
        key_frame_every: saves from one key frame to the next.
        workers: threads that code tensors.
        exact_steps: measure steps against the weights of the last save.
    """

    def __init__(
        self, options: ExCPOptions, *, key_frame_every: int = 20, workers: int = 2, exact_steps: bool = True
    ) -> None:
        self.options, self.key_frame_every = options, key_frame_every
        self.workers, self.exact_steps = workers, exact_steps
        self._tail: _Tail | None = None

    @property
    def last(self) -> Identity | None:
        """The save that the next one is coded against."""
        return self._tail.identity if self._tail else None

    def go_on_from(self, restored: Restored) -> None:
        """Takes over the chain of a checkpoint that training goes on from."""
        # training goes on from the stored weights: they are the last step's, not an approximation of it
        weights = restored.reference.weights
        self._tail = _Tail(restored.store, restored.identity, restored.reference, weights=weights)

    def save(self, staged: Staged, path: Path, store: SaveStore, *, repeats: bool) -> tuple[Identity, SaveReport]:
        """Codes a state and writes it under a visible name.

        Args:
            staged: the state.
            path: the name.
            store: of the name's folder.
            repeats: whether all tensors of the state are those of the one before.

        Raises:
            OSError: the folder cannot be written; saves before this one are whole.
        """
        try:
            return self._save(staged, path, store, repeats=repeats)
        except Exception as error:
            if self._tail is not None:
                # the stage uses the buffers again
                self._tail.weights = None
            mend = "free space or name another folder; " if isinstance(error, OSError) else ""
            message = f"ExCP: {path} was not saved: {error}; {mend}checkpoints saved before it are whole"
            kind = (
                OSError if isinstance(error, OSError) else ValueError if isinstance(error, ValueError) else RuntimeError
            )
            raise kind(message) from error

    def _save(self, staged: Staged, path: Path, store: SaveStore, *, repeats: bool) -> tuple[Identity, SaveReport]:
        tail = self._continued(store)
        # the save of the same state may have failed
        if repeats and tail is not None and tail.encoded is not None and tail.state is staged.tensors:
            encoded = encode_alias(staged.checkpoint, tail.encoded)
            identity = store.write(encoded, tail.identity)
        else:
            encoded = self._encode(staged, tail)
            identity = store.write(encoded, None if encoded.key_frame or tail is None else tail.identity)
            assert encoded.reference is not None
            weights = staged.weights() if self.exact_steps else None
            shell = replace(encoded, payload=b"", rest=None, reference=None)
            self._tail = _Tail(store, identity, encoded.reference, shell, weights, staged.tensors)
            store.own(identity.chain_id)
        before = store.show(identity, path)
        touched = {identity.chain_id, *([before] if before else []), *([tail.identity.chain_id] if tail else [])}
        store.collect(touched, keep=self.last)
        return identity, encoded.report

    def _continued(self, store: SaveStore) -> _Tail | None:
        """The chain to go on with in a folder; None where a new one must begin."""
        tail = self._tail
        if tail is None or not tail.store.holds(tail.identity):
            if tail is not None:
                rank_zero_warn(f"ExCP: saves are gone from {tail.store.folder}; a new chain begins with a key frame")
            return None
        if tail.store is not store:
            store.adopt(tail.store, tail.identity)
            tail.store = store
        if not store.own(tail.identity.chain_id):
            rank_zero_info(f"ExCP: another process goes on with the chain in {store.folder}; this one begins its own")
            return None
        return tail

    def _encode(self, staged: Staged, tail: _Tail | None) -> EncodedSave:
        def code(reference: Reference | None, weights: dict[str, Tensor] | None) -> EncodedSave:
            return encode(staged.checkpoint, reference, self.options, previous_weights=weights, workers=self.workers)

        if tail is None or tail.identity.position + 1 >= self.key_frame_every:
            return code(None, None)
        try:
            encoded = code(tail.reference, tail.weights)
        except ValueError as error:
            rank_zero_warn(f"a new chain begins with a key frame: {error}")
            return code(None, None)
        return code(None, None) if encoded.report.key_frame_advised else encoded
