"""Coded checkpoints for `torch.distributed.checkpoint`: each process codes its own shards, any number reads them back.

`dcp.save(state, storage_writer=ExCPStorageWriter(...))` makes a folder with one coded file per process and a list of
what is where, in JSON. The files are links into `excp/rankNNNNN/` beside the folder, a chain per process.
`dcp.load(state, storage_reader=ExCPStorageReader(folder))` reshards: a process decodes the files whose shards it needs.
"""

import io
import json
import os
import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ..atomic_file import replacing
from .chain import ChainWriter
from .exact import DTYPE_NAMES, DTYPES
from .options import ExCPOptions
from .restore import restore
from .staging import HostStage
from .store import FOLDER, SaveStore

LIST = "tenfold_excp.json"
VERSION = 1
_MOMENT = re.compile(r"(?P<owner>[^.]+)\.state\.(?P<name>.+)\.(?P<kind>exp_avg|exp_avg_sq|step)")
_GROUP = re.compile(r"(?P<owner>[^.]+)\.param_groups\.")


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint of `ExCPStorageWriter`."""
    return Path(path, LIST).is_file()


def _rank_store(checkpoint: Path, rank: int) -> SaveStore:
    name = f"rank{rank:05d}"
    parent = checkpoint.parent
    return SaveStore(parent, folder=parent / FOLDER / name, names=f"*/{name}.ckpt")


def _key(index: MetadataIndex) -> str:
    return index.fqn if index.offset is None else f"{index.fqn}@{','.join(map(str, index.offset))}"


def _finished(value: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class ExCPStorageWriter(StorageWriter):
    """Writes coded shards. One writer for all saves of a run: each save is coded against the one before.

    Weights and Adam's moments are recognised by their names: `PREFIX.NAME` in the model's state dict,
    `OPTIMISER.state.NAME.exp_avg` and `.exp_avg_sq` in the optimiser's. All else is exact. Writing is done when `save`
    returns; `dcp.async_save` stages and calls it in a thread.

    Args:
        path: the checkpoint's folder; `checkpoint_id` of each save replaces it.
        options: settings of the codec.
        key_frame_every: saves from one key frame to the next.
        workers: threads that code tensors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        options: ExCPOptions | None = None,
        *,
        key_frame_every: int = 20,
        workers: int = 2,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._stage = HostStage()
        self._chain = ChainWriter(options or ExCPOptions(), key_frame_every=key_frame_every, workers=workers)
        self._store: SaveStore | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Starts a save; see `StorageWriter`."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)
        if self.path is None:
            raise ValueError("ExCPStorageWriter has no path; give it one, or pass checkpoint_id to save")

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the folder; see `StorageWriter`."""
        assert self.path is not None
        self.rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self.path.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add; see `StorageWriter`."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Nothing to add; see `StorageWriter`."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Codes and writes this process's items; see `StorageWriter`.

        Raises:
            OSError: the folder cannot be written.
        """
        assert self.path is not None
        values = {_key(item.index): (item, planner.resolve_data(item)) for item in plan.items}
        staged = self._stage.stage(_as_checkpoint(values))
        path = self.path / f"rank{self.rank:05d}.ckpt"
        if self._store is None or self._store.visible != self.path.parent:
            self._store = _rank_store(self.path, self.rank)
        self._chain.save(staged, path, self._store, repeats=False)
        results = [
            WriteResult(index=item.index, size_in_bytes=_size(value), storage_data=path.name)
            for item, value in values.values()
        ]
        return cast("Future[list[WriteResult]]", _finished(results))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the list of what is where, which makes the checkpoint complete; see `StorageWriter`."""
        assert self.path is not None
        files = {_key(result.index): result.storage_data for part in results for result in part}
        text = json.dumps({"version": VERSION, "entries": _entries(metadata, files), "planner": _plain(metadata)})
        with replacing(self.path / LIST) as file:
            file.write(text.encode())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Local folders only."""
        return "://" not in str(checkpoint_id)

    def close(self) -> None:
        """Gives the chain back."""
        if self._store is not None:
            self._store.release()


def _size(value: Any) -> int:
    if isinstance(value, io.BytesIO):
        return value.getbuffer().nbytes
    return value.numel() * value.element_size()


