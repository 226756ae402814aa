"""Where equally long records lie in a file."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RowRegion:
    """Record i is `row_bytes` bytes at `offset + i * stride_bytes` of the file.

    Attributes:
        path: the file.
        offset: byte offset of record 0.
        num_rows: records.
        stride_bytes: from the start of one record to the start of the next.
        row_bytes: bytes of a record that hold data.
    """

    path: Path
    offset: int
    num_rows: int
    stride_bytes: int
    row_bytes: int

    def start(self, row: int) -> int:
        """Byte offset of a record in the file."""
        return self.offset + row * self.stride_bytes

    @property
    def num_bytes(self) -> int:
        """All records, from the first byte to the last."""
        return self.num_rows * self.stride_bytes
