"""The C++ CPU kernels for a benchmark: built before anything is timed, with a row that says whether they are there."""

import os
from collections.abc import Iterator

from ...kernels.native_build import build_cpu_kernels
from .registry import Settings
from .rows import Row


def build_for(settings: Settings) -> Iterator[Row]:
    """Build the kernels where `ours` would run on them: a row with 1, or with 0 and the reason; none if told not to."""
    if settings.device != "cpu" or os.environ.get("TENFOLD_CPU_KERNELS") == "off":
        return
    reason = None
    try:
        build_cpu_kernels()
    except (OSError, RuntimeError) as error:
        reason = str(error)
    yield Row("C++ CPU kernels", "in_use", float(reason is None), "count", reason=reason)
