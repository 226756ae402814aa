"""Strategies that load coded checkpoints: Lightning's own read the file past the checkpoint plugin.

`ExCPFSDPStrategy` (`excp_fsdp`) and `ExCPModelParallelStrategy` (`excp_model_parallel`) do what `FSDPStrategy` and
`ModelParallelStrategy` do, with coded files for full checkpoints and, for model parallelism (FSDP2, tensor
parallelism), coded shards for distributed ones.
"""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from ..atomic_file import replacing
from .checkpoint_io import ExCPCheckpointIO
from .container import is_save
from .sharded import ExCPStorageReader, ExCPStorageWriter, is_sharded

if TYPE_CHECKING:
    _Base = ParallelStrategy
else:
    _Base = object

# what Lightning calls the file with everything that is not sharded
_META = "meta.pt"


class _LoadsCodedFiles(_Base):
    """Hands coded files on in plain form, decoded once per machine."""

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not is_save(path):
            return super().load_checkpoint(path, weights_only)
        with self._plain(path, weights_only) as plain:
            return super().load_checkpoint(plain, weights_only)

    @contextlib.contextmanager
    def _plain(self, path: Path, weights_only: bool | None) -> Iterator[Path]:
        # the same name on every machine, known to nobody else
        plain = Path(tempfile.gettempdir(), f"tenfold-excp-{self.broadcast(uuid.uuid4().hex)}.ckpt")
        io = self.checkpoint_io
        error: Exception | None = None
        if self.local_rank == 0:
            try:
                # the next save goes on with this chain
                io = io if isinstance(io, ExCPCheckpointIO) else ExCPCheckpointIO()
                torch.save(io.load_checkpoint(path, weights_only=weights_only), plain)
            except (ValueError, OSError) as problem:
                error = problem
        try:
            # the others must not wait for a file that never comes
            if not self.reduce_boolean_decision(error is None, all=True):
                raise error or ValueError(f"{path} could not be decoded; the first process of the machine tells why")
            yield plain
            self.barrier("tenfold-excp-loaded")
        finally:
            if self.local_rank == 0:
                plain.unlink(missing_ok=True)

    @override
    def teardown(self) -> None:
        # Lightning's own do not tell the plugin, which may have saves to finish
        self.checkpoint_io.teardown()
        super().teardown()


class ExCPFSDPStrategy(_LoadsCodedFiles, FSDPStrategy):
    """`FSDPStrategy` with coded full checkpoints (`state_dict_type="full"`, the default).

    Raises:
        ValueError: `state_dict_type="sharded"`, which `ExCPModelParallelStrategy` has.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._state_dict_type != "full":
            raise ValueError(
                "ExCPFSDPStrategy codes full checkpoints; leave state_dict_type at 'full', or use "
                "ExCPModelParallelStrategy for coded shards"
            )


class ExCPModelParallelStrategy(_LoadsCodedFiles, ModelParallelStrategy):
    """`ModelParallelStrategy` whose distributed checkpoints are coded shards, and whose full ones are coded files.

    With `save_distributed_checkpoint=True`, the default, each process codes its own shards with the settings of
    `ExCPCheckpointIO` in `Trainer(plugins=...)`; any number of processes can load them. A run that is continued begins
    new chains. Training waits until shards are written.
    """

    _writer: ExCPStorageWriter | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        io = self.checkpoint_io
        if not self._save_distributed_checkpoint or not isinstance(io, ExCPCheckpointIO):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        from torch.distributed.checkpoint import save

        path = Path(self.broadcast(filepath))
        if self.is_global_zero and path.is_file():
            path.unlink()
        self.barrier("tenfold-excp-folder")
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{n}": part for n, part in enumerate(checkpoint.pop("optimizer_states", []))}
        if self._writer is None:
            self._writer = ExCPStorageWriter(path, io.options, key_frame_every=io.key_frame_every, workers=io.workers)
        save(state, checkpoint_id=path, storage_writer=self._writer)
        if self.global_rank == 0:
            with replacing(path / _META) as file:
                torch.save(checkpoint, file)
        self.barrier("tenfold-excp-saved")

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not is_sharded(path):
            return super().load_checkpoint(path, weights_only)
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        assert self.model is not None
        assert self.lightning_module is not None
        reader = ExCPStorageReader(path)
        state: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        optimisers: dict[str, Optimizer] = {}
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            optimisers = {f"optimizer_{number}": optimiser for number, optimiser in enumerate(self.optimizers)}
        state |= {key: get_optimizer_state_dict(self.model, optimiser) for key, optimiser in optimisers.items()}
        # at once: a file is decoded as often as it is asked for
        load(state, checkpoint_id=path, storage_reader=reader)
        self.model.load_state_dict(state["state_dict"], strict=self.lightning_module.strict_loading)
        for key, optimiser in optimisers.items():
            options = StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(self.model, optimiser, optim_state_dict=state[key], options=options)
        return torch.load(path / _META, map_location="cpu", weights_only=weights_only)

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        path = Path(filepath)
        if not is_sharded(path):
            super().remove_checkpoint(filepath)
        elif self.is_global_zero:
            # what others need of it is in `excp/`, and goes when the next save finds it unneeded
            shutil.rmtree(path)

    @override
    def teardown(self) -> None:
        if self._writer is not None:
            self._writer.close()
        super().teardown()


# names for `Trainer(strategy=...)` and the command line, where a class would be taken for an unknown name
for _name, _strategy in (("excp_fsdp", ExCPFSDPStrategy), ("excp_model_parallel", ExCPModelParallelStrategy)):
    if _name not in StrategyRegistry:
        StrategyRegistry.register(_name, _strategy, description=str(_strategy.__doc__).splitlines()[0])
