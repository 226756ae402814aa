"""The `--cache` options of `tenfold generate` and `tenfold evaluate`: keys and values in fewer device bytes."""

import argparse
from typing import Any, NamedTuple

CACHE_NAMES = ("full", "offloaded", "quantized", "kivi", "exact-fetch", "specache", "window", "h2o")


class _Flag(NamedTuple):
    option: str
    kind: type
    choices: tuple[Any, ...]
    help: str


# which caches take which is told by `build_cache`; a test compares this table with theirs
_FLAGS = (
    _Flag("bits", int, (1, 2, 4), "bits of the device copy (2)"),
    _Flag("top_k", int, (), "exact rows per sequence, layer and key/value head (64)"),
    _Flag("residual_length", int, (), "recent tokens in full precision on the device (64; kivi 128)"),
    _Flag("group_size", int, (), "values that share a scale (64)"),
    _Flag("rule", str, ("kivi", "centred"), "quantiser levels; by default centred at 1 bit, else kivi"),
    _Flag("mode", str, ("speculative", "exact_fetch", "low_bit_only"), "of specache: the method, or its controls"),
    _Flag("select_residual", bool, (), "let tokens of the residual win places among the exact rows"),
    _Flag("speculation", str, ("same", "greedy"), "draw guesses by the output's rule (same), or greedily"),
    _Flag("speculation_seed", int, (), "seed of the guesses (0)"),
    _Flag("attention", str, ("packed", "dense"), "read the packed copy (packed), or unpack one layer at a time"),
    _Flag("prefetch", str, ("async", "sync"), "fetch beside the computation or at once; async on CUDA"),
    _Flag("host_limit_bytes", int, (), "the most host memory to take; by default what is available"),
    _Flag("measure", bool, (), "also count how many of each token's own rows were there"),
    _Flag("backend", str, ("triton", "cpu", "reference"), "kernel backend; by default the device's own"),
    _Flag("quantizer", str, ("hqq", "quanto"), "package of the quantized cache (hqq)"),
    _Flag("nbits", int, (1, 2, 3, 4, 8), "bits of the quantized cache (4)"),
    _Flag("q_group_size", int, (), "values that share a scale in the quantized cache (64)"),
    _Flag("budget", int, (), "tokens that window and h2o hold per sequence, layer and key/value head (512)"),
    _Flag("num_sinks", int, (), "first tokens that window never drops (4)"),
    _Flag("num_recent", int, (), "last tokens that h2o holds whatever their attention (half the budget)"),
)


class CacheRequest(NamedTuple):
    """A cache that was asked for.

    Attributes:
        name: A key of `tenfold.inference.specache.CACHES`.
        options: Those that were given.
    """

    name: str
    options: dict[str, Any]


def add_cache_arguments(parser: argparse.ArgumentParser) -> Any:
    """Add `--cache` and its options; returns their group."""
    group = parser.add_argument_group(
        "cache of keys and values", "what lossy caches lose shows in generated text only: prompts are read in full"
    )
    group.add_argument("--cache", choices=CACHE_NAMES, help="how keys and values are kept while decoding (full)")
    for flag in _FLAGS:
        name = _spelled(flag.option)
        if flag.kind is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=flag.help)
        else:
            choices = flag.choices or None
            metavar = None if choices else "N"
            group.add_argument(name, type=flag.kind, choices=choices, metavar=metavar, help=flag.help)
    return group


def cache_request(arguments: argparse.Namespace) -> CacheRequest | None:
    """The cache that the command line asks for, if any.

    Raises:
        ValueError: Options of a cache, but no `--cache`, or options that this cache does not take.
    """
    names = (flag.option for flag in _FLAGS)
    given = {name: value for name in names if (value := getattr(arguments, f"cache_{name}")) is not None}
    if arguments.cache is None:
        if given:
            raise ValueError(f"{_spelled(next(iter(given)))} has no effect without --cache; add --cache specache")
        return None
    from ..inference.specache import CACHES

    takes = [option.name for option in CACHES[arguments.cache].options]
    for name in given:
        if name not in takes:
            others = ", ".join(_spelled(option) for option in takes) or "no options"
            raise ValueError(f"{_spelled(name)} is no option of --cache {arguments.cache}, which takes {others}")
    return CacheRequest(arguments.cache, given)


def _spelled(option: str) -> str:
    return f"--cache-{option.replace('_', '-')}"
