from .open_rows import STORAGES, Storage, open_rows
from .region import RowRegion
from .storage import RowStorage
from .stream import RowStream
from .threaded import PendingRows

__all__ = ["STORAGES", "PendingRows", "RowRegion", "RowStorage", "RowStream", "Storage", "open_rows"]
