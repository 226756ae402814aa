"""The packed tensor: codes in bytes, one scale and one zero per group, and what it costs."""

from dataclasses import dataclass
from typing import Literal

import torch

Per = Literal["channel", "token"]
Rule = Literal["kivi", "centred"]
BITS = (1, 2, 4)


@dataclass(frozen=True)
class LowBit:
    """Keys or values (B, N, T, D) in `bits` bits, `x ≈ code * scale + zero`.

    Channel c = j * P + i of a token lies in bits [j * bits, (j + 1) * bits) of its byte i, where P is the number of
    bytes per token: the j-th plane of all bytes holds P neighbouring channels, and unpacking needs no interleaving.

    Attributes:
        codes: (B, N, T, P) uint8, `P = ceil(D * bits / 8)`.
        scale: (B, N, ceil(T / group_tokens), ceil(D / group_channels)) in the dtype of what was packed.
        zero: The same shape and dtype.
        bits: Bits per code.
        num_channels: D.
        group_tokens: Neighbouring tokens that share a scale: the group size for keys, 1 for values.
        group_channels: Neighbouring channels that share a scale: 1 for keys, the group size for values.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    bits: int
    num_channels: int
    group_tokens: int
    group_channels: int

    @classmethod
    def empty(
        cls,
        batch: int,
        num_heads: int,
        num_tokens: int,
        num_channels: int,
        *,
        bits: int,
        group_size: int,
        per: Per,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "LowBit":
        """Storage for `num_tokens` tokens, filled with zeros.

        Raises:
            ValueError: As in `pack`.
        """
        group_tokens, group_channels = group_shape(per, group_size)
        num_bytes = bytes_per_token(num_channels, bits)
        groups = (-(-num_tokens // group_tokens), -(-num_channels // group_channels))
        return cls(
            torch.zeros(batch, num_heads, num_tokens, num_bytes, dtype=torch.uint8, device=device),
            torch.zeros(batch, num_heads, *groups, dtype=dtype, device=device),
            torch.zeros(batch, num_heads, *groups, dtype=dtype, device=device),
            bits,
            num_channels,
            group_tokens,
            group_channels,
        )

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros together."""
        return self.codes.nbytes + self.scale.nbytes + self.zero.nbytes

    def first(self, num_tokens: int) -> "LowBit":
        """A view of the first tokens."""
        groups = -(-num_tokens // self.group_tokens)
        return LowBit(
            self.codes[:, :, :num_tokens],
            self.scale[:, :, :groups],
            self.zero[:, :, :groups],
            self.bits,
            self.num_channels,
            self.group_tokens,
            self.group_channels,
        )

    def write(self, packed: "LowBit", sequences: "list[int] | slice", token: int) -> None:
        """Store packed tokens of some sequences of the batch from slot `token` on, which begins a group."""
        assert token % self.group_tokens == 0, f"slot {token} is inside a group of {self.group_tokens} tokens"
        group = token // self.group_tokens
        self.codes[sequences, :, token : token + packed.num_tokens] = packed.codes
        self.scale[sequences, :, group : group + packed.scale.shape[2]] = packed.scale
        self.zero[sequences, :, group : group + packed.zero.shape[2]] = packed.zero


def group_shape(per: Per, group_size: int) -> tuple[int, int]:
    """Tokens and channels of one group.

    Raises:
        ValueError: `per` or `group_size` is not a valid choice.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; it must be at least 1, published settings are 32 and 64")
    if per not in ("channel", "token"):
        raise ValueError(f"per is {per!r}; use 'channel' (keys) or 'token' (values)")
    return (group_size, 1) if per == "channel" else (1, group_size)


def bytes_per_token(num_channels: int, bits: int) -> int:
    """Bytes that the codes of one token and head take.

    Raises:
        ValueError: `bits` is none of 1, 2, 4.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}; codes of 1, 2 and 4 bits can be packed")
    return -(-num_channels * bits // 8)


def packed_bytes(num_tokens: int, num_channels: int, *, bits: int, group_size: int, per: Per, itemsize: int) -> int:
    """Bytes per sequence and head that `pack` makes of `num_tokens` tokens: codes, scales and zeros.

    >>> packed_bytes(128, 64, bits=2, group_size=64, per="channel", itemsize=2)
    2560
    """
    group_tokens, group_channels = group_shape(per, group_size)
    groups = -(-num_tokens // group_tokens) * -(-num_channels // group_channels)
    return num_tokens * bytes_per_token(num_channels, bits) + 2 * itemsize * groups


def default_rule(bits: int) -> Rule:
    """The paper's choice: its own levels at 1 bit, KIVI's otherwise."""
    return "centred" if bits == 1 else "kivi"