def _as_checkpoint(values: dict[str, tuple[WriteItem, Any]]) -> dict[str, Any]:
    """The process's items in the layout that the codec knows: weights by name, moments by optimiser and weight."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, dict[str, Tensor]]] = {}
    steps: dict[tuple[str, str], Tensor] = {}
    others: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}
    index: dict[str, list[str | int]] = {}
    for key, (item, value) in values.items():
        fqn, _, offset = key.partition("@")
        match = _MOMENT.fullmatch(fqn)
        if item.type == WriteItemType.BYTE_IO:
            data = bytearray(value.getbuffer())
            raw[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
            index[key] = ["raw", key]
        elif match and match["kind"] != "step":
            moments.setdefault(match["owner"], {}).setdefault(f"{match['name']}@{offset}", {})[match["kind"]] = value
        elif match or _GROUP.match(fqn):
            if match:
                steps[match["owner"], match["name"]] = value
            others[key] = value
            index[key] = ["others", key]
        else:
            weights[key] = value
            index[key] = ["state_dict", key]
    prefixes = sorted({key.partition(".")[0] for key in weights})
    optimisers: list[dict[str, Any]] = []
    for owner, states in sorted(moments.items()):
        names, state = [], {}
        for number, (place, pair) in enumerate(sorted(states.items())):
            name, _, offset = place.partition("@")
            fits = [f"{prefix}.{place}" for prefix in prefixes]
            names.append(next((fit for fit in fits if fit in weights), place))
            state[number] = dict(pair)
            if (owner, name) in steps:
                state[number]["step"] = steps[owner, name]
            for kind in pair:
                index[f"{owner}.state.{name}.{kind}@{offset}"] = [
                    "optimizer_states",
                    len(optimisers),
                    "state",
                    number,
                    kind,
                ]
        group = {"params": list(state), "param_names": names} | _group_options(owner, values)
        optimisers.append({"state": state, "param_groups": [group]})
    return {
        "state_dict": weights,
        "optimizer_states": optimisers,
        "others": others,
        "raw": raw,
        "index": index,
    }


def _group_options(owner: str, values: dict[str, tuple[WriteItem, Any]]) -> dict[str, Any]:
    """Adam's rates, by which the codec measures updates; torch's defaults where this process has none to write."""
    found: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "lr": 1e-3}
    for key, (_, value) in values.items():
        match = re.fullmatch(rf"{re.escape(owner)}\.param_groups\..+\.(betas|eps|lr)", key)
        if match and isinstance(value, io.BytesIO):
            found[match[1]] = torch.load(io.BytesIO(value.getvalue()), weights_only=True)
    return found


def _entries(metadata: Metadata, files: dict[str, str]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for fqn, item in metadata.state_dict_metadata.items():
        if isinstance(item, TensorStorageMetadata):
            chunks = [
                {
                    "offsets": list(chunk.offsets),
                    "sizes": list(chunk.sizes),
                    "file": files[_key(MetadataIndex(fqn, chunk.offsets))],
                }
                for chunk in item.chunks
            ]
            entries[fqn] = {"dtype": DTYPE_NAMES[item.properties.dtype], "size": list(item.size), "chunks": chunks}
        else:
            entries[fqn] = {"file": files[fqn]}
    return entries


def _plain(metadata: Metadata) -> dict[str, list[str | int]]:
    return {fqn: list(path) for fqn, path in (metadata.planner_data or {}).items()}


class ExCPStorageReader(StorageReader):
    """Reads what `ExCPStorageWriter` wrote, on any number of processes.

    A process holds one decoded file at a time: as much memory as the process that wrote it had state.

    Args:
        path: the checkpoint's folder.
        workers: threads that decode tensors.

    Raises:
        FileNotFoundError: the folder is not a finished checkpoint.
        ValueError: its list is damaged or of a newer version; a file in it is damaged or lacks one that it needs.
    """

    def __init__(self, path: str | os.PathLike[str], *, workers: int = 2) -> None:
        self.path, self.workers = Path(path), workers
        self._files: dict[str, str] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Starts a load; see `StorageReader`."""
        if checkpoint_id is not None:
            self.path = Path(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is in the checkpoint; see `StorageReader`."""
        path = self.path / LIST
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} is not a finished sharded ExCP checkpoint: it has no {LIST}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']!r}, this tenfold reads {VERSION}; upgrade tenfold")
            entries = {fqn: self._entry(fqn, entry) for fqn, entry in content["entries"].items()}
            planner = {fqn: tuple(keys) for fqn, keys in content["planner"].items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; restore it from a copy") from error
        return Metadata(state_dict_metadata=entries, planner_data=planner or None)

    def _entry(self, fqn: str, entry: dict[str, Any]) -> TensorStorageMetadata | BytesStorageMetadata:
        if "chunks" not in entry:
            self._files[fqn] = entry["file"]
            return BytesStorageMetadata()
        chunks = []
        for chunk in entry["chunks"]:
            offsets = torch.Size(chunk["offsets"])
            self._files[_key(MetadataIndex(fqn, offsets))] = chunk["file"]
            chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
        properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
        return TensorStorageMetadata(properties, torch.Size(entry["size"]), chunks)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up; see `StorageReader`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add; see `StorageReader`."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add; see `StorageReader`."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Decodes the files that are needed, one after the other; see `StorageReader`."""
        wanted: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            wanted.setdefault(self._files[_key(item.storage_index)], []).append(item)
        for name, items in sorted(wanted.items()):
            path = self.path / name
            store = _rank_store(self.path, int(path.stem.removeprefix("rank")))
            checkpoint = restore(path, store=store, workers=self.workers).checkpoint
            for item in items:
                value: Any = checkpoint
                for step in checkpoint["index"][_key(item.storage_index)]:
                    value = value[step]
                if item.type == LoadItemType.BYTE_IO:
                    planner.load_bytes(item, io.BytesIO(value.numpy().tobytes()))
                    continue
                for dimension, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    value = value.narrow(dimension, offset, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(value)
                planner.commit_tensor(item, target)
        return cast("Future[None]", _finished(None))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Finished checkpoints of the writer only."""
        return is_sharded(checkpoint_id)
