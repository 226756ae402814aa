"""Records read from the device with O_DIRECT, past the system's file cache, by several threads at once."""

import errno
import mmap
import os
import threading
import warnings
from collections.abc import Sequence

import numpy as np

from .region import RowRegion
from .storage import NUM_WORKERS, RowStorage

PAGE_BYTES = 4096
# sizes that a device may want offsets, lengths and addresses to be multiples of, smallest first
ALIGNMENTS = (512, PAGE_BYTES)
# what file systems answer that do not know O_DIRECT, at opening or at the first read
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


def aligned_buffer(num_rows: int, row_bytes: int) -> np.ndarray:
    """Uninitialised bytes (num_rows, row_bytes), every row starting on a page of memory."""
    stride = -(-row_bytes // PAGE_BYTES) * PAGE_BYTES
    raw = np.empty(num_rows * stride + PAGE_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % PAGE_BYTES
    return raw[skip : skip + num_rows * stride].reshape(num_rows, stride)[:, :row_bytes]


class DirectRows(RowStorage):
    """Records read with O_DIRECT where the file system has it, else through the file cache with a warning.

    A record that starts and ends on multiples of the device's block goes straight into the caller's buffer. Any other
    is read with the blocks around it, which `bytes_read` counts too, and copied out.

    Args:
        region: where the records are.
        num_workers: threads that read at the same time.
    """

    name = "direct"

    def __init__(self, region: RowRegion, *, num_workers: int = NUM_WORKERS) -> None:
        super().__init__(region, num_workers=num_workers)
        self._scratch = threading.local()
        self._descriptor, self.alignment_bytes = self._open()

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the file cache."""
        return self.alignment_bytes > 1

    def _open(self) -> tuple[int, int]:
        """A descriptor, and what reads on it have to be multiples of: 1 when they go through the file cache."""
        path = self.region.path
        reason: str | None = "this system has no O_DIRECT"
        if hasattr(os, "O_DIRECT"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                reason = error.strerror
            else:
                for alignment in ALIGNMENTS:
                    try:
                        os.preadv(descriptor, [memoryview(mmap.mmap(-1, PAGE_BYTES))[:alignment]], alignment)
                        return descriptor, alignment
                    except OSError as error:
                        if error.errno not in _REFUSALS:
                            os.close(descriptor)
                            raise
                        reason = error.strerror
                os.close(descriptor)
        warnings.warn(
            f"{path}: the file system refuses direct reads ({reason}); reading through the file cache instead",
            stacklevel=5,
        )
        return os.open(path, os.O_RDONLY), 1

    def read_into(self, rows: Sequence[int], out: np.ndarray, start: int) -> int:
        """Read bytes of records from the device.

        Raises:
            OSError: a read fails or ends early; the message names the record and the file.
        """
        width, unit = out.shape[1], self.alignment_bytes
        taken = 0
        for row, target in zip(rows, out, strict=True):
            begin = self.region.start(row) + start
            before = begin % unit
            length = -(-(before + width) // unit) * unit
            if length == width and target.ctypes.data % unit == 0:
                taken += self._read(row, memoryview(target), begin, width)
            else:
                scratch = self._scratch_of(length)
                taken += self._read(row, memoryview(scratch)[:length], begin - before, before + width)
                target[:] = scratch[before : before + width]
        return taken

    def _scratch_of(self, num_bytes: int) -> np.ndarray:
        scratch = getattr(self._scratch, "bytes", None)
        if scratch is None or scratch.size < num_bytes:
            scratch = self._scratch.bytes = aligned_buffer(1, num_bytes)[0]
        return scratch

    def _read(self, row: int, target: memoryview, offset: int, needed: int) -> int:
        """Fill at least `needed` bytes of the target, whose last block may lie beyond the end of the file."""
        done = 0
        while done < needed:
            try:
                got = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"reading record {row} of {self.region.path} failed: {error.strerror}; check that the device is "
                    f"still there",
                ) from error
            if got == 0:
                raise OSError(
                    errno.EIO,
                    f"{self.region.path} ends within record {row}: it was cut short while it was open; restore it",
                )
            done += got
        return done

    def close(self) -> None:
        """Stop the threads and close the file."""
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
