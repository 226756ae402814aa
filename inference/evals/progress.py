"""Progress of long scoring: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Mode = Literal["auto", "bar", "lines", "off"]

# seconds between two plain lines: few enough to read in a batch job's log
LINE_INTERVAL_S = 30.0


@contextmanager
def track(description: str, total: int, *, mode: Mode = "auto") -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is, on stderr.

    Args:
        description: What is being done.
        total: Number of steps.
        mode: `bar` draws a rich bar, `lines` prints at most one line per half minute, `auto` picks by whether stderr is
            a terminal.

    Yields:
        A function that is told the number of steps just done.
    """
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "lines"
    if mode == "off" or total == 0:
        yield lambda steps: None
    elif mode == "bar":
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda steps: bar.advance(task, steps)
    else:
        yield _line_printer(description, total)


def _line_printer(description: str, total: int) -> Callable[[int], None]:
    done, shown_at = 0, time.monotonic()

    def advance(steps: int) -> None:
        nonlocal done, shown_at
        done += steps
        now = time.monotonic()
        if now - shown_at >= LINE_INTERVAL_S:
            shown_at = now
            print(f"{description}: {min(done, total)}/{total}", file=sys.stderr, flush=True)

    return advance
