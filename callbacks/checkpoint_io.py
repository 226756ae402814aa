"""Checkpoint files that are either the old one or the new one, whatever happens while they are written."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from .atomic_file import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a local checkpoint beside its final name, flushes it to the disk, then renames it.

    Lightning's own writer builds the file in memory, then in the system's temporary folder; where that is another
    file system the last move is a copy, and a kill in the middle of it leaves half a file under the final name.
    Remote paths take Lightning's way.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)
