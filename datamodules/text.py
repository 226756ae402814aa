"""`TextDataModule`: text from anywhere to packed sequences of token ids, split by document, resumable."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from .assets import cache_dir, resolve
from .documents import SPLITS, Split, digest_of_files, list_files, read_documents, read_hub_rows, split_of
from .packing import PackedSequences, split_loader
from .token_store import TokenStore, write_token_store
from .tokenizer_folder import bpe_vocabulary, load_tokenizer, tokenizer_digest, train_bpe

# raised when tokenising or splitting changes, so that old stores are made again
_FORMAT = 1


class TextDataModule(LightningDataModule):
    """Packed sequences for next-token training.

    Text is tokenised once into a memory-mapped store, keyed by the digests of data and tokenizer. An end-of-text token
    follows each document; sequences run across documents. Batches: `input_ids` and `labels` (B, T) int64 (the model
    shifts; -100 at padding), `num_bytes` (B,) UTF-8 bytes of the predicted tokens.

    Training order depends on seed and epoch alone. A checkpoint inside an epoch continues with the next batch.

    Args:
        data: a text, Markdown, JSONL or Parquet file, a folder of them, `asset:NAME`, or a hub data set.
        tokenizer: a tokenizer folder, `asset:NAME`, a hub id, or `bpe:4096` to train a byte-level BPE with that many
            entries on the training split.
        sequence_length: tokens per sequence, T.
        batch_size: sequences per batch and process, B.
        eval_batch_size: the same for validation and test; `batch_size` by default.
        val_fraction: share of documents for validation (0 to 1).
        test_fraction: share of documents for testing (0 to 1).
        split_seed: another seed holds out other documents.
        seed: of the training order.
        num_workers: loader processes.
        num_proc: processes that tokenise; 0 uses the threads of the tokenizers library.
        text_field: field or column that holds the text.
        hub_config: configuration of a hub data set.
        hub_split: split of a hub data set that is read.
        hub_revision: revision of a hub data set.
        cache: folder for tokenizers and token stores; Tenfold's cache by default.

    Raises:
        ValueError: no text, binary text, a corpus shorter than one sequence, an empty held-out split, an unfit
            tokenizer; each when the data are prepared.
        FileNotFoundError: no such path.
    """

    def __init__(
        self,
        data: str = "asset:wikipedia-summaries",
        *,
        tokenizer: str,
        sequence_length: int = 1024,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.02,
        test_fraction: float = 0.02,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 0,
        num_proc: int = 0,
        text_field: str = "text",
        hub_config: str | None = None,
        hub_split: str = "train",
        hub_revision: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} {value} is not a share from 0 up to 1; 0.02 holds out one document in fifty")
        if val_fraction + test_fraction >= 1:
            raise ValueError(
                f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on; lower them"
            )
        if sequence_length < 2:
            raise ValueError(f"sequence_length {sequence_length} predicts nothing; use 2 or more")
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch_size {batch_size} and eval_batch_size {eval_batch_size} must be at least 1")
        self.data, self.tokenizer_source = data, tokenizer
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.fractions: dict[str, Any] = {
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "split_seed": split_seed,
        }
        self.seed, self.num_workers, self.text_field = seed, num_workers, text_field
        self.hub: dict[str, Any] = {"config": hub_config, "split": hub_split, "revision": hub_revision}
        self.num_proc, self.cache = num_proc, cache
        self.tokenizer: Any = None
        self.tokenizer_folder: str | None = None
        self.digest: str | None = None
        self._store: TokenStore | None = None
        self._path: Path | None = None
        self._hub: Any = None

    @property
    def vocab_size(self) -> int | None:
        """Entries of the tokenizer, added ones included; None before the data are prepared."""
        return None if self.tokenizer is None else len(self.tokenizer)

    def documents(self, split: Split | None = None) -> Iterator[dict[str, str]]:
        """Documents with `text` and, where the source has one, `title`; of one split or all, in the source's order."""
        for document in self._all_documents():
            if split is None or self._split(document) == split:
                yield document

    def _split(self, document: dict[str, str]) -> Split:
        return split_of(document["text"], **self.fractions)

    def _all_documents(self) -> Iterator[dict[str, str]]:
        self._locate()
        if self._path is None:
            yield from read_hub_rows(self._hub, self.data, text_field=self.text_field)
            return
        for file in list_files(self._path):
            yield from read_documents(file, text_field=self.text_field)

    def _locate(self) -> None:
        if self._path is not None or self._hub is not None:
            return
        path = Path(resolve(self.data)).expanduser()
        # a hub id is `name` or `owner/name`; anything else, and anything with a known ending, means a path
        looks_like_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.data) and not path.suffix
        if path.exists() or not looks_like_hub:
            list_files(path)
            self._path = path
        else:
            self._hub = _load_hub(self.data, self.hub)

    def _data_digest(self) -> str:
        self._locate()
        if self._path is None:
            return str(self._hub._fingerprint)
        return digest_of_files(list_files(self._path), self._path)

    def prepare_data(self) -> None:
        """Train the tokenizer and fill the store where they are missing. One process does it, the others wait."""
        self._open_tokenizer()
        path = self._store_path()
        with _locked(path):
            try:
                store = TokenStore(path, verify=True)
            except FileNotFoundError:
                store = None
            except ValueError as error:
                rank_zero_info(f"{error}; tokenising again")
                store = None
            if store is None:
                rank_zero_info(f"tokenising {self.data} into {path}")
                documents = ((self._split(document), document["text"]) for document in self._all_documents())
                metadata = {"data": self.data, "tokenizer": self.tokenizer_source}
                write_token_store(path, documents, tokenizer=self.tokenizer, metadata=metadata, num_proc=self.num_proc)
                store = TokenStore(path)
        self._check(store)

    def setup(self, stage: str) -> None:
        """Open the store."""
        if self._store is None:
            self._open_tokenizer()
            self._store = TokenStore(self._store_path())
            self._check(self._store)

    def _open_tokenizer(self) -> None:
        if self.tokenizer is None:
            self.tokenizer_folder = self._prepare_tokenizer()
            self.tokenizer = load_tokenizer(self.tokenizer_folder)

    def _cache_folder(self, kind: str) -> Path:
        return (Path(self.cache) if self.cache else cache_dir()) / kind

    def _prepare_tokenizer(self) -> str:
        size = bpe_vocabulary(self.tokenizer_source)
        if size is None:
            return resolve(self.tokenizer_source)
        key = _key(self._data_digest(), self.text_field, self.fractions, self.tokenizer_source, _FORMAT)
        folder = self._cache_folder("tokenizers") / key
        with _locked(folder):
            if not (folder / "tokenizer.json").exists():
                self._check_not_empty()
                rank_zero_info(f"training a byte-level BPE of {size} entries into {folder}")
                train_bpe((document["text"] for document in self.documents("train")), size, folder)
        return str(folder)

    def _check_not_empty(self) -> None:
        if next(self.documents("train"), None) is None:
            raise ValueError(f"{self.data} has no document with text to train on; every one is blank or held out")

    def _store_path(self) -> Path:
        tokenizer = tokenizer_digest(self.tokenizer)
        self.digest = _key(self._data_digest(), self.text_field, self.fractions, tokenizer, _FORMAT)
        return self._cache_folder("tokens") / f"{self.digest}.tenfold"

    def _check(self, store: TokenStore) -> None:
        if store.num_documents("train") == 0:
            self._check_not_empty()
        available = len(store.tokens("train"))
        if available < self.sequence_length:
            raise ValueError(
                f"the training split of {self.data} has {available} tokens, one sequence needs {self.sequence_length}; "
                f"lower sequence_length or add text"
            )
        for name in SPLITS[1:]:
            fraction = self.fractions[f"{name}_fraction"]
            if fraction > 0 and store.num_documents(name) == 0:
                raise ValueError(
                    f"no document of {self.data} falls into the {name} split with {name}_fraction {fraction}; "
                    f"raise it, split the text into more documents, or set it to 0"
                )

    def _loader(self, name: Split) -> DataLoader[Any] | list[Any]:
        train = name == "train"
        if not train and self.fractions[f"{name}_fraction"] == 0:
            return []
        pad_id = self.tokenizer.pad_token_id
        assert self._store is not None
        dataset = PackedSequences(
            self._store.tokens(name),
            self._store.byte_lengths,
            length=self.sequence_length,
            keep_partial=not train,
            pad_id=self.tokenizer.eos_token_id if pad_id is None else pad_id,
        )
        return split_loader(
            dataset,
            train=train,
            batch_size=self.batch_size if train else self.eval_batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            trainer=self.trainer,
            identity={"data": self.digest, "sequence_length": self.sequence_length, "seed": self.seed},
        )

    def train_dataloader(self) -> Any:
        """Shuffled sequences; state is saved in checkpoints."""
        return self._loader("train")

    def val_dataloader(self) -> Any:
        """Validation sequences in order."""
        return self._loader("val")

    def test_dataloader(self) -> Any:
        """Test sequences in order."""
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        """The same as for testing."""
        return self._loader("test")


def _load_hub(name: str, options: dict[str, Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} is no local path, and hub data sets need: pip install 'tenfold[data]'") from error
    try:
        return datasets.load_dataset(name, options["config"], split=options["split"], revision=options["revision"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is neither a local path nor a hub data set within reach: {reason}") from error


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Other processes that want the same file wait for this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(os.fspath(path.with_name(f"{path.name}.lock"))):
        yield
