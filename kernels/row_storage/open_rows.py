"""Records by the name of the place that holds them."""

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from .direct import DirectRows
from .region import RowRegion
from .resident import MappedRows, PinnedRows, ResidentRows, check_pinnable
from .storage import RowStorage

Storage = Literal["memory", "pinned", "mmap", "direct"]
STORAGES: tuple[Storage, ...] = get_args(Storage)


def open_rows(
    region: RowRegion,
    storage: Storage,
    *,
    load: Callable[[], Tensor],
    pinned_limit_bytes: int | None = None,
) -> RowStorage:
    """Open records.

    Args:
        region: where the records are.
        storage: `memory` reads all of them now; `pinned` too, into page-locked memory for a GPU; `mmap` reads pages
            when they are touched; `direct` reads records when they are asked for, past the file cache.
        load: reads all records and checks them: (num_rows, stride_bytes) bytes. For `memory` and `pinned`.
        pinned_limit_bytes: most memory to page-lock; half of the machine's by default.

    Raises:
        ValueError: an unknown storage, or memory that cannot be page-locked.
        OSError: the file cannot be opened.
    """
    if storage == "memory":
        return ResidentRows(region, load())
    if storage == "pinned":
        check_pinnable(region.num_bytes, pinned_limit_bytes)
        return PinnedRows(region, load(), limit_bytes=pinned_limit_bytes)
    if storage == "mmap":
        return MappedRows(region)
    if storage == "direct":
        return DirectRows(region)
    raise ValueError(f"storage {storage!r} is not one of {', '.join(STORAGES)}")
