"""Caches of equal size: the options with which a cache takes no more device bytes than a SpeCache."""

from typing import Any, Literal

from .accounting import CacheShape
from .options import SpeCacheOptions

Sized = Literal["specache", "exact-fetch", "kivi", "window", "h2o"]


def equal_bytes_options(
    name: Sized, *, shape: CacheShape, options: SpeCacheOptions, capacity_tokens: int
) -> dict[str, Any]:
    """Options of a cache by name that takes as many bytes on the device as a SpeCache, or just less.

    Everything counts: codes, scales and zeros, the residual, exact rows and their indices, scores. KIVI gets a longer
    residual for the rows that it does not fetch, as in the SpeCache paper; the others get as many tokens as fit.

    Args:
        name: The cache.
        shape: The model's sizes.
        options: The SpeCache to compare with.
        capacity_tokens: Tokens per sequence that there is room for.

    Raises:
        ValueError: The name is another one, or not even one group or token fits.

    Examples:
        >>> shape = CacheShape(num_layers=30, num_heads=3, head_dim=64, itemsize=2)
        >>> equal_bytes_options("window", shape=shape, options=SpeCacheOptions(), capacity_tokens=4096)
        {'budget': 764}
    """
    wanted = shape.device_bytes(options, 1, capacity_tokens)
    kind: dict[str, Any] = {"bits": options.bits, "group_size": options.group_size}
    if name in ("specache", "exact-fetch"):
        return {**kind, "top_k": options.top_k, "residual_length": options.residual_length}
    if name == "kivi":
        longest = 0
        for length in range(options.group_size, capacity_tokens + options.group_size, options.group_size):
            kivi = SpeCacheOptions(**kind, residual_length=length, mode="low_bit_only")
            # not monotone: keys leave the residual in whole blocks
            if shape.device_bytes(kivi, 1, capacity_tokens) <= wanted:
                longest = length
        if not longest:
            raise ValueError(f"{wanted} bytes hold not one group of {options.group_size} tokens of cache 'kivi'")
        return {**kind, "residual_length": longest}
    if name in ("window", "h2o"):
        scored = name == "h2o"
        budget = wanted // shape.held_bytes(1, 1, scored=scored)
        if budget < 1:
            raise ValueError(f"{wanted} bytes hold not one token of cache {name!r}")
        return {"budget": min(budget, capacity_tokens)}
    raise ValueError(f"the bytes of cache {name!r} have no formula: use specache, exact-fetch, kivi, window or h2o")
