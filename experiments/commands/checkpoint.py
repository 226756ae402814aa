"""`tenfold checkpoint`: look into coded checkpoints, check them, make plain ones of them, and code plain ones."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold checkpoint", description="Checkpoints that ExCPCheckpointIO wrote, and plain ones to be coded."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="sizes, sparsity and errors",
        description="Show a checkpoint's tensors by group, and the saves of its folder along their chain.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a folder of them")
    inspect.add_argument("--parameters", action="store_true", help="a row per parameter, not per group")
    inspect.add_argument("--report", type=Path, metavar="FILE.html", help="write tables and a picture of the chain")
    verify = commands.add_parser(
        "verify",
        help="decode everything and compare checksums",
        description="Decode every save of a folder and compare all checksums. Exit status 1 if any is damaged.",
    )
    verify.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, or a folder of them")
    expand = commands.add_parser(
        "expand",
        help="make a plain checkpoint",
        description="Write a checkpoint in the plain format of Lightning, which needs no other file.",
    )
    expand.add_argument("path", type=Path, metavar="PATH", help="a checkpoint")
    expand.add_argument("--output", type=Path, required=True, metavar="FILE", help="the new file")
    commands.add_parser(
        "compress",
        help="code plain checkpoints",
        description="Code plain checkpoints of one run, in the order of their steps, into a new folder.",
        add_help=False,
    )
    for command in (inspect, verify, expand):
        command.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads (one per CPU)")
        command.add_argument(
            "--trusted", action="store_true", help="also load what is not plain values and tensors, as pickle does"
        )
    return parser


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: what follows `tenfold checkpoint`.

    Returns:
        Exit status: 0, or 1 when `verify` found damage.
    """
    if argv[:1] == ["compress"]:
        return _compress(argv[1:])
    arguments = _parser().parse_args(argv)
    if not arguments.path.exists():
        raise FileNotFoundError(f"{arguments.path} does not exist; name a checkpoint or a folder of checkpoints")
    if arguments.command == "inspect":
        return _inspect(arguments)
    if arguments.command == "verify":
        return _verify(arguments)
    return _expand(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoint_tables import chain_rows, newest, print_rows, tensor_rows, write_report

    path = newest(arguments.path) if arguments.path.is_dir() else arguments.path
    tensors = tensor_rows(path, by_parameter=arguments.parameters, weights_only=not arguments.trusted)
    chain = chain_rows(path, weights_only=not arguments.trusted)
    print_rows(str(path), tensors)
    print_rows("its chain", chain)
    if arguments.report is not None:
        write_report(path, tensors, chain, arguments.report)
        print(f"report: {arguments.report}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from ...callbacks.excp.restore import restore
    from ...callbacks.excp.sharded import is_sharded
    from ...callbacks.excp.store import SaveStore
    from ...callbacks.excp.verify import verify_folder
    from ...inference.evals.progress import track

    path = arguments.path
    if is_sharded(path):
        from .checkpoint_tables import load_sharded

        load_sharded(path, workers=arguments.workers, weights_only=not arguments.trusted)
        print(f"{path}: whole")
        return 0
    if path.is_file():
        with track("decoding, saves", 1) as advance:
            restore(
                path,
                weights_only=not arguments.trusted,
                workers=arguments.workers,
                progress=lambda done, total: advance(1),
            )
        print(f"{path}: whole")
        return 0
    with track("decoding, saves", len(SaveStore(path).entries())) as advance:
        findings = verify_folder(path, workers=arguments.workers, weights_only=not arguments.trusted, progress=advance)
    if not findings:
        raise ValueError(f"{path} has no coded checkpoints; name the folder that their visible names are in")
    damaged = [finding for finding in findings if finding.problem]
    for finding in damaged:
        names = f" ({', '.join(finding.names)})" if finding.names else ""
        print(f"damaged: {finding.path.name}{names}: {finding.problem}", file=sys.stderr)
    print(f"{path}: {len(findings) - len(damaged)} of {len(findings)} saves are whole")
    return 1 if damaged else 0


def _expand(arguments: argparse.Namespace) -> int:
    from ...callbacks.checkpoint_io import AtomicCheckpointIO
    from ...callbacks.excp.restore import restore
    from ...callbacks.excp.sharded import is_sharded
    from ...inference.evals.progress import track

    output: Path = arguments.output
    if output.exists():
        raise ValueError(f"--output {output} exists; name a new file or remove it")
    if is_sharded(arguments.path):
        from .checkpoint_tables import load_sharded

        checkpoint: Any = load_sharded(arguments.path, workers=arguments.workers, weights_only=not arguments.trusted)
    elif arguments.path.is_dir():
        raise ValueError(f"{arguments.path} is a folder; name one checkpoint in it")
    else:
        with track("decoding, saves", 1) as advance:
            checkpoint = restore(
                arguments.path,
                weights_only=not arguments.trusted,
                workers=arguments.workers,
                progress=lambda done, total: advance(1),
            ).checkpoint
    AtomicCheckpointIO().save_checkpoint(checkpoint, output)
    print(f"written: {output} ({output.stat().st_size:,} bytes)")
    return 0


def _underscored(match: re.Match[str]) -> str:
    return "--" + match[0][2:].replace("-", "_")


def _compress(argv: list[str]) -> int:
    from jsonargparse import ArgumentParser

    from ...callbacks.excp.options import ExCPOptions

    parser = ArgumentParser(
        prog="tenfold checkpoint compress",
        description="Code plain checkpoints of one run, in the order of their steps, into a new folder. What is there "
        "already is kept, so that an interrupted call can be repeated.",
    )
    parser.add_argument("paths", nargs="+", type=Path, help="plain checkpoints, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, help="folder of the coded ones, under the same names")
    parser.add_argument("--key_frame_every", type=int, default=20, help="saves from one key frame to the next")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    parser.add_argument("--trusted", action="store_true", help="also load what is not plain values and tensors")
    parser.add_class_arguments(ExCPOptions)
    # --error-target as well as --error_target, as in the other commands
    values = parser.parse_args([re.sub(r"^--[a-z-]+", _underscored, part) for part in argv])
    names = ExCPOptions.__dataclass_fields__
    options = ExCPOptions(**{name: values[name] for name in names})
    from .checkpoint_compress import compress

    compress(
        values.paths,
        values.output,
        options,
        key_frame_every=values.key_frame_every,
        workers=values.workers,
        weights_only=not values.trusted,
    )
    return 0
