"""Full-precision keys and values in host memory: sized up front, refused before anything is computed."""

import weakref
from pathlib import Path

import torch

# what stays free for everything else where no limit is given
_SHARE_OF_AVAILABLE = 0.9


def available_host_bytes() -> int | None:
    """Memory that can still be taken without swapping, or None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def check_host_memory(num_bytes: int, limit_bytes: int | None, what: str) -> None:
    """Refuse a host store that does not fit.

    Raises:
        ValueError: It is larger than the limit, or than 90 % of what the system has available.
    """
    if limit_bytes is not None:
        if num_bytes > limit_bytes:
            raise ValueError(
                f"{what} needs {num_bytes} bytes of host memory, host_limit_bytes is {limit_bytes}: "
                "raise it, or use a smaller batch or fewer tokens"
            )
        return
    available = available_host_bytes()
    if available is not None and num_bytes > _SHARE_OF_AVAILABLE * available:
        raise ValueError(
            f"{what} needs {num_bytes} bytes of host memory, {available} are available: "
            "use a smaller batch or fewer tokens, or set host_limit_bytes if you know better"
        )


class HostRows:
    """One layer's keys and values on the host, interleaved: a token's key and value of a head are one run of memory.

    Args:
        batch: Sequences.
        capacity: Tokens per sequence.
        num_heads: Key/value heads.
        head_dim: Channels per head.
        dtype: The model's dtype.
        pinned: Lock the pages, so that copies to and from a GPU run beside computation.
    """

    def __init__(
        self, batch: int, capacity: int, num_heads: int, head_dim: int, *, dtype: torch.dtype, pinned: bool
    ) -> None:
        # (B, capacity, N, 2, D)
        self.rows = torch.empty(batch, capacity, num_heads, 2, head_dim, dtype=dtype)
        if pinned and self.rows.numel():
            _pin(self.rows)
            # runs before the memory itself is given back
            weakref.finalize(self, _unpin, self.rows.data_ptr())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rows.nbytes

    def grown(self, capacity: int, used: int, *, pinned: bool) -> "HostRows":
        """A larger store with the first `used` tokens copied."""
        batch, _, num_heads, _, head_dim = self.rows.shape
        larger = HostRows(batch, capacity, num_heads, head_dim, dtype=self.rows.dtype, pinned=pinned)
        larger.rows[:, :used] = self.rows[:, :used]
        return larger

    def append(self, row: torch.Tensor, slots: list[int]) -> None:
        """Store one token per sequence, (B, N, 2, D), at each sequence's own slot."""
        if len(set(slots)) == 1:
            self.rows[:, slots[0]] = row
        else:
            self.rows[torch.arange(len(slots)), torch.tensor(slots)] = row

    def gather(self, indices: torch.Tensor, out: torch.Tensor) -> None:
        """Copy rows (B, N, K) into `out` (B, N, K, 2, D); a negative index copies some row."""
        batch, capacity, num_heads, _, head_dim = self.rows.shape
        heads = torch.arange(num_heads).view(1, -1, 1)
        first = torch.arange(batch).view(-1, 1, 1) * capacity
        places = (first + indices.clamp_min(0)) * num_heads + heads
        torch.index_select(
            self.rows.view(-1, 2 * head_dim), 0, places.reshape(-1), out=out.view(places.numel(), 2 * head_dim)
        )


def _pin(tensor: torch.Tensor) -> None:
    """Lock the pages of a tensor. torch's own pinned allocator rounds sizes up to a power of two, up to twice as much.

    Raises:
        ValueError: The system refuses to lock that much.
    """
    runtime = torch.cuda.cudart()
    num_bytes = tensor.nbytes
    status = int(runtime.cudaHostRegister(tensor.data_ptr(), num_bytes, 0))
    if status != 0:
        raise ValueError(
            f"{num_bytes} bytes of host memory could not be page-locked (CUDA error {status}): "
            "use a smaller batch or fewer tokens, or raise the limit of locked memory"
        )


def _unpin(address: int) -> None:
    if torch.cuda.is_available():
        torch.cuda.cudart().cudaHostUnregister(address)
