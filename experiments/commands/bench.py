"""`tenfold bench`: measure speed and memory against peers."""

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold bench",
        description="Measure against peers in the same process on the same work. A ratio above 1 means ours is better.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run, or `all` (--list shows them)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write the results here: an object, or for several benchmarks a list",
    )
    parser.add_argument("--quick", action="store_true", help="few repeats and cases, to see that it works")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and stop")
    return parser


def main(argv: list[str]) -> int:
    """Run `tenfold bench`.

    Args:
        argv: the arguments after `bench`.

    Returns:
        0, or 1 when a benchmark refused to report because a peer's result differs.

    Raises:
        ValueError: an unknown benchmark, or a device that is not there.
        FileNotFoundError: the folder of the JSON file does not exist.
    """
    from ..bench.registry import BENCHES, Device, Settings, resolve

    arguments = _parser().parse_args(argv)
    if arguments.list:
        width = max(map(len, BENCHES))
        for name, bench in BENCHES.items():
            print(f"{name:<{width}}  {bench.help}")
        return 0
    if not arguments.names:
        raise ValueError(f"no benchmark named; choose from all, {', '.join(BENCHES)}")
    names = resolve(arguments.names)

    import torch

    from ..bench.runner import run_and_report

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    device: Device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return run_and_report(names, Settings(device, arguments.quick, arguments.seed), arguments.json)
