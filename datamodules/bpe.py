"""A byte-level BPE tokenizer trained on a corpus, as a transformers tokenizer folder."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SMALLEST = 257


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train and save; `END` is beginning, end and padding. The folder appears whole or not at all.

    Args:
        texts: training documents.
        vocab_size: entries, 256 bytes and `END` among them.
        folder: where it goes.

    Raises:
        ValueError: fewer entries than bytes and `END`.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"bpe:{vocab_size} is below {SMALLEST}, the 256 bytes and the end of text; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    wrapped.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
