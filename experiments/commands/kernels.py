"""`tenfold kernels`: build the C++ CPU kernels for this machine, or say which path runs."""

import argparse
import sys


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold kernels",
        description="C++ CPU kernels of MoLE's and MemoryFormer's gathers, built once per machine into $TENFOLD_CACHE, "
        "by default tenfold in the user's cache folder. Without them torch's operators do the same, slower for few "
        "tokens. TENFOLD_CPU_KERNELS=off leaves built ones unused.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("build", help="compile them where they are missing, in seconds; needs g++ or clang++")
    commands.add_parser("status", help="say whether built kernels are used, and which file")
    return parser


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: what follows `tenfold kernels`.

    Returns:
        Exit status: 0, or 1 when they cannot be built here.

    Raises:
        ValueError: `TENFOLD_CPU_KERNELS` is no setting.
    """
    arguments = _parser().parse_args(argv)
    from ...kernels.native_build import build_cpu_kernels, cpu_kernels

    if arguments.command == "build":
        try:
            print(f"built: {build_cpu_kernels()}")
        except RuntimeError as error:
            print(f"tenfold kernels: {error}", file=sys.stderr)
            return 1
    library = cpu_kernels()
    print("C++ kernels are used: " + library._name if library is not None else "torch's operators are used")
    return 0
