"""Records that are addressed in place: in memory, in page-locked memory, or through a memory map."""

import mmap
import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .region import RowRegion
from .storage import RowStorage


class ResidentRows(RowStorage):
    """Records in a (num_rows, stride_bytes) tensor of bytes.

    Args:
        region: where they came from.
        records: the bytes.
    """

    name = "memory"

    def __init__(self, region: RowRegion, records: Tensor) -> None:
        super().__init__(region)
        self._records = records
        self._array = records.numpy()

    @property
    def resident(self) -> Tensor:
        """All records as bytes."""
        return self._records

    def read_into(self, rows: Sequence[int], out: np.ndarray, start: int) -> int:
        """Copy bytes of records."""
        taken = 0
        for row, target in zip(rows, out, strict=True):
            target[:] = self._array[row, start : start + target.size]
            taken += target.nbytes
        return taken


class PinnedRows(ResidentRows):
    """Records in page-locked host memory, from which a GPU copies on its own.

    Page-locked memory cannot be swapped and is taken from everybody else on the machine: it has to be asked for, and a
    limit is checked first.

    Args:
        region: where they came from.
        records: the bytes.
        limit_bytes: largest amount to lock; half of the machine's memory by default.

    Raises:
        ValueError: there is no CUDA device, the limit is passed, or the system refuses.
    """

    name = "pinned"

    def __init__(self, region: RowRegion, records: Tensor, *, limit_bytes: int | None = None) -> None:
        super().__init__(region, pin(records, limit_bytes=limit_bytes))


def pin_limit(limit_bytes: int | None = None) -> int:
    """The limit asked for, or half of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if limit_bytes is None else limit_bytes


def check_pinnable(num_bytes: int, limit_bytes: int | None = None) -> None:
    """Refuse to lock what should not be locked, before anything is read.

    Raises:
        ValueError: no CUDA device, or more than the limit.
    """
    if not torch.cuda.is_available():
        raise ValueError("storage 'pinned' locks host memory for a CUDA device, and torch sees none; use 'memory'")
    limit = pin_limit(limit_bytes)
    if num_bytes > limit:
        raise ValueError(
            f"storage 'pinned' would lock {num_bytes} bytes of memory, the limit is {limit}; raise the limit, or use "
            f"'mmap' or 'direct'"
        )


def pin(records: Tensor, *, limit_bytes: int | None = None) -> Tensor:
    """A page-locked copy.

    Raises:
        ValueError: see `PinnedRows`.
    """
    check_pinnable(records.nbytes, limit_bytes)
    try:
        return records.pin_memory()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the system refused to lock {records.nbytes} bytes of memory ({reason}); raise its limit (ulimit -l), or "
            f"use storage 'mmap' or 'direct'"
        ) from error


class MappedRows(RowStorage):
    """Records behind a private memory map: pages are read when they are touched, or shortly after `prefetch`.

    A device that fails while a page is touched ends the process with SIGBUS, as with every memory map; `direct` raises
    an OSError instead. A file that was cut short is noticed before it is touched.

    Args:
        region: where the records are.
    """

    name = "mmap"

    def __init__(self, region: RowRegion) -> None:
        super().__init__(region)
        self._descriptor = os.open(region.path, os.O_RDONLY)
        protection = mmap.PROT_READ | mmap.PROT_WRITE  # private: what is written never reaches the file
        # the start of a map is a multiple of the page size; so is the offset of every part of a tensor file
        self._map = mmap.mmap(
            self._descriptor, region.num_bytes, flags=mmap.MAP_PRIVATE, prot=protection, offset=region.offset
        )
        # rows are far apart: what the system would read ahead is not wanted
        self._map.madvise(mmap.MADV_RANDOM)
        self._array = np.frombuffer(self._map, dtype=np.uint8).reshape(region.num_rows, region.stride_bytes)
        self._records = torch.from_numpy(self._array)

    @property
    def resident(self) -> Tensor:
        """All records as bytes; touching them reads the file."""
        return self._records

    def prefetch(self, rows: Sequence[int]) -> None:
        """Let the system begin to read these records, and return.

        Raises:
            OSError: the file is shorter than it was.
        """
        region = self.region
        size, needed = os.fstat(self._descriptor).st_size, region.offset + region.num_bytes
        if size < needed:
            raise OSError(
                f"{region.path} has {size} bytes where the table needs {needed}: it was cut short; restore it"
            )
        for row in rows:
            begin = row * region.stride_bytes
            first = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, first, begin + region.row_bytes - first)

    def read_into(self, rows: Sequence[int], out: np.ndarray, start: int) -> int:
        """Copy bytes of records, which reads their pages."""
        taken = 0
        for row, target in zip(rows, out, strict=True):
            target[:] = self._array[row, start : start + target.size]
            taken += target.nbytes
        return taken

    def drop_file_cache(self) -> None:
        """Also unmap the pages: the system keeps those that a process has mapped."""
        self._map.madvise(mmap.MADV_DONTNEED)
        super().drop_file_cache()

    def close(self) -> None:
        """Stop the threads and close the file; the map lives as long as a tensor over it."""
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
