"""Arguments of `tenfold evaluate` for LongBench, needle and RULER-like tasks."""

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...inference.evals.long_context.options import LongContextOptions

_HAYSTACK = "asset:wikipedia-summaries"
# names of tasks that are made from documents
_FROM_DOCUMENTS = re.compile(r"needle|ruler_local|longbench_local|.*\*")


def add_long_context_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, in a group of their own."""
    group = parser.add_argument_group("long-context tasks (longbench_…, needle, ruler_local)")
    group.add_argument(
        "--lengths",
        type=_numbers,
        metavar="N,…",
        help="lengths of generated tasks in tokens; default: 1024 to 32768 as far as the model's window goes",
    )
    group.add_argument("--samples-per-length", type=int, metavar="N", help="default: needle 1 per cell, others 10")
    group.add_argument("--haystack", metavar="H", help=f"text file or folder, or asset:NAME; default: {_HAYSTACK}")
    group.add_argument(
        "--prompt-tokens", type=int, metavar="N", help="LongBench's longest prompt; default: 3500 for a window of 4k, …"
    )
    group.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed LongBench lines out and count them"
    )


def long_context_options(arguments: argparse.Namespace, tasks: Sequence[str]) -> "LongContextOptions":
    """The options; documents are read only where a task needs them.

    Args:
        arguments: With what `add_long_context_arguments` added.
        tasks: Names asked for.

    Raises:
        ValueError: The haystack holds no text.
        OSError: It is not there.
    """
    from ...inference.evals.long_context.options import LongContextOptions

    # without lengths, this name is lm-eval's own
    ours = arguments.lengths is not None and "ruler" in tasks
    needed = ours or any(_FROM_DOCUMENTS.match(name) for name in tasks)
    return LongContextOptions(
        lengths=arguments.lengths,
        num_samples=arguments.samples_per_length,
        prompt_tokens=arguments.prompt_tokens,
        skip_malformed=arguments.skip_malformed,
        seed=arguments.seed or 0,
        documents=_documents(arguments.haystack or _HAYSTACK) if needed else (),
    )


def _documents(source: str) -> list[dict[str, Any]]:
    from pathlib import Path

    from ...datamodules.assets import resolve
    from ...datamodules.documents import list_files, read_documents

    folder = Path(resolve(source) if source.startswith("asset:") else source)
    documents = []
    for path in list_files(folder):
        for document in read_documents(path):
            title = document.get("title") or " ".join(document["text"].split()[:6])
            documents.append({"title": title, "text": document["text"]})
    return documents


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1024,4096") from None
