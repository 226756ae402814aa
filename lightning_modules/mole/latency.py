"""The latency model of MoLE's paper: how many experts a step loads, and how long a link takes for that.

The paper (arXiv 2503.15798, section 4.4 and its figure) gives the numbers of loaded experts and computes loading times
at 16 GB/s; it does not measure them. Its six numbers are those of uniform random routing, which is what stands here.
"""


def loaded_experts(num_experts: int, batch_size: int, *, top_k: int = 2, resident: int = 2) -> float:
    """Mean number of experts that one layer loads in a step, for uniform random routing.

    Distinct experts that a batch needs, times the share of them that is not resident.

    >>> [round(loaded_experts(10, batch), 2) for batch in (1, 8, 32)]
    [1.6, 6.66, 7.99]
    """
    needed = num_experts * (1 - (1 - top_k / num_experts) ** batch_size)
    return needed * (1 - resident / num_experts)


def expert_bytes(hidden_size: int, width: int, *, value_bytes: int = 2) -> int:
    """Bytes of one ungated expert: two matrices."""
    return 2 * hidden_size * width * value_bytes


def row_bytes(num_layers: int, num_experts: int, hidden_size: int, *, value_bytes: int = 2) -> int:
    """Bytes of one token's row of a lookup table."""
    return num_layers * num_experts * hidden_size * value_bytes


def loading_ms(num_bytes: float, *, bytes_per_s: float = 16e9) -> float:
    """Milliseconds that a link of this bandwidth takes."""
    return num_bytes / bytes_per_s * 1e3
