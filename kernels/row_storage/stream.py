"""The records of one forward pass, asked for before the first layer runs and handed out layer by layer.

In place where the records are in memory or mapped. Otherwise through staging buffers: as many layers at a time as a
limit on their size allows, the next ones on their way while the ones before are used.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .direct import PAGE_BYTES, aligned_buffer
from .storage import RowStorage
from .threaded import PendingRows

# a read of less than this takes the device about as long as one of this size
MIN_CUT_BYTES = 16 * PAGE_BYTES
Check = Callable[[int, np.ndarray], None]


class _Chunk(NamedTuple):
    """Consecutive layers in one staging buffer (U, bytes of those layers)."""

    first: int
    buffer: Tensor
    pending: PendingRows


class RowStream:
    """Layer by layer, the bytes of some records.

    Args:
        storage: where they are.
        rows: (U,) distinct record numbers, int64, on the CPU.
        num_parts: layers in a record.
        part_bytes: bytes per layer; layer l is at `l * part_bytes` of a record.
        limit_bytes: size of all staging buffers together; two layers of all records are staged even where that is more.
        check: called with the first of some layers and their bytes (U, layers * part_bytes) before they are handed out;
            raises what it finds.
    """

    def __init__(
        self,
        storage: RowStorage,
        rows: Tensor,
        *,
        num_parts: int,
        part_bytes: int,
        limit_bytes: int = 2**28,
        check: Check | None = None,
    ) -> None:
        self._storage, self._rows, self._check = storage, rows, check
        self._num_parts, self._part_bytes = num_parts, part_bytes
        self._chunks: dict[int, _Chunk] = {}
        layer_bytes = max(1, len(rows) * part_bytes)
        whole = num_parts * layer_bytes <= limit_bytes
        self._chunk_parts = num_parts if whole else max(1, limit_bytes // 2 // layer_bytes)
        if storage.resident is not None:
            storage.prefetch(rows.tolist())
        else:
            self._begin(0)
            self._begin(1)

    def _begin(self, chunk: int) -> None:
        first = chunk * self._chunk_parts
        last = min(first + self._chunk_parts, self._num_parts)
        if first >= last:
            return
        start, width = first * self._part_bytes, (last - first) * self._part_bytes
        buffer = aligned_buffer(len(self._rows), width)
        pending = self._storage.request(self._rows.numpy(), buffer, start=start, cuts=self._cuts(start, width))
        self._chunks[chunk] = _Chunk(first, torch.from_numpy(buffer), pending)

    def _cuts(self, start: int, width: int) -> list[int]:
        """Where to divide a chunk, so that its first layers are there early: at pages of the file."""
        if (self._storage.region.stride_bytes | start) % PAGE_BYTES:
            return []
        step = max(MIN_CUT_BYTES, -(-self._part_bytes // PAGE_BYTES) * PAGE_BYTES)
        return list(range(step, width - step + 1, step))

    @property
    def arrives_at_once(self) -> bool:
        """Whether waiting layer by layer gains nothing: addressable rows, and rows that are read in one piece."""
        if self._storage.resident is not None:
            return True
        width = self._num_parts * self._part_bytes
        return self._chunk_parts == self._num_parts and not self._cuts(0, width)

    def whole(self) -> Tensor:
        """Bytes of all layers, (U, num_parts * part_bytes) uint8 on the CPU: fewer calls, where the rows are few.

        Raises:
            OSError: a read failed.
            ValueError: from the check; or the rows are too many to be staged at once.
        """
        width = self._num_parts * self._part_bytes
        resident = self._storage.resident
        if resident is not None:
            values = resident[:, :width].index_select(0, self._rows)
            self._storage.count(values.nbytes)
        else:
            if self._chunk_parts < self._num_parts:
                raise ValueError("the rows are staged in more than one piece; take them layer by layer")
            chunk = self._chunks[0]
            chunk.pending.wait()
            values = chunk.buffer[:, :width]
        if self._check is not None:
            self._check(0, values.numpy())
        return values

    def part(self, layer: int) -> Tensor:
        """Bytes of a layer for all records, (U, part_bytes) uint8 on the CPU, valid until a later layer is asked for.

        Layers must be asked for in order, each any number of times before the next.

        Raises:
            OSError: a read failed.
            ValueError: from the check.
        """
        begin = layer * self._part_bytes
        resident = self._storage.resident
        if resident is not None:
            values = resident[:, begin : begin + self._part_bytes].index_select(0, self._rows)
            self._storage.count(values.nbytes)
        else:
            values = self._staged(layer)
        if self._check is not None:
            self._check(layer, values.numpy())
        return values

    def _staged(self, layer: int) -> Tensor:
        number = layer // self._chunk_parts
        if number not in self._chunks:
            raise ValueError(f"layer {layer} was asked for out of order: its bytes are not staged")
        if number - 1 in self._chunks:
            # the chunk before is done with: its memory makes room for the one after this
            del self._chunks[number - 1]
            self._begin(number + 1)
        chunk = self._chunks[number]
        begin = (layer - chunk.first) * self._part_bytes
        chunk.pending.wait(begin + self._part_bytes)
        return chunk.buffer[:, begin : begin + self._part_bytes]
