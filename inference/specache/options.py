"""The settings of the method, checked once."""

from dataclasses import dataclass
from typing import Literal

from ...kernels.low_bit_kv import Backend, Rule
from ...kernels.low_bit_kv.low_bit import BITS

Mode = Literal["speculative", "exact_fetch", "low_bit_only"]


@dataclass(frozen=True, kw_only=True)
class SpeCacheOptions:
    """Settings of a SpeCache.

    Args:
        bits: Bits of the device copy: 1, 2 or 4. The paper reports 1 and 2.
        top_k: Exact rows held per sequence, layer and key/value head (the paper's 64). Fewer are held where fewer
            tokens are candidates.
        residual_length: The most recent tokens that stay in full precision on the device, as in KIVI (the paper's 64).
            Keys leave it as a block when it is full, values one by one.
        group_size: Values that share a scale: tokens for keys, channels for values (the paper's 32 or 64). Must divide
            `residual_length`. Where it does not divide the head size, the last group of channels is shorter.
        rule: Quantiser levels; None for the paper's choice: `centred` at 1 bit, else `kivi`.
        mode: `speculative` is the method. `exact_fetch` selects with the token's own query and waits for its rows
            (the paper's non-speculative control). `low_bit_only` fetches nothing (KIVI).
        select_residual: Let tokens of the residual, which are exact already, win places among the `top_k`.
            deviation: the paper is silent; the public re-implementation lets them.
        speculation: How the speculative token is drawn: by the `same` rule as the output (the paper), or always
            `greedy`. With greedy decoding the two agree.
        speculation_seed: Seed of the generator that draws speculative tokens. It is separate, so that a seeded run
            draws its output tokens from the same numbers as without SpeCache.
        attention: `packed` reads the packed copy directly. `dense` unpacks one layer at a time and calls the
            library's attention: slower, and with every row exact it equals plain attention bit for bit.
        prefetch: `async` fetches in a worker thread (and on its own stream on CUDA), `sync` at once in the calling
            thread; None for `async` on CUDA and `sync` elsewhere.
        host_limit_bytes: The most memory the host store may take; None for what the system reports as available.
        measure: Also count how many of each token's own top-k rows were there, and time the waits. Costs a little.
        backend: Kernel backend; None for the device's own.

    Raises:
        ValueError: A setting is out of range, or two do not fit together.
    """

    bits: int = 2
    top_k: int = 64
    residual_length: int = 64
    group_size: int = 64
    rule: Rule | None = None
    mode: Mode = "speculative"
    select_residual: bool = False
    speculation: Literal["same", "greedy"] = "same"
    speculation_seed: int = 0
    attention: Literal["packed", "dense"] = "packed"
    prefetch: Literal["async", "sync"] | None = None
    host_limit_bytes: int | None = None
    measure: bool = False
    backend: Backend | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}; the device copy can have 1, 2 or 4 bits")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 or more")
        if self.group_size < 1:
            raise ValueError(
                f"group_size is {self.group_size}; it must be at least 1, published settings are 32 and 64"
            )
        if self.residual_length < self.group_size or self.residual_length % self.group_size:
            raise ValueError(
                f"residual_length {self.residual_length} is not a positive multiple of group_size {self.group_size}: "
                "keys leave the residual in whole groups"
            )
        choices = {
            "rule": (None, "kivi", "centred"),
            "mode": ("speculative", "exact_fetch", "low_bit_only"),
            "speculation": ("same", "greedy"),
            "attention": ("packed", "dense"),
            "prefetch": (None, "async", "sync"),
            "backend": (None, "triton", "cpu", "reference"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                named = ", ".join(repr(choice) for choice in allowed if choice is not None)
                raise ValueError(f"{name} is {value!r}; use one of {named}")
        if self.host_limit_bytes is not None and self.host_limit_bytes < 0:
            raise ValueError(f"host_limit_bytes is {self.host_limit_bytes}; it must be 0 or more")

    @property
    def num_fetched(self) -> int:
        """Exact rows held per sequence and head: `top_k`, but 0 where nothing is fetched."""
        return 0 if self.mode == "low_bit_only" else self.top_k
