"""A file of large arrays that can be memory-mapped, read row by row with aligned direct I/O, and checked.

Layout, little-endian: 8 bytes magic, uint32 version, uint32 length of the JSON header, the header, zeros up to the next
multiple of 4096; then the parts, each starting at a multiple of 4096. The header holds the caller's `metadata`, the
chunk size and for every part its dtype, shape, byte offset and one CRC-32 per chunk. A CRC-32 over it closes it.

The writer fills a temporary file in the same folder, flushes it and renames it: under the final name there is a whole
file or none.
"""

import contextlib
import errno
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

ALIGNMENT_BYTES = 4096
CHUNK_BYTES = 64 * 2**20
_PREFIX = struct.Struct("<8sII")
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64",
        "float32",
        "bfloat16",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint16",
        "uint32",
    )
}


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _num_bytes(part: Mapping[str, Any]) -> int:
    count = 1
    for size in part["shape"]:
        count *= size
    return count * _DTYPES[part["dtype"]].itemsize


class TensorFileWriter:
    """Writes the parts of a tensor file one after the other, each in as many pieces as the caller likes.

    Use as a context manager. Leaving it normally checks that every part is complete, writes the checksums, flushes to
    the device and renames; leaving it by an exception removes the temporary file.

    Args:
        path: final name of the file; an existing file is replaced only by a complete new one.
        magic: 8 bytes that name the kind of content.
        version: version of that content's layout.
        parts: for every part, in file order, its dtype name (as in `torch.<name>`) and shape.
        metadata: anything JSON can hold.

    Raises:
        ValueError: a part gets the wrong dtype, too many or too few elements, or parts come out of order.
        OSError: the disk is not writable, or has no room: the message names the file, the bytes it needs and those that
            are free. A file that was there before stays as it was.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        magic: bytes,
        version: int,
        parts: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if len(magic) != 8:
            raise ValueError(f"magic must have 8 bytes, got {magic!r}")
        self.path = Path(path)
        self._magic, self._version, self._chunk_bytes = magic, version, CHUNK_BYTES
        self._parts: dict[str, dict[str, Any]] = {}
        for name, (dtype, shape) in parts.items():
            if dtype not in _DTYPES:
                raise ValueError(f"part {name!r}: dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
            part: dict[str, Any] = {"dtype": dtype, "shape": list(shape)}
            num_chunks = -(-_num_bytes(part) // self._chunk_bytes)
            self._parts[name] = part | {"offset": 0, "crc32": ["0" * 8] * num_chunks}
        self._metadata = dict(metadata or {})
        # offsets depend on the header's length, which does not: every offset is written with 15 digits
        offset = _align(_PREFIX.size + len(self._header()) + 4)
        self._data_offset = offset
        for part in self._parts.values():
            part["offset"] = offset
            offset = _align(offset + _num_bytes(part))
        self.num_bytes = offset
        self._order = list(self._parts)
        self._current = 0
        self._written = 0

    def _header(self) -> bytes:
        parts = {name: part | {"offset": f"{part['offset']:015d}"} for name, part in self._parts.items()}
        content = {"metadata": self._metadata, "chunk_bytes": self._chunk_bytes, "parts": parts}
        return json.dumps(content, separators=(",", ":")).encode()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # better now than after minutes of writing
        if shutil.disk_usage(self.path.parent).free < self.num_bytes:
            raise self._no_room()
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")
        self._file.seek(self._data_offset)
        return self

    def write(self, name: str, values: torch.Tensor | np.ndarray) -> None:
        """Append values (any shape, row-major) to part `name`."""
        if isinstance(values, np.ndarray):
            # a copy where it is read-only: torch warns about sharing such memory
            tensor = torch.from_numpy(np.ascontiguousarray(values) if values.flags.writeable else values.copy())
        else:
            tensor = values
        if tensor.numel() == 0 and name in self._parts:
            return
        while self._current < len(self._order) and self._remaining() == 0:
            self._next_part()
        if self._current == len(self._order) or self._order[self._current] != name:
            expected = self._order[self._current] if self._current < len(self._order) else "nothing"
            raise ValueError(f"{self.path.name}: part {name!r} written where {expected!r} was due")
        part = self._parts[name]
        if tensor.dtype != _DTYPES[part["dtype"]]:
            raise ValueError(f"{self.path.name}: part {name!r} holds {part['dtype']}, got {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        data = memoryview(flat.view(torch.uint8).numpy())
        if len(data) > self._remaining():
            raise ValueError(f"{self.path.name}: part {name!r} gets {len(data)} bytes, {self._remaining()} are left")
        while data:
            chunk, within = divmod(self._written, self._chunk_bytes)
            piece, data = data[: self._chunk_bytes - within], data[self._chunk_bytes - within :]
            part["crc32"][chunk] = f"{zlib.crc32(piece, int(part['crc32'][chunk], 16) if within else 0):08x}"
            with self._naming_a_full_disk():
                self._file.write(piece)
            self._written += len(piece)

    def _remaining(self) -> int:
        return _num_bytes(self._parts[self._order[self._current]]) - self._written

    def _next_part(self) -> None:
        self._current, self._written = self._current + 1, 0
        if self._current < len(self._order):
            self._file.seek(self._parts[self._order[self._current]]["offset"])

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._naming_a_full_disk():
                    self._finish()
        finally:
            # closing flushes, which fails once more on a full disk: what went wrong first is what the caller should see
            with contextlib.suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._no_room() from error

    def _no_room(self) -> OSError:
        free = shutil.disk_usage(self.path.parent).free
        return OSError(
            errno.ENOSPC,
            f"{self.path} needs {self.num_bytes} bytes, {free} are free on that disk; make room or write elsewhere",
        )

    def _finish(self) -> None:
        while self._current < len(self._order) and self._remaining() == 0:
            self._next_part()
        if self._current < len(self._order):
            raise ValueError(f"{self.path.name}: part {self._order[self._current]!r} lacks {self._remaining()} bytes")
        header = self._header()
        prefix = _PREFIX.pack(self._magic, self._version, len(header)) + header
        self._file.truncate(self.num_bytes)
        self._file.seek(0)
        self._file.write(prefix + struct.pack("<I", zlib.crc32(prefix)))
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class TensorFile:
    """Reads a tensor file: header and sizes are checked when it is opened, contents by `verify`.

    Args:
        path: the file.
        magic: the 8 bytes that the content must start with.
        version: the layout version that the caller can read.

    Raises:
        ValueError: the file is of another kind or version, truncated, or its header is altered.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], *, magic: bytes, version: int) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            start = file.read(_PREFIX.size)
            if len(start) < _PREFIX.size or start[:8] != magic:
                raise ValueError(
                    f"{self.path} does not start with {magic!r}: it is not a file of this kind; write it again"
                )
            _, found, length = _PREFIX.unpack(start)
            if found != version:
                raise ValueError(
                    f"{self.path} has layout version {found}, this release reads {version}; write it again"
                )
            header, checksum = file.read(length), file.read(4)
        if len(checksum) < 4 or struct.unpack("<I", checksum)[0] != zlib.crc32(start + header):
            raise ValueError(f"{self.path}: the header is truncated or altered; write the file again")
        content = json.loads(header)
        self._chunk_bytes: int = content.get("chunk_bytes", CHUNK_BYTES)
        self.metadata: dict[str, Any] = content["metadata"]
        self._parts: dict[str, dict[str, Any]] = content["parts"]
        for part in self._parts.values():
            part["offset"] = int(part["offset"])
        end_of_header = _align(_PREFIX.size + length + 4)
        ends = (_align(part["offset"] + _num_bytes(part)) for part in self._parts.values())
        expected = max(ends, default=end_of_header)
        if size != expected:
            raise ValueError(
                f"{self.path} has {size} bytes where its header says {expected}: truncated or altered; write it again"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of part `name`."""
        return tuple(self._parts[name]["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """Element type of part `name`."""
        return _DTYPES[self._parts[name]["dtype"]]

    def offset(self, name: str) -> int:
        """Byte offset of part `name` in the file, a multiple of 4096."""
        return self._parts[name]["offset"]

    def memory_map(self, name: str) -> torch.Tensor:
        """Part `name` over a private memory map: pages are read on first touch, writes never reach the file."""
        part = self._parts[name]
        num_bytes = _num_bytes(part)
        if num_bytes == 0:
            return torch.empty(part["shape"], dtype=self.dtype(name))
        raw = np.memmap(self.path, dtype=np.uint8, mode="c", offset=part["offset"], shape=(num_bytes,))
        return torch.from_numpy(raw).view(self.dtype(name)).view(part["shape"])

    def read(self, name: str) -> torch.Tensor:
        """Part `name` in ordinary memory, checked against its checksums while it is read."""
        part = self._parts[name]
        buffer = np.empty(_num_bytes(part), dtype=np.uint8)
        with open(self.path, "rb") as file:
            file.seek(part["offset"])
            for chunk, checksum in enumerate(part["crc32"]):
                piece = memoryview(buffer)[chunk * self._chunk_bytes : (chunk + 1) * self._chunk_bytes]
                if file.readinto(piece) != len(piece) or zlib.crc32(piece) != int(checksum, 16):
                    raise ValueError(
                        f"{self.path}: part {name!r}, chunk {chunk} fails its checksum: altered; write the file again"
                    )
        values = torch.from_numpy(buffer)
        return (values.view(self.dtype(name)) if len(values) else values.to(self.dtype(name))).view(part["shape"])

    def verify(self) -> None:
        """Read every part once and compare all checksums, in bounded memory.

        Raises:
            ValueError: a chunk differs; the message names part and chunk.
        """
        with open(self.path, "rb") as file:
            for name, part in self._parts.items():
                file.seek(part["offset"])
                remaining = _num_bytes(part)
                for chunk, checksum in enumerate(part["crc32"]):
                    data = file.read(min(self._chunk_bytes, remaining))
                    remaining -= len(data)
                    if zlib.crc32(data) != int(checksum, 16):
                        raise ValueError(
                            f"{self.path}: part {name!r}, chunk {chunk} fails its checksum: altered; "
                            "write the file again"
                        )
