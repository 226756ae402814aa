"""What a cache did and held, in plain numbers: for reports, results files and the command line."""

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .accounting import CacheShape
from .decoding_cache import DecodingCache

_PEAKS = ("device_bytes", "host_bytes", "full_cache_bytes")


def cache_facts(cache: Cache, config: PreTrainedConfig, dtype: torch.dtype, *, device: str) -> dict[str, Any]:
    """Numbers of one cache after one generation.

    Args:
        cache: One of ours or of transformers'.
        config: The model's configuration.
        dtype: Of the model.
        device: Type of the device that the model is on.

    Returns:
        `device_bytes` and `host_bytes` held at the end, `full_cache_bytes` that a plain cache with the same room would
        hold, and for ours the counters of `SpeCacheStatistics`. Hits are counts, so that facts can be added.
    """
    facts: dict[str, Any] = {"batches": 1, "device_bytes": tensor_bytes(cache, device)}
    if not isinstance(cache, DecodingCache):
        return facts
    statistics = cache.statistics
    return {
        "batches": 1,
        "device_bytes": cache.device_bytes,
        "host_bytes": cache.host_bytes,
        "full_cache_bytes": CacheShape.of(config, dtype).full_bytes(len(cache.lengths), cache.capacity),
        "forward_passes": statistics.forwards,
        "steps": statistics.steps,
        "pre_decodes": statistics.pre_decodes,
        "bytes_to_device": statistics.bytes_to_device,
        "bytes_to_host": statistics.bytes_to_host,
        "wait_seconds": statistics.exposed_wait_seconds,
        "speculated": statistics.speculated,
        "speculation_hits": round((statistics.speculation_hit_ratio or 0) * statistics.speculated),
        "wanted_rows": statistics.wanted_rows,
        "covered_rows": round((statistics.coverage_ratio or 0) * statistics.wanted_rows),
    }


def add_facts(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts of several generations as one: counts added, bytes held at their largest, hits also as ratios."""
    total: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name.endswith("_ratio"):
                continue
            total[name] = max(total.get(name, 0), value) if name in _PEAKS else total.get(name, 0) + value
    for hits, of, ratio in (
        ("speculation_hits", "speculated", "speculation_hit_ratio"),
        ("covered_rows", "wanted_rows", "coverage_ratio"),
    ):
        if total.get(of):
            total[ratio] = round(total[hits] / total[of], 6)
    return total


def facts_line(facts: dict[str, Any]) -> str:
    """Facts as one line of text."""
    text = f"{facts['device_bytes']:,} bytes on the device"
    if full := facts.get("full_cache_bytes"):
        text += f" ({facts['device_bytes'] / full:.3f} of a full cache)"
    if facts.get("host_bytes"):
        text += f", {facts['host_bytes']:,} on the host"
    if facts.get("bytes_to_device"):
        # the last pass fetches for a step that does not come; a pre-decode fetches for the first
        fetches = max(facts["steps"] + facts["pre_decodes"], 1)
        text += f", {facts['bytes_to_device']:,} fetched ({facts['bytes_to_device'] // fetches:,} at a time)"
    for ratio, what in (("speculation_hit_ratio", "guesses were right"), ("coverage_ratio", "wanted rows were there")):
        if ratio in facts:
            text += f", {100 * facts[ratio]:.1f} % of {what}"
    return text


def tensor_bytes(cache: Cache, device: str) -> int:
    """Bytes of all tensors on a device that can be reached from a cache's layers."""
    seen: dict[int, int] = {}
    stack: list[Any] = list(cache.layers)
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            # a quantised tensor of optimum-quanto is a wrapper around others
            inner = getattr(item, "__tensor_flatten__", None)
            if inner is not None and type(item) is not torch.Tensor:
                stack.extend(getattr(item, name) for name in inner()[0])
            elif item.device.type == device:
                seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
        elif type(item).__module__.startswith(("transformers", "optimum", "hqq")) and hasattr(item, "__dict__"):
            stack.extend(vars(item).values())
    return sum(seen.values())
