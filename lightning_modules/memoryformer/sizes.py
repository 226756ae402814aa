"""What a MemoryFormer takes: table values, bytes and multiply-adds in closed form, and whether memory holds them."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from ...kernels.hash_gather import num_tables

# float32 weights, gradients and two moments of Adam
TRAINING_BYTES = 16


class BlockSizes(NamedTuple):
    """One block: width d, bits per sub-vector of the first and of the last layer, and what follows from them.

    d: hidden_size; num_bits: tau; extra_bits: of the second feed-forward layer, tau' = tau + extra_bits.
    """

    d: int
    num_bits: int = 8
    extra_bits: int = 2

    @property
    def num_tables(self) -> int:
        """Sub-vectors of the block's input, K."""
        return num_tables(self.d, self.num_bits)

    @property
    def inner_width(self) -> int:
        """Width between the two feed-forward layers, (tau + extra_bits) K."""
        return (self.num_bits + self.extra_bits) * self.num_tables

    @property
    def attention_values(self) -> int:
        """Table values of query, key and value."""
        return table_values(self.d, 3 * self.d, self.num_bits)

    @property
    def feed_forward_values(self) -> int:
        """Table values of both feed-forward layers."""
        return table_values(self.d, self.inner_width, self.num_bits) + table_values(
            self.inner_width, self.d, self.num_bits + self.extra_bits
        )

    @property
    def table_values(self) -> int:
        """All table values: K (3 2^tau d + 2^tau (tau + 2) K + 2^(tau + 2) d), 264 d^2 for tau = 8."""
        return self.attention_values + self.feed_forward_values

    def multiply_adds(self, tokens: int) -> int:
        """Hash and gather of all layers, each hash counted: tokens (tau + h) K per layer."""
        tau, inner = self.num_bits, self.inner_width
        layers = [(tau, self.d)] * 3 + [(tau, inner), (tau + self.extra_bits, self.d)]
        return tokens * self.num_tables * sum(bits + width for bits, width in layers)

    def paper_multiply_adds(self, tokens: int) -> int:
        """The paper's rounded count, 6 K tokens d."""
        return 6 * self.num_tables * tokens * self.d

    def bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Table bytes that one token reads."""
        return self.num_tables * (4 * self.d + self.inner_width) * bytes_per_value


def table_values(in_features: int, out_features: int, num_bits: int) -> int:
    """Values of one memory layer's tables, K 2^tau h.

    >>> 2 * table_values(512, 512, 8)
    16777216
    """
    return (num_tables(in_features, num_bits) << num_bits) * out_features


def dense_multiply_adds(d: int, tokens: int) -> int:
    """The four attention projections and a feed-forward of 4 d: 12 tokens d^2."""
    return 12 * tokens * d * d


def attention_multiply_adds(d: int, tokens: int) -> int:
    """Scores and values over `tokens` positions: 2 tokens^2 d."""
    return 2 * tokens * tokens * d


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Memory that can still be taken on a device; None where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def check_memory(num_bytes: int, what: str, device: torch.device | str = "cpu") -> None:
    """Refuse what would end in an out-of-memory kill.

    Raises:
        ValueError: the device has fewer bytes left.
    """
    available = available_bytes(device)
    if available is not None and num_bytes > available:
        raise ValueError(
            f"{what} takes {num_bytes:,} bytes ({num_bytes / 1e9:.1f} GB), {device} has {available:,} left "
            f"({available / 1e9:.1f} GB); take a smaller preset, fewer bits (every bit halves the tables), or shard "
            f"with fsdp"
        )
