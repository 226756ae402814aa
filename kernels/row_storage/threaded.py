"""Requests that threads work off in the order in which their parts will be needed."""

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np


class Readable(Protocol):
    """What a `ThreadedReader` needs of a storage."""

    bytes_read: int

    def read_into(self, rows: Sequence[int], out: np.ndarray, start: int) -> int:
        """Read into the rows of `out`; returns the bytes taken."""
        ...


class PendingRows:
    """A request on its way.

    Args:
        parts: for each part its end within the width, and the reads it consists of.
    """

    def __init__(self, parts: Sequence[tuple[int, Sequence[Future[None]]]]) -> None:
        self._parts = list(parts)
        self._done = 0

    def wait(self, end: int | None = None) -> None:
        """Block until the first `end` bytes of every record are there; all of them by default.

        Raises:
            OSError: what a read failed with.
        """
        while self._done < len(self._parts):
            begin = self._parts[self._done - 1][0] if self._done else 0
            if end is not None and begin >= end:
                return
            for read in self._parts[self._done][1]:
                read.result()
            self._done += 1


class ThreadedReader:
    """Splits requests into reads for a pool of threads, which starts with the first request.

    Args:
        storage: reads and is counted on.
        num_workers: threads.
    """

    def __init__(self, storage: Readable, num_workers: int) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers {num_workers} is below 1")
        self._storage, self._num_workers = storage, num_workers
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def request(self, rows: np.ndarray, out: np.ndarray, *, start: int, cuts: Sequence[int]) -> PendingRows:
        """See `RowStorage.request`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="tenfold-rows")
        numbers = rows.tolist()
        share = max(1, -(-len(numbers) // self._num_workers))
        edges = [0, *cuts, out.shape[1]]
        parts = []
        # the pool takes them first in, first out: the part needed first goes first, for all records
        for begin, end in itertools.pairwise(edges):
            reads = [
                self._pool.submit(self._read, numbers[at : at + share], out[at : at + share, begin:end], start + begin)
                for at in range(0, len(numbers), share)
            ]
            parts.append((end, reads))
        return PendingRows(parts)

    def _read(self, rows: list[int], out: np.ndarray, start: int) -> None:
        self.count(self._storage.read_into(rows, out, start))

    def count(self, num_bytes: int) -> None:
        """Add to the storage's count."""
        with self._lock:
            self._storage.bytes_read += num_bytes

    def close(self) -> None:
        """Finish what has begun and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
