"""ExCP as a Lightning plugin: with `trainer.plugins: ExCPCheckpointIO` a checkpoint is coded against the last one."""

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ..checkpoint_io import AtomicCheckpointIO
from .chain import ChainWriter
from .container import is_save
from .entropy import require_backend
from .options import ExCPOptions
from .report import SaveReport
from .restore import restore
from .staging import HostStage, Staged
from .store import SaveStore


@dataclass(frozen=True, kw_only=True)
class SaveEvent:
    """What became of one save.

    Attributes:
        path: the checkpoint.
        step: its `global_step`, if it has one.
        report: sizes and errors.
        file_bytes: of the file.
        key_frame: whether it can be decoded alone.
        alias: whether it repeats the save before it.
        blocked_s: how long training waited.
        encode_s: how long coding and writing took.
    """

    path: Path
    step: int | None
    report: SaveReport
    file_bytes: int
    key_frame: bool
    alias: bool
    blocked_s: float
    encode_s: float

    def metrics(self) -> dict[str, float]:
        """For a logger; an alias has sizes and times only."""
        times = {
            "ckpt/blocked_s": self.blocked_s,
            "ckpt/encode_s": self.encode_s,
            "ckpt/file_bytes": float(self.file_bytes),
            "ckpt/key_frame": float(self.key_frame),
        }
        return times if self.alias else times | self.report.metrics()


