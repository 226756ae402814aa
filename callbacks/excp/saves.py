"""What a save is made of, for both directions: its header, payload and rest, and the reference that it leads to."""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .exact import tensor_bytes
from .report import SaveReport
from .tree import Path, replace, tensors_of
from .weights import CodedTensor

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Reference:
    """What the next save is coded against; the same bits where a save was written and where it is read.

    Attributes:
        weights: stored form of every weight, by its name in the state dict. Not to be changed in place.
        classes: coarse level of each element of the last residual, by name, uint8, shape (n,).
        squared_errors: of stored against true weights, by name.
        digest: names this state of the chain: SHA-256 of all weights' names, shapes, dtypes and checksums.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    classes: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    squared_errors: dict[str, float] = field(default_factory=dict)
    digest: str = ""

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        weights = sum(weight.numel() * weight.element_size() for weight in self.weights.values())
        return weights + sum(map(len, self.classes.values()))


@dataclass
class EncodedSave:
    """A save as it is stored.

    Attributes:
        header: what the parts are, plain data for JSON.
        payload: the parts.
        rest: the checkpoint without the coded tensors (None in their places).
        reference: for the next save; None on a save that was read from a file.
    """

    header: dict[str, Any]
    payload: bytes
    rest: Any
    reference: Reference | None = None

    @property
    def report(self) -> SaveReport:
        """Sizes and errors."""
        return SaveReport.from_dict(self.header["report"])

    @property
    def key_frame(self) -> bool:
        """Whether it can be decoded alone."""
        return self.header["base_digest"] is None

    @property
    def alias(self) -> bool:
        """Whether all its tensors are those of its base."""
        return "alias" in self.header

    @property
    def base_digest(self) -> str | None:
        """Digest of the reference that it is coded against; None for a key frame."""
        return self.header["base_digest"]

    @property
    def digest(self) -> str:
        """Digest of the reference that it leads to."""
        return self.header["digest"]


def follow(following: Reference, name: str, coded: CodedTensor) -> None:
    """Puts a coded weight into the reference for the next save."""
    following.weights[name] = coded.decoded
    following.squared_errors[name] = float(f"{coded.squared_error:.6g}")
    if coded.classes is not None:
        following.classes[name] = coded.classes


def checksum(tensor: Tensor) -> int:
    """CRC-32 of the bits."""
    return zlib.crc32(tensor_bytes(tensor))


def digest_of(entries: Iterable[tuple[str, str, list[int], int]]) -> str:
    """Names a set of weights by their names, dtypes, shapes and checksums."""
    return hashlib.sha256(json.dumps(sorted(entries), separators=(",", ":")).encode()).hexdigest()


def own_copy(tree: Any, without: set[Path]) -> Any:
    """The tree with its own copies of tensors, on the CPU; tensors that were one stay one."""
    copies: dict[Any, Tensor] = {}
    values: dict[Path, Tensor] = {}
    for path, tensor in tensors_of(tree):
        if path not in without:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else path
            if key not in copies:
                copies[key] = tensor.detach().cpu().clone()
            values[path] = copies[key]
    return replace(tree, values)


def run_all(function: Callable[[T], R], items: Iterable[T], workers: int) -> list[R]:
    """Results in the order of the items, from several threads."""
    if workers <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, items))
