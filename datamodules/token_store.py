"""Token ids of a corpus, written once and memory-mapped: one part per split, with each token's length in bytes."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.tensor_file import TensorFile, TensorFileWriter

MAGIC = b"TF-TOKEN"
VERSION = 1
DOCUMENTS_PER_BATCH = 256


@dataclass(frozen=True)
class TokenSplit:
    """One split of a store.

    tokens: (S,) ids, an end-of-text token after each document; byte_lengths: (S,) uint8, UTF-8 bytes of each token, 0
    for the end of text; num_documents: how many there are.
    """

    tokens: Tensor
    byte_lengths: Tensor
    num_documents: int


def open_store(path: Path) -> dict[str, TokenSplit]:
    """Splits of a store by name.

    Raises:
        ValueError: truncated or altered.
    """
    file = TensorFile(path, magic=MAGIC, version=VERSION)
    return {
        name: TokenSplit(file.memory_map(f"{name}_tokens"), file.memory_map(f"{name}_byte_lengths"), count)
        for name, count in file.metadata["num_documents"].items()
    }


def write_store(path: Path, splits: Mapping[str, Iterable[str]], tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Tokenise documents and write them.

    The tokenizer works on many documents at once, on all cores. How many tokens there are is known only afterwards, so
    they go to a spool file beside the store first.

    Args:
        path: final name.
        splits: documents of each split.
        tokenizer: a fast transformers tokenizer with an end-of-text token.
        metadata: kept in the header.

    Raises:
        ValueError: no end-of-text token; an id outside the vocabulary; a slow tokenizer.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer names no eos_token, which has to end every document; set one in its configuration"
        )
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer is a slow one and gives no offsets; use its fast form")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the store keeps ids in int32, which memory-maps into torch without a copy
    spools = {name: path.with_name(f".{path.name}.{os.getpid()}.{name}.spool") for name in splits}
    sizes, counts = {}, {}
    try:
        for name, texts in splits.items():
            sizes[name], counts[name] = _spool(texts, tokenizer, spools[name])
        parts: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, size in sizes.items():
            parts |= {f"{name}_tokens": ("int32", (size,)), f"{name}_byte_lengths": ("uint8", (size,))}
        header = metadata | {"num_documents": counts}
        with TensorFileWriter(path, magic=MAGIC, version=VERSION, parts=parts, metadata=header) as writer:
            for name in splits:
                for column, dtype in (("tokens", np.int32), ("byte_lengths", np.uint8)):
                    for block in _blocks(spools[name].with_suffix(f".{column}"), dtype):
                        writer.write(f"{name}_{column}", block)
    finally:
        for spool in spools.values():
            for column in ("tokens", "byte_lengths"):
                spool.with_suffix(f".{column}").unlink(missing_ok=True)


def _spool(texts: Iterable[str], tokenizer: Any, spool: Path) -> tuple[int, int]:
    size = count = 0
    limit = len(tokenizer)
    with open(spool.with_suffix(".tokens"), "wb") as tokens, open(spool.with_suffix(".byte_lengths"), "wb") as lengths:
        for batch in batched(texts, DOCUMENTS_PER_BATCH):
            encoded = tokenizer(list(batch), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for text, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                row = np.array([*ids, tokenizer.eos_token_id], dtype=np.int32)
                if row.max() >= limit:
                    raise ValueError(f"the tokenizer gives id {row.max()}, it has only {limit} entries; it is damaged")
                row.tofile(tokens)
                np.array([*byte_lengths(text, offsets), 0], dtype=np.uint8).tofile(lengths)
                size += len(row)
                count += 1
    return size, count


def byte_lengths(text: str, offsets: list[tuple[int, int]]) -> Iterator[int]:
    """UTF-8 bytes that each token adds to the text, so that they sum to the text's.

    Offsets are in characters, and several tokens may share one character: the character's bytes count for the last of
    them. Characters that no token covers (white space that a tokenizer drops) count for the next token.
    Lengths above 255 are cut, which no vocabulary in use comes near.

    >>> list(byte_lengths("héllo", [(0, 2), (2, 5)]))
    [3, 3]
    """
    # bytes before each character position
    widths = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    before = np.concatenate(([0], np.cumsum(1 + (widths > 0x7F) + (widths > 0x7FF) + (widths > 0xFFFF))))
    done = 0
    for index, (_, end) in enumerate(offsets):
        following = offsets[index + 1][0] if index + 1 < len(offsets) else len(text)
        # a character that goes on in the next token is finished there
        reached = int(before[min(end, max(following, 0))]) if following < end else int(before[end])
        if index + 1 == len(offsets):
            reached = int(before[-1])
        yield min(max(reached - done, 0), 255)
        done = max(done, reached)


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of up to `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _blocks(path: Path, dtype: Any, count: int = 2**22) -> Iterator[Tensor]:
    with open(path, "rb") as file:
        while (block := np.fromfile(file, dtype=dtype, count=count)).size:
            yield torch.from_numpy(block)
