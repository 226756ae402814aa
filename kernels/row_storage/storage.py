"""What the places that hold records have in common: requests part by part, a count of the bytes, a way to go cold."""

import os
from collections.abc import Sequence
from typing import Self

import numpy as np
from torch import Tensor

from .region import RowRegion
from .threaded import PendingRows, ThreadedReader

# concurrent reads: consumer NVMe drives are near their random-read rate from about this depth on
NUM_WORKERS = 16


class RowStorage:
    """Records of a file, read by number. `open_rows` makes one.

    `bytes_read` counts what was taken from the storage, from the lengths that its reads return; nothing is worked out
    from shapes.

    Args:
        region: where the records are.
        num_workers: threads that read at the same time.
    """

    name = ""

    def __init__(self, region: RowRegion, *, num_workers: int = NUM_WORKERS) -> None:
        self.region = region
        self.bytes_read = 0
        self._reader = ThreadedReader(self, num_workers)

    @property
    def resident(self) -> Tensor | None:
        """All records (num_rows, stride_bytes) as bytes, where they can be addressed in place."""
        return None

    def prefetch(self, rows: Sequence[int]) -> None:
        """Say which records will be read next; only an addressable storage that is not in memory needs to know."""

    def request(self, rows: np.ndarray, out: np.ndarray, *, start: int = 0, cuts: Sequence[int] = ()) -> PendingRows:
        """Begin to read bytes `start` to `start + width` of records into `out` (U, width), uint8; returns at once.

        Args:
            rows: (U,) record numbers.
            out: where they go; rows must be contiguous, and stay alive until the request is done.
            start: first byte within a record.
            cuts: where to divide the width, ascending: the bytes before a cut are read, and can be waited for, first.
        """
        return self._reader.request(rows, out, start=start, cuts=cuts)

    def read_into(self, rows: Sequence[int], out: np.ndarray, start: int) -> int:
        """Read bytes from `start` on of records into the rows of `out`, blocking; returns the bytes taken.

        Raises:
            OSError: the file or its device fails.
        """
        raise NotImplementedError

    def count(self, num_bytes: int) -> None:
        """Add to `bytes_read`; for those who take records in place."""
        self._reader.count(num_bytes)

    def drop_file_cache(self) -> None:
        """Let the system forget the file, so that the next read comes from the device. For benchmarks."""
        descriptor = os.open(self.region.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Stop the threads and give back what is open; calling it twice is fine."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
