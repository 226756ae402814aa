"""The lookup table's file: `table[i, l, j, :]` is what expert j of layer l gives for token id i.

The record of one id is contiguous, so one token needs one read, known before the first layer runs. Records of plain
values start on a page of the file; quantised ones follow each other without gaps.
"""

import os
import zlib
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ...kernels.quantised_rows import RowLayout
from ...kernels.row_storage import RowRegion, RowStream, Storage, open_rows
from ...kernels.row_storage.device_stream import DeviceStaging, DeviceStream
from ...kernels.tensor_file import TensorFile

TABLE_FILE = "lookup_table.tenfold"
MAGIC = b"TF-MoLE\0"
VERSION = 2
# memory that the rows of one forward pass may take at a time; what does not fit is read while layers run
STAGING_BYTES = 2**28


class LookupTable:
    """Rows by token id, with a count of the bytes that were read.

    Args:
        file: an opened table file.
        storage: where rows are read from. `memory` reads the whole table and checks it, and puts it beside the model
            when that is on a GPU; `pinned` holds it in page-locked memory that a GPU reads; `mmap` leaves it on disk
            and reads the pages of the rows that are asked for; `direct` reads rows past the file cache. A row that was
            not checked before is checked when a layer of it is first read.
        pinned_limit_bytes: most memory that `pinned` may lock; half of the machine's by default.

    Raises:
        ValueError: an unknown storage, memory that cannot be locked, or a table whose header does not fit its rows.
    """

    def __init__(self, file: TensorFile, storage: Storage, *, pinned_limit_bytes: int | None = None) -> None:
        self.path, self.metadata, self.storage = file.path, file.metadata, storage
        self._file = file
        self.layout = self._layout()
        part_bytes = file.dtype("rows").itemsize
        num_rows, width = file.shape("rows")
        region = RowRegion(file.path, file.offset("rows"), num_rows, width * part_bytes, self.layout.record_bytes)
        self.source = open_rows(
            region, storage, load=lambda: file.read("rows").view(torch.uint8), pinned_limit_bytes=pinned_limit_bytes
        )
        self._checksums = file.read("layer_crc32").numpy()
        # what was read whole was checked as a whole
        self._unchecked = np.full((num_rows, self.layout.num_layers), storage in ("mmap", "direct"))
        self._on_device: Tensor | None = None
        self._staging: DeviceStaging | None = None

    def _layout(self) -> RowLayout:
        """The layout that the metadata states, checked against the part that holds the rows."""
        stored = str(self._file.dtype("rows")).removeprefix("torch.")
        stated = self.metadata["dtype"] if self.metadata.get("quantisation", "none") == "none" else "uint8"
        layout = RowLayout.from_metadata(tuple(self.metadata["shape"][1:]), stated, self.metadata)
        num_rows, width = self._file.shape("rows")
        found = width * self._file.dtype("rows").itemsize
        fits = found >= layout.record_bytes if layout.quantisation == "none" else found == layout.record_bytes
        if stored != stated or not fits or num_rows != self.metadata["shape"][0]:
            raise ValueError(
                f"{self.path}: the header says quantisation {layout.quantisation!r} with {layout.record_bytes} bytes "
                f"of {stated} per row, the file has {found} of {stored}; export the table again"
            )
        return layout

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], storage: Storage = "mmap", *, pinned_limit_bytes: int | None = None
    ) -> Self:
        """Open a table file.

        Raises:
            ValueError: another kind of file, truncated or altered; see also the class.
            FileNotFoundError: there is none.
        """
        return cls(TensorFile(path, magic=MAGIC, version=VERSION), storage, pinned_limit_bytes=pinned_limit_bytes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Vocabulary rows, layers, experts, width."""
        return tuple(self.metadata["shape"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row: L * N * d * bytes per value, and the scales where there are some."""
        return self.layout.record_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the storage so far, counted where they are read."""
        return self.source.bytes_read

    @property
    def values(self) -> Tensor:
        """The whole table (V, L, N, d), without a copy; for plain values in memory or mapped.

        Raises:
            ValueError: the table is quantised, or not addressable as a whole.
        """
        records = self.source.resident
        if records is None or self.layout.quantisation != "none":
            raise ValueError(f"{self.path} cannot be viewed as a tensor: quantised, or read row by row; use rows(ids)")
        values = records[:, : self.row_bytes].view(getattr(torch, self.layout.dtype))
        return values.unflatten(1, self.shape[1:])

    def begin_pass(self, ids: Tensor, device: torch.device) -> RowStream | DeviceStream:
        """Ask for all rows of a forward pass; the layers are then taken from the result in order.

        Args:
            ids: (U,) distinct token ids.
            device: where the layers' bytes are wanted.

        Raises:
            ValueError: an id beyond the table.
        """
        rows = ids.cpu()
        if len(rows) and int(rows.max()) >= self.shape[0]:
            raise ValueError(
                f"token id {int(rows.max())} has no row in {self.path.name}, which holds {self.shape[0]}; export the "
                f"table again after changing the vocabulary"
            )
        layout = self.layout
        stream = RowStream(
            self.source,
            rows,
            num_parts=layout.num_layers,
            part_bytes=layout.layer_bytes,
            limit_bytes=STAGING_BYTES,
            check=lambda first, part: self._check(rows.numpy(), first, part),
        )
        if device.type != "cuda":
            return stream
        if self._staging is None:
            self._staging = DeviceStaging(device)
        sizes = {"num_parts": layout.num_layers, "num_rows": len(rows), "part_bytes": layout.layer_bytes}
        return self._staging.begin(stream, **sizes)

    def on_device(self, device: torch.device) -> Tensor | None:
        """All records (V, row) where a GPU can address them itself, else None.

        Raises:
            ValueError: the table does not fit into the GPU's memory.
        """
        if device.type != "cuda" or self.storage in ("mmap", "direct"):
            return None
        records = self.source.resident
        assert records is not None
        if self.storage == "pinned":
            return records
        if self._on_device is None or self._on_device.device != device:
            free = torch.cuda.mem_get_info(device)[0]
            if records.nbytes > free:
                raise ValueError(
                    f"{self.path} needs {records.nbytes} bytes, {free} are free on {device}; use storage pinned, mmap "
                    f"or direct"
                )
            self._on_device = records.to(device)
        return self._on_device

    def rows(self, ids: Tensor, layer: int | None = None) -> Tensor:
        """Decoded rows of distinct ids: (U,) to (U, L, N, d), or to (U, N, d) for one layer. Counts the bytes.

        Raises:
            ValueError: a row is not the one that was written.
        """
        stream = self.begin_pass(ids, torch.device("cpu"))
        if layer is not None:
            return self.layout.decode(stream.part(layer)).clone()
        return torch.stack([self.layout.decode(stream.part(index)) for index in range(self.shape[1])], dim=1)

    def _check(self, rows: np.ndarray, first: int, part: np.ndarray) -> None:
        size = self.layout.layer_bytes
        count = part.shape[1] // size
        for place, index in np.argwhere(self._unchecked[rows, first : first + count]).tolist():
            row, layer = rows[place], first + index
            if zlib.crc32(part[place, index * size : (index + 1) * size]) != self._checksums[row, layer]:
                raise ValueError(
                    f"{self.path}: the row of token id {row} fails its checksum in layer {layer}: altered; export the "
                    f"table again"
                )
            self._unchecked[row, layer] = False

    def verify(self) -> None:
        """Read the whole file once and compare its checksums.

        Raises:
            ValueError: a part of it differs.
        """
        self._file.verify()

    def close(self) -> None:
        """Stop reading threads and close the file."""
        self.source.close()


def row_checksums(records: Tensor, layout: RowLayout) -> np.ndarray:
    """CRC-32 of every layer of records (U, at least row_bytes) bytes: (U, L) uint32."""
    layers = records[:, : layout.record_bytes].unflatten(1, (layout.num_layers, layout.layer_bytes)).numpy()
    return np.array([[zlib.crc32(part) for part in row] for row in layers], dtype=np.uint32)


def table_metadata(num_rows: int, layout: RowLayout, dtype: str) -> dict[str, Any]:
    """What the header says about shape and layout."""
    return {
        "shape": [num_rows, layout.num_layers, layout.num_experts, layout.hidden_size],
        "layout": "[vocab, layer, expert, hidden]",
        "dtype": dtype,
        **layout.metadata(),
    }
