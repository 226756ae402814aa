"""Tokens of a text data set on disk: written once in bounded memory, then memory-mapped by every process.

A store is a tensor file with one part of token ids per split (each document followed by the eos token) and the number
of text bytes that each vocabulary entry stands for.
"""

import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..kernels.tensor_file import TensorFile, TensorFileWriter
from .documents import SPLITS, Split
from .tokenizer_folder import token_byte_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAGIC = b"TFTOKENS"
VERSION = 1
_BATCH_DOCUMENTS = 512
_COPY_TOKENS = 2**22
_log = logging.getLogger(__name__)


class TokenStore:
    """Read access to a store.

    Args:
        path: the file.
        verify: read everything once and compare checksums.

    Raises:
        ValueError: the file is truncated, altered or of another version.
        FileNotFoundError: there is none.
    """

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        file = TensorFile(path, magic=MAGIC, version=VERSION)
        if verify:
            file.verify()
        self.path = path
        self.metadata: dict[str, Any] = file.metadata
        self._file = file
        self.byte_lengths: np.ndarray = file.read("byte_lengths").numpy()

    def tokens(self, split: Split) -> np.ndarray:
        """Token ids of a split as one read-only memory map: (tokens,) uint16 or uint32."""
        tokens = self._file.memory_map(split).numpy()
        tokens.flags.writeable = False
        return tokens

    def num_documents(self, split: Split) -> int:
        """Documents in a split."""
        return int(self.metadata["documents"][split])


def _batches(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _BATCH_DOCUMENTS)):
        yield batch


_worker_tokenizer: Any = None


def _start_worker(serialized: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    _worker_tokenizer = Tokenizer.from_str(serialized)
    _worker_tokenizer.encode_special_tokens = True


def _encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]


def _encode_in_worker(texts: list[str]) -> list[np.ndarray]:
    return _encode(_worker_tokenizer, texts)


def _encoded(
    documents: Iterable[tuple[Split, str]], serialized: str, num_proc: int
) -> Iterator[tuple[list[tuple[Split, str]], list[np.ndarray]]]:
    """Batches of documents with their ids, in order, few of them in memory at a time."""
    from tokenizers import Tokenizer

    if num_proc == 0:
        tokenizer = Tokenizer.from_str(serialized)
        # text that looks like a special token is text: documents cannot end themselves
        tokenizer.encode_special_tokens = True
        for batch in _batches(documents):
            yield batch, _encode(tokenizer, [text for _, text in batch])
        return
    pending: deque[tuple[list[tuple[Split, str]], Future[list[np.ndarray]]]] = deque()
    with ProcessPoolExecutor(
        num_proc, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(serialized,)
    ) as pool:
        for batch in _batches(documents):
            pending.append((batch, pool.submit(_encode_in_worker, [text for _, text in batch])))
            if len(pending) > 2 * num_proc:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()


def write_token_store(
    path: Path,
    documents: Iterable[tuple[Split, str]],
    *,
    tokenizer: "PreTrainedTokenizerFast",
    metadata: dict[str, Any],
    num_proc: int = 0,
) -> None:
    """Tokenise documents and write the store, whole or not at all.

    Args:
        path: final name.
        documents: split and text of each, in the order in which they are to be packed.
        tokenizer: has an eos token, which follows every document.
        metadata: goes into the header beside the counts.
        num_proc: processes that tokenise; 0 uses the threads of the tokenizers library in this one.

    Raises:
        ValueError: the tokenizer gives an id beyond its own size.
        OSError: the disk is full.
    """
    lengths = token_byte_lengths(tokenizer)
    dtype = np.dtype(np.uint16 if len(lengths) <= 2**16 else np.uint32)
    eos = np.asarray([tokenizer.eos_token_id], dtype=dtype)
    serialized = _without_run_time_settings(tokenizer)
    counts: dict[str, dict[str, int]] = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "tokens", "bytes")}
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = {split: path.with_name(f".{path.name}.{os.getpid()}.{split}.tmp") for split in SPLITS}
    started = reported = time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            files = {split: stack.enter_context(open(raw[split], "wb")) for split in SPLITS}
            for batch, encoded in _encoded(documents, serialized, num_proc):
                for (split, text), ids in zip(batch, encoded, strict=True):
                    if ids.size and ids.max() >= len(lengths):
                        raise ValueError(
                            f"the tokenizer gives id {ids.max()}, its vocabulary ends at {len(lengths) - 1}"
                        )
                    files[split].write(ids.astype(dtype).tobytes())
                    files[split].write(eos.tobytes())
                    counts["documents"][split] += 1
                    counts["tokens"][split] += ids.size + 1
                    counts["bytes"][split] += len(text.encode())
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    rate = sum(counts["tokens"].values()) / (reported - started)
                    _log.info("tokenising: %d documents, %.0f tokens/s", sum(counts["documents"].values()), rate)
        parts: dict[str, tuple[str, tuple[int, ...]]] = {"byte_lengths": ("int32", (len(lengths),))}
        parts |= {split: (dtype.name, (counts["tokens"][split],)) for split in SPLITS}
        with TensorFileWriter(
            path, magic=MAGIC, version=VERSION, parts=parts, metadata=metadata | counts | {"eos": int(eos[0])}
        ) as writer:
            writer.write("byte_lengths", lengths)
            for split in SPLITS:
                for piece in _pieces(raw[split], dtype):
                    writer.write(split, piece)
    finally:
        for file in raw.values():
            file.unlink(missing_ok=True)


def _without_run_time_settings(tokenizer: "PreTrainedTokenizerFast") -> str:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy.to_str()


def _pieces(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    with open(path, "rb") as file:
        while (piece := np.fromfile(file, dtype=dtype, count=_COPY_TOKENS)).size:
            yield piece
