"""Tokenizers for text data: loading, training byte-level BPE, digests, bytes per token."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .asset_files import remove_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"
MIN_BPE_VOCABULARY = 256 + 2
_log = logging.getLogger(__name__)


def bpe_vocabulary(tokenizer: str) -> int | None:
    """Vocabulary size that `bpe:SIZE` asks for, None for any other name.

    Raises:
        ValueError: SIZE is not a number, or too small for all bytes and the two special tokens.
    """
    if not tokenizer.startswith("bpe:"):
        return None
    try:
        size = int(tokenizer.removeprefix("bpe:"))
    except ValueError:
        raise ValueError(f"tokenizer {tokenizer!r}: bpe: takes a vocabulary size, such as bpe:4096") from None
    if size < MIN_BPE_VOCABULARY:
        raise ValueError(f"tokenizer {tokenizer!r}: the vocabulary needs at least {MIN_BPE_VOCABULARY} entries")
    return size


def load_tokenizer(folder: str) -> "PreTrainedTokenizerFast":
    """Load a fast tokenizer from a folder or the hub, without running any code that comes with it.

    Raises:
        ValueError: there is none, it is not a fast one, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no tokenizer can be loaded from {folder!r}: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer of {folder!r} is not a fast one; save it with tokenizer.json first")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {folder!r} has no eos token, which ends every document; set eos_token in its folder"
        )
    return tokenizer


def train_bpe(texts: Iterable[str], vocabulary_size: int, folder: Path) -> None:
    """Train byte-level BPE and save it as a transformers tokenizer folder, whole or not at all.

    `<|endoftext|>` (id 0) is end and beginning of sequence, `<|pad|>` (id 1) padding; both count as vocabulary.

    Args:
        texts: documents.
        vocabulary_size: entries; text too small or too regular gives fewer, which is said in the log.
        folder: where it goes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() < vocabulary_size:
        _log.warning("the text supports %d BPE entries, %d were asked for", tokenizer.get_vocab_size(), vocabulary_size)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    remove_folder(temporary)
    wrapped.save_pretrained(temporary)
    remove_folder(folder)
    os.replace(temporary, folder)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """SHA-256 of what decides how text becomes ids, as hexadecimal digits."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # run-time settings, not part of the mapping
    content.pop("truncation", None)
    content.pop("padding", None)
    content["eos"] = tokenizer.eos_token_id
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _byte_of_character() -> dict[str, int]:
    """Characters that byte-level BPE writes bytes as: printable ones as themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _component_types(part: Any) -> set[str]:
    if isinstance(part, dict):
        nested = (_component_types(value) for value in part.values())
        return ({part["type"]} if isinstance(part.get("type"), str) else set()).union(*nested)
    return set().union(*map(_component_types, part)) if isinstance(part, list) else set()


def token_byte_lengths(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """UTF-8 bytes of text that each token stands for.

    Exact for byte-level BPE (a token may hold part of a character) and for SentencePiece-like vocabularies with byte
    fallback, of the text after the tokenizer's own normalisation. Special tokens count 0: they are never made from
    text. Any other kind counts the bytes of its token strings, which is said in the log.

    Returns:
        (largest id + 1,) int32.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    decoder = _component_types(content.get("decoder"))
    byte_level = "ByteLevel" in decoder
    marked_space = bool(decoder & {"Metaspace", "Replace"})
    if not byte_level and not marked_space:
        _log.warning("decoder %s: bytes per token are those of the token strings", sorted(decoder) or "none")
    vocabulary = tokenizer.get_vocab()
    added = {entry["content"]: entry["special"] for entry in content.get("added_tokens", [])}
    characters = _byte_of_character()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        if added.get(token):
            continue
        if token in added:
            lengths[index] = len(token.encode())
        elif byte_level:
            # characters outside the alphabet can only come from a vocabulary edited by hand
            lengths[index] = sum(1 if c in characters else len(c.encode()) for c in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            lengths[index] = 1
        else:
            lengths[index] = len((token.replace("\u2581", " ") if marked_space else token).encode())
    return lengths
