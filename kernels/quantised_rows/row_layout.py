"""How one record of a lookup table is laid out in bytes, plain or quantised.

A record holds the values of one token id, layer after layer. A layer is its codes, then the scales of its blocks:

    codes   experts x width values in float, int8, or packed bits (NF4: two to a byte, the first in the low half; NF3:
            eight to three bytes, the first in the lowest bits)
    scales  one per block of consecutive values of the layer; the last block may be shorter
"""

import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from . import codes
from .code_books import CODE_BOOKS

Quantisation = Literal["none", "int8", "nf4", "nf3"]
QUANTISATIONS: tuple[Quantisation, ...] = get_args(Quantisation)
# values per scale: 768 and 128 are those of MoLE's paper (arXiv 2503.15798, table of quantised tables)
BLOCK_SIZES = {"none": 0, "int8": 128, "nf4": 768, "nf3": 128}
BITS = {"int8": 8, "nf4": 4, "nf3": 3}


@dataclass(frozen=True)
class RowLayout:
    """Sizes and offsets of a record, and the way from values to bytes and back.

    deviation: blocks begin anew in every layer, so that a layer is a range of bytes; the paper does not say. Where a
    layer is no multiple of the block (410M with NF4) this costs less than 0.02 % of the 16-bit size.

    Args:
        num_layers: L.
        num_experts: N.
        hidden_size: d.
        dtype: of the values when they are not quantised, as in `torch.<name>`; else `uint8`.
        quantisation: `none`, `int8`, `nf4` or `nf3`.
        block_size: values per scale.
        scale_dtype: `float16` or `float32`.

    Raises:
        ValueError: an unknown quantisation, or sizes that do not fill whole bytes.
    """

    num_layers: int
    num_experts: int
    hidden_size: int
    dtype: str
    quantisation: Quantisation = "none"
    block_size: int = 0
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.quantisation not in QUANTISATIONS:
            raise ValueError(f"quantisation {self.quantisation!r} is not one of {', '.join(QUANTISATIONS)}")
        if self.quantisation == "none":
            return
        if self.scale_dtype not in ("float16", "float32"):
            raise ValueError(f"scale_dtype {self.scale_dtype!r} is neither 'float16' nor 'float32'")
        if self.block_size < 1:
            raise ValueError(f"block_size {self.block_size} is below 1")
        unit = 16 // math.gcd(16, BITS[self.quantisation])
        if self.layer_values % unit:
            raise ValueError(
                f"{self.num_experts} experts of width {self.hidden_size} do not fill whole 16-bit words with "
                f"{self.quantisation}; their product must be a multiple of {unit}"
            )

    @classmethod
    def of(
        cls,
        shape: tuple[int, int, int],
        quantisation: Quantisation = "none",
        *,
        dtype: str = "bfloat16",
        block_size: int | None = None,
        scale_dtype: str = "float16",
    ) -> Self:
        """The layout for (layers, experts, width), with the paper's block size by default."""
        if quantisation == "none":
            return cls(*shape, dtype)
        block = BLOCK_SIZES.get(quantisation, 0) if block_size is None else block_size
        return cls(*shape, "uint8", quantisation, block, scale_dtype)

    @property
    def layer_values(self) -> int:
        """Values of one layer: experts times width."""
        return self.num_experts * self.hidden_size

    @property
    def num_blocks(self) -> int:
        """Scales of one layer."""
        return 0 if self.quantisation == "none" else -(-self.layer_values // self.block_size)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of one layer's codes, a multiple of the scales' size."""
        if self.quantisation == "none":
            return self.layer_values * getattr(torch, self.dtype).itemsize
        size = self.layer_values * BITS[self.quantisation] // 8
        return size + -size % getattr(torch, self.scale_dtype).itemsize

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of one layer."""
        return self.code_bytes + self.num_blocks * getattr(torch, self.scale_dtype).itemsize

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.num_layers * self.layer_bytes

    def metadata(self) -> dict[str, Any]:
        """What a file has to say so that it can be read."""
        fields = asdict(self)
        if self.quantisation == "none":
            return {"quantisation": "none"}
        names = ("quantisation", "block_size", "scale_dtype")
        return {name: fields[name] for name in names} | {"code_book": CODE_BOOKS[self.quantisation]}

    @classmethod
    def from_metadata(cls, shape: tuple[int, int, int], dtype: str, metadata: dict[str, Any]) -> Self:
        """The layout that a file states.

        Raises:
            ValueError: a quantisation or a code book that this release does not know.
        """
        quantisation = metadata.get("quantisation", "none")
        layout = cls.of(
            shape,
            quantisation,
            dtype=dtype,
            block_size=metadata.get("block_size"),
            scale_dtype=metadata.get("scale_dtype", "float16"),
        )
        known, found = CODE_BOOKS.get(quantisation), metadata.get("code_book")
        if found != known:
            raise ValueError(
                f"the codes are of the book {found!r}, this release reads {known!r}; export the table again"
            )
        return layout

    def encode(self, values: Tensor) -> Tensor:
        """Values (U, N, d) of one layer as (U, layer_bytes) bytes.

        Raises:
            ValueError: a block's largest value is outside the range of the scales.
        """
        flat = values.reshape(len(values), self.layer_values)
        if self.quantisation == "none":
            return flat.to(getattr(torch, self.dtype)).contiguous().view(torch.uint8)
        scales, scaled = codes.scale_blocks(flat.float(), self.block_size, getattr(torch, self.scale_dtype))
        packed = codes.pack(scaled, self.quantisation)
        padding = packed.new_zeros(len(values), self.code_bytes - packed.shape[1])
        return torch.cat([packed, padding, scales.view(torch.uint8)], dim=1)

    def decode(self, layer: Tensor) -> Tensor:
        """(U, layer_bytes) bytes of one layer as values (U, N, d): in float32 where quantised, else as stored.

        Bytes whose rows are contiguous and aligned are viewed, not copied, where nothing has to be computed.
        """
        shape = (len(layer), self.num_experts, self.hidden_size)
        if self.quantisation == "none":
            dtype = getattr(torch, self.dtype)
            if layer.stride(0) % dtype.itemsize or layer.storage_offset() % dtype.itemsize:
                layer = layer.contiguous()
            return layer.view(dtype).view(shape)
        levels = codes.unpack(layer[:, : self.code_bytes], self.layer_values, self.quantisation)
        return codes.apply_scales(levels, self.scales(layer), self.block_size).view(shape)

    def decode_record(self, records: Tensor) -> Tensor:
        """(U, record_bytes) bytes of whole records as values (U, L, N, d)."""
        layers = records.unflatten(1, (self.num_layers, self.layer_bytes))
        if self.quantisation != "none":
            # new rows, one per layer
            layers = layers.flatten(0, 1)
            return self.decode(layers).unflatten(0, (len(records), self.num_layers))
        dtype = getattr(torch, self.dtype)
        return layers.contiguous().view(dtype).unflatten(2, (self.num_experts, self.hidden_size))

    def scales(self, layer: Tensor) -> Tensor:
        """The scales (U, num_blocks) in (U, layer_bytes) bytes of one layer."""
        return layer[:, self.code_bytes :].contiguous().view(getattr(torch, self.scale_dtype))
