from .ops import Backend, weighted_gather, weighted_gather_groups
from .segments import Segments, sort_segments

__all__ = ["Backend", "Segments", "sort_segments", "weighted_gather", "weighted_gather_groups"]
