"""The caches that the studies compare, at equal device bytes for each number of bits."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from ...inference.specache import CacheShape, SpeCacheOptions, build_cache, equal_bytes_options


@dataclass(frozen=True)
class Method:
    """A cache with the options that a comparison gives it.

    Attributes:
        label: What it is called in results.
        cache: A name of `CACHES`.
        bits: The SpeCache whose device bytes it may take; 0 where its size is its own.
        options: Beside those that the budget gives.
    """

    label: str
    cache: str
    bits: int
    options: tuple[tuple[str, Any], ...] = ()

    def build(self, config: PreTrainedConfig, shape: CacheShape, ours: SpeCacheOptions, capacity: int) -> Cache:
        """A cache for prompts with room for `capacity` tokens.

        Raises:
            ValueError: A package is missing, or nothing fits.
        """
        options = dict(self.options)
        if self.bits:
            options |= equal_bytes_options(self.cache, shape=shape, options=ours, capacity_tokens=capacity)
        return build_cache(self.cache, config, **options)[0]


def methods() -> list[Method]:
    """Those of the study on real text: full, transformers' quantized, then ours and its rivals at 2 bits and at 1."""
    found = [
        Method("full", "full", 0),
        Method("quantized-2", "quantized", 0, (("quantizer", "hqq"), ("nbits", 2))),
    ]
    for bits in (2, 1):
        found += [
            Method(f"specache-{bits}", "specache", bits, (("measure", True),)),
            Method(f"kivi-{bits}", "kivi", bits),
            Method(f"window-{bits}", "window", bits),
            Method(f"h2o-{bits}", "h2o", bits),
        ]
    return found
