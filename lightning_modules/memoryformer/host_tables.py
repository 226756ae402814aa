"""Stored tables read or mapped straight from a model folder's safetensors files, past the loader of other weights."""

import json
import math
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.utils import cached_file

# what the format allows for a header; more is a damaged file
_MAX_HEADER_BYTES = 100_000_000


class RecordFiles:
    """Where tensors lie in the safetensors files of a folder.

    Args:
        folder: with one or several `*.safetensors`.

    Raises:
        ValueError: no such file, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with path.open("rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    header = json.loads(file.read(length)) if length <= _MAX_HEADER_BYTES else None
            except (json.JSONDecodeError, UnicodeDecodeError):
                header = None
            if not isinstance(header, dict):
                raise ValueError(f"{path} has no safetensors header; it is damaged, export the model again")
            self._places |= {name: (path, 8 + length, entry) for name, entry in header.items() if "dtype" in entry}
        if not self._places:
            raise ValueError(f"{folder} has no *.safetensors with tables; make it with `tenfold export --form memory`")

    @classmethod
    def find(cls, name: str, **options: Any) -> Self:
        """Those of a folder or a hub id.

        Raises:
            ValueError: see the class.
        """
        if os.path.isdir(name):
            return cls(Path(name, options.get("subfolder", "")))
        found = cached_file(name, "config.json", **options)
        assert found is not None
        return cls(Path(found).parent)

    def records(self, name: str, shape: tuple[int, int], storage: str) -> Tensor:
        """A table of bytes.

        Args:
            name: of the tensor.
            shape: rows and bytes per row that it must have.
            storage: `memory` reads it now; `mmap` leaves it in the file, pages are read when rows of them are.

        Raises:
            ValueError: it is missing, of another type or size, or the file is cut short.
        """
        if name not in self._places:
            raise ValueError(f"{self.folder}: the table {name} is missing; export the model again")
        path, start, entry = self._places[name]
        if entry["dtype"] != "U8" or tuple(entry["shape"]) != tuple(shape):
            raise ValueError(
                f"{path}: {name} is {entry['dtype']} {entry['shape']}, its configuration needs U8 {list(shape)}; take "
                f"configuration and tables from the same `tenfold export`"
            )
        begin, end = entry["data_offsets"]
        size = path.stat().st_size
        if end - begin != math.prod(shape) or start + end > size:
            raise ValueError(f"{path} has {size:,} bytes, {name} ends at {start + end:,}: it was cut short; restore it")
        # private to this process: what is written never reaches the file
        mapped = np.memmap(path, np.uint8, mode="c", offset=start + begin, shape=shape)
        return torch.from_numpy(mapped if storage == "mmap" else np.array(mapped))
