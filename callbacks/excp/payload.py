"""The coded bytes of a save, part by part, each with its checksum."""

import zlib
from collections.abc import Mapping

# offset, length, CRC-32; a list, as JSON gives it back
PartReference = list[int]


class PayloadWriter:
    """Collects parts one behind the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, part: bytes) -> PartReference:
        """Appends a part and tells where it lies."""
        reference = [self._size, len(part), zlib.crc32(part)]
        self._parts.append(part)
        self._size += len(part)
        return reference

    def add_all(self, parts: Mapping[str, bytes]) -> dict[str, PartReference]:
        """Appends parts with names."""
        return {name: self.add(part) for name, part in parts.items()}

    def join(self) -> bytes:
        """All parts."""
        return b"".join(self._parts)


def read_part(payload: bytes | memoryview, reference: PartReference, *, what: str) -> memoryview:
    """One part, checked.

    Raises:
        ValueError: it does not lie in the payload or its checksum differs; the message names `what`.
    """
    offset, length, checksum = reference
    part = memoryview(payload)[offset : offset + length]
    if len(part) != length:
        raise ValueError(f"ExCP: {what} is cut off: {len(part)} of {length} bytes; restore the file from a copy")
    if zlib.crc32(part) != checksum:
        raise ValueError(f"ExCP: {what} is damaged (checksum differs); restore the file from a copy")
    return part