class ExCPCheckpointIO(CheckpointIO):
    """Checkpoints tens of times smaller (ExCP, arXiv 2406.11257), written beside training.

    A checkpoint is coded against the one before; every `key_frame_every`-th stands alone. Under each visible name is a
    file that Lightning's tools can open; what it needs of earlier saves is kept in `excp/` beside it, for as long as it
    is needed, whatever is deleted. Weights and Adam's moments are lossy within `options.error_target`, everything else
    is exact. Files of other formats are loaded as ever, so that a run can be continued with or without the plugin.

    Training waits for a copy of the state in host memory only, unless the save before is still being coded. Errors
    surface at the next save and at the end. Host memory: the state once, its weights twice more and one byte per weight
    (1.75 times an fp32 state with Adam's moments), plus what coding one tensor per worker takes.

    Strategies: single device and `ddp`, where rank 0 writes. `fsdp` and `model_parallel` read checkpoint files past
    this plugin: use `ExCPFSDPStrategy` or `ExCPModelParallelStrategy`, or continue from an expanded file
    (`tenfold checkpoint expand`). `deepspeed` writes its own format, this plugin never hears of it.

    Args:
        options: settings of the codec.
        key_frame_every: saves from one key frame to the next; at most so many files are read to restore one. 1 codes
            each alone.
        asynchronous: code and write in a worker thread.
        workers: threads that code tensors.
        exact_steps: keep the last save's weights, to measure steps exactly; without them saves are larger.

    Raises:
        ValueError: an option is out of range; a package that the back end needs is not installed.
    """

    def __init__(
        self,
        options: ExCPOptions = ExCPOptions(),  # noqa: B008 (frozen; None would hide its fields on the command line)
        *,
        key_frame_every: int = 20,
        asynchronous: bool = True,
        workers: int = 2,
        exact_steps: bool = True,
    ) -> None:
        if key_frame_every < 1:
            raise ValueError(f"ExCP: key_frame_every={key_frame_every} is out of range; use 1 or more")
        if workers < 1:
            raise ValueError(f"ExCP: workers={workers} is out of range; use 1 or more")
        require_backend(options.backend)
        self.options, self.key_frame_every = options, key_frame_every
        self.asynchronous, self.workers = asynchronous, workers
        self._plain = AtomicCheckpointIO()
        self._stage = HostStage(keep_weights=exact_steps)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._error: BaseException | None = None
        self._chain = ChainWriter(options, key_frame_every=key_frame_every, workers=workers, exact_steps=exact_steps)
        self._stores: dict[Path, SaveStore] = {}
        self._events: deque[SaveEvent] = deque(maxlen=1000)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies the state, then codes and writes it.

        Raises:
            ValueError: options for a storage, which has none here.
            OSError: an earlier save could not be written; the checkpoints before it are whole.
        """
        if storage_options is not None:
            raise ValueError("ExCP writes to local folders and takes no storage_options; leave them out")
        self._raise_error()
        if "://" in str(path):
            rank_zero_warn(f"ExCP keeps its chains in local folders; {path} is written as a plain checkpoint")
            self._plain.save_checkpoint(checkpoint, path)
            return
        start = time.perf_counter()
        if repeats := self._stage.repeats(checkpoint):
            staged = self._stage.again(checkpoint)
        else:
            # the buffers are still being read
            self.wait()
            staged = self._stage.stage(checkpoint)
        blocked = time.perf_counter() - start
        self._submit(lambda: self._save(staged, Path(path), repeats=repeats, blocked_s=blocked))

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a checkpoint, coded or plain; the chain of a coded one is continued by the next save.

        Args:
            path: the file.
            map_location: a device for all tensors.
            weights_only: False for files from a trusted source that hold more than plain values and tensors.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file, or one that it needs, is damaged or missing.
        """
        self.wait()
        if "://" in str(path) or not is_save(path):
            return self._plain.load_checkpoint(path, map_location, weights_only)
        restored = restore(path, weights_only=weights_only is not False, workers=self.workers)
        self._chain.go_on_from(restored)
        if map_location is None or str(map_location) == "cpu":
            return restored.checkpoint
        if not isinstance(map_location, (str, torch.device)):
            raise ValueError(f"ExCP: map_location={map_location!r} is not a device; name one, such as 'cuda:0'")
        from lightning_utilities.core.apply_func import apply_to_collection

        return apply_to_collection(restored.checkpoint, Tensor, lambda tensor: tensor.to(map_location))

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Takes a checkpoint's name away, once pending saves are done; what others need of it stays."""
        self._submit(lambda: self._remove(path))

    @override
    def teardown(self) -> None:
        """Finishes pending saves.

        Raises:
            OSError: one of them could not be written.
        """
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        for store in self._stores.values():
            store.release()
        self._stores.clear()
        self._raise_error()

    def wait(self) -> None:
        """Returns when all saves are on the disk, or have failed."""
        while self._pending:
            self._pending.pop().result()

    def take_events(self) -> list[SaveEvent]:
        """Saves that were finished since the last call."""
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def _submit(self, job: Callable[[], None]) -> None:
        if not self.asynchronous:
            job()
            return
        if self._pool is None:
            # one thread: a removal comes after the saves before it
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="excp")
        self._pending = [future for future in self._pending if not future.done()]
        self._pending.append(self._pool.submit(self._guarded, job))

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            # the first one is the cause of those after it
            self._error = self._error or error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _save(self, staged: Staged, path: Path, *, repeats: bool, blocked_s: float) -> None:
        start = time.perf_counter()
        store = self._store(path)
        identity, report = self._chain.save(staged, path, store, repeats=repeats)
        event = SaveEvent(
            path=path,
            step=staged.step,
            report=report,
            file_bytes=store.path_of(identity).stat().st_size,
            key_frame=identity.base_id is None,
            alias=identity.alias,
            blocked_s=blocked_s,
            encode_s=time.perf_counter() - start,
        )
        self._events.append(event)

    def _remove(self, path: str | Path) -> None:
        local = Path(path)
        if "://" in str(path) or not is_save(local):
            if "://" in str(path) or local.exists() or local.is_symlink():
                self._plain.remove_checkpoint(path)
            return
        store = self._store(local)
        chain = store.chain_of(local)
        local.unlink()
        if chain is not None:
            store.collect([chain], keep=self._chain.last)

    def _store(self, path: Path) -> SaveStore:
        folder = Path(os.path.abspath(path)).parent
        if folder not in self._stores:
            self._stores[folder] = SaveStore(folder)
        return self._stores[folder]
