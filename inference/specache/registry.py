"""Caches by name, for the command line and for comparisons: what each is, and which options it takes."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib.util import find_spec
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

from .accounting import CacheShape
from .cache import SpeCache
from .decoding_cache import DecodingCache
from .eviction import HeavyHitterCache, WindowCache
from .generation import specache_generate
from .options import SpeCacheOptions

# the paper shortens SpeCache's residual until its device bytes equal KIVI's: 64 + 64 against 128
KIVI_RESIDUAL = 128
DEFAULT_BUDGET = 512

HELP = {
    "bits": "bits of the device copy",
    "top_k": "exact rows per sequence, layer and key/value head",
    "residual_length": "recent tokens kept in full precision on the device",
    "group_size": "values that share a scale",
    "rule": "quantiser levels; by default centred at 1 bit, else kivi",
    "mode": "speculative, or the controls exact_fetch and low_bit_only",
    "select_residual": "let tokens of the residual win places among the exact rows",
    "speculation": "draw speculative tokens by the same rule as the output, or greedily",
    "speculation_seed": "seed of the generator that draws speculative tokens",
    "attention": "read the packed copy directly, or unpack one layer at a time",
    "prefetch": "fetch beside the computation or at once; by default async on CUDA",
    "host_limit_bytes": "the most host memory to take; by default what is available",
    "measure": "count row coverage and time the waits",
    "backend": "kernel backend; by default the device's own",
    "nbits": "bits of the packed part",
    "q_group_size": "values that share a scale",
    "quantizer": "quantisation library",
    "budget": "tokens held per sequence, layer and key/value head",
    "num_sinks": "first tokens that are never dropped",
    "num_recent": "last tokens that are held whatever their attention; by default half the budget",
}


@dataclass(frozen=True)
class CacheOption:
    """One option of a cache.

    Attributes:
        name: Keyword of `build_cache`.
        type: `int`, `bool` or `str`.
        default: Its value when it is not given.
        choices: Allowed values, or empty.
        help: One line.
    """

    name: str
    type: type
    default: Any
    choices: tuple[Any, ...]
    help: str


@dataclass(frozen=True)
class CacheChoice:
    """A cache that can be asked for by name.

    Attributes:
        help: One line.
        options: What it takes.
        build: From a model's configuration and the options' values.
        requires: An optional package it needs, or None.
    """

    help: str
    options: tuple[CacheOption, ...]
    build: Callable[..., Cache]
    requires: str | None = None


def _specache_options(**defaults: Any) -> tuple[CacheOption, ...]:
    hints = get_type_hints(SpeCacheOptions)
    options = []
    for field in fields(SpeCacheOptions):
        kinds = [kind for kind in (get_args(hints[field.name]) or (hints[field.name],)) if kind is not NoneType]
        if get_origin(hints[field.name]) is Literal:
            kinds = [hints[field.name]]
        choices = tuple(get_args(kinds[0])) if get_origin(kinds[0]) is Literal else ()
        kind = type(choices[0]) if choices else kinds[0]
        default = defaults.get(field.name, field.default)
        options.append(CacheOption(field.name, kind, default, choices, HELP[field.name]))
    return tuple(options)


def _without(options: tuple[CacheOption, ...], *names: str) -> tuple[CacheOption, ...]:
    return tuple(option for option in options if option.name not in names)


def _build_quantized(config: PreTrainedConfig, quantizer: str = "hqq", **options: Any) -> Cache:
    shape, group = CacheShape.of(config, torch.float32), options["q_group_size"]
    if quantizer == "hqq" and shape.num_heads * shape.head_dim % group:
        # hqq cuts the whole tensor into groups, whatever its axes
        raise ValueError(
            f"q_group_size is {group}; for hqq it must divide the {shape.num_heads * shape.head_dim} key channels of a "
            "token, or prompts of some lengths fail: choose another"
        )
    return QuantizedCache(backend=quantizer, config=config, **options)


CACHES: dict[str, CacheChoice] = {
    "full": CacheChoice("all keys and values on the device", (), lambda config: DynamicCache(config=config)),
    "offloaded": CacheChoice(
        "all keys and values on the host, every layer's copied to the device at every step",
        (),
        lambda config: DynamicCache(config=config, offloading=True),
        requires="cuda",
    ),
    "quantized": CacheChoice(
        "transformers' quantized cache",
        (
            CacheOption("quantizer", str, "hqq", ("hqq", "quanto"), HELP["quantizer"]),
            CacheOption("nbits", int, 4, (1, 2, 3, 4, 8), HELP["nbits"]),
            CacheOption("q_group_size", int, 64, (), HELP["q_group_size"]),
            CacheOption("residual_length", int, 128, (), HELP["residual_length"]),
        ),
        _build_quantized,
    ),
    "kivi": CacheChoice(
        "a low-bit copy and a residual, nothing on the host is read back",
        _without(
            _specache_options(residual_length=KIVI_RESIDUAL, mode="low_bit_only", rule="kivi"),
            "mode",
            "top_k",
            "select_residual",
            "speculation",
            "speculation_seed",
            "measure",
        ),
        lambda config, **options: SpeCache(config, mode="low_bit_only", **options),
    ),
    "exact-fetch": CacheChoice(
        "as specache, but every token waits for the rows that its own query chose",
        _without(_specache_options(mode="exact_fetch"), "mode", "speculation", "speculation_seed", "measure"),
        lambda config, **options: SpeCache(config, mode="exact_fetch", **options),
    ),
    "specache": CacheChoice(
        "a low-bit copy, and the rows that the next token will need fetched from the host ahead of time",
        _specache_options(),
        SpeCache,
    ),
    "window": CacheChoice(
        "the first tokens and the most recent ones, as StreamingLLM",
        (
            CacheOption("budget", int, DEFAULT_BUDGET, (), HELP["budget"]),
            CacheOption("num_sinks", int, 4, (), HELP["num_sinks"]),
        ),
        WindowCache,
    ),
    "h2o": CacheChoice(
        "the most recent tokens and those with the most attention so far, as H2O",
        (
            CacheOption("budget", int, DEFAULT_BUDGET, (), HELP["budget"]),
            CacheOption("num_recent", int, None, (), HELP["num_recent"]),
        ),
        HeavyHitterCache,
    ),
}


def build_cache(name: str, model_config: PreTrainedConfig, **options: Any) -> tuple[Cache, dict[str, Any]]:
    """Make a cache by name, for one batch.

    Args:
        name: A key of `CACHES`.
        model_config: The model's configuration.
        **options: Options of that cache, see `CACHES[name].options`.

    Returns:
        The cache, and what `model.generate` must be given: `past_key_values`, and where it needs one, the decoding
        loop.

    Raises:
        ValueError: The name or an option is unknown or out of range, a package or device is missing, or the model has
            layers that the cache does not cover.
    """
    choice = CACHES.get(name)
    if choice is None:
        raise ValueError(f"unknown cache {name!r}: use one of {', '.join(CACHES)}{_near(name, CACHES)}")
    known = {option.name: option for option in choice.options}
    for given, value in options.items():
        option = known.get(given)
        if option is None:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"cache {name!r} has no option {given!r}: {takes}{_near(given, known)}")
        if option.choices and value is not None and value not in option.choices:
            raise ValueError(
                f"{given} of cache {name!r} is {value!r}; use one of {', '.join(map(str, option.choices))}"
            )
    values = {option.name: options.get(option.name, option.default) for option in choice.options}
    _check_requirements(name, values)
    cache = choice.build(model_config, **values)
    arguments: dict[str, Any] = {"past_key_values": cache}
    if isinstance(cache, DecodingCache):
        arguments["custom_generate"] = specache_generate
    return cache, arguments


def _check_requirements(name: str, values: dict[str, Any]) -> None:
    if CACHES[name].requires == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"cache {name!r} needs a CUDA device, and torch sees none")
    package = {"hqq": "hqq", "quanto": "optimum.quanto"}.get(values.get("quantizer", ""))
    if package is not None and not _installed(package):
        raise ValueError(f"cache {name!r} needs the package {package.replace('.', '-')}, which is not installed")


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _near(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""
