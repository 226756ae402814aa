"""Documents from local files or a hub data set, and their membership in a split."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Document = dict[str, str]
SUFFIXES = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")


def split_of(text: str, *, val_fraction: float, test_fraction: float, split_seed: int = 0) -> Split:
    """The split of a document: a hash of its text, so that equal texts never fall into two splits, in any order.

    Args:
        text: the document.
        val_fraction: share of documents for validation (0 to 1).
        test_fraction: share of documents for testing (0 to 1).
        split_seed: another seed gives another split.

    >>> split_of("a text", val_fraction=0.0, test_fraction=0.0)
    'train'
    """
    digest = hashlib.blake2b(f"{split_seed}\0{text}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError unless both shares leave something to train on."""
    for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is not a share from 0 up to 1; 0.02 holds out one document in fifty")
    if val_fraction + test_fraction >= 1:
        raise ValueError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on; lower them"
        )


def text_files(path: Path) -> list[Path]:
    """The readable files at a path, sorted: the file itself, or all of a folder and its sub-folders.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file of another kind, or a folder without any of ours.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise ValueError(
                f"{path} is not one of {', '.join(SUFFIXES)}; convert it, or rename it if it is plain text"
            )
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; name a text file, a folder, asset:NAME or a hub data set")
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def read_documents(files: list[Path], text_field: str) -> Iterator[Document]:
    """Documents with `title` (the file's name where there is none) and `text`; blank ones are left out.

    A text or Markdown file is one document. In the other formats a row is one, `text_field` its text.

    Raises:
        ValueError: a binary file, or a row that cannot be read; the message says where.
    """
    for file in files:
        if file.name.endswith((".txt", ".md")):
            rows: Iterator[Document] = iter([{"title": file.stem, "text": _decode(file.read_bytes(), file)}])
        elif file.suffix == ".parquet":
            rows = _parquet_rows(file, text_field)
        else:
            rows = _jsonl_rows(file, text_field)
        for row in rows:
            if row["text"].strip():
                yield row


def _decode(data: bytes, file: Path) -> str:
    if (offset := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} has a NUL byte at offset {offset}: it is not text; leave it out")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at offset {error.start}; convert it to UTF-8") from error


def _jsonl_rows(file: Path, text_field: str) -> Iterator[Document]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _row(_decode(line, file), f"{file}, line {number}", text_field)
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{file} cannot be unpacked: {error}; fetch it again") from error


def _row(line: str, where: str, text_field: str) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text under {text_field!r}, there is {fields}; set text_field")
    return {"title": str(row.get("title") or ""), "text": text}


def _parquet_rows(file: Path, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{file}: Parquet needs pyarrow; pip install 'tenfold[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a whole Parquet file: {error}") from error
    names = table.schema_arrow.names
    if text_field not in names:
        raise ValueError(f"{file}: no column {text_field!r}, there is {', '.join(names)}; set text_field")
    columns = [text_field, *(["title"] if "title" in names and text_field != "title" else [])]
    for batch in table.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield {"title": str(row.get("title") or ""), "text": row[text_field] or ""}


def hub_documents(name: str, *, config: str | None, split: str, revision: str | None, text_field: str) -> Any:
    """A hub data set, fetched once into the hub's own cache; its `fingerprint` names the content.

    Raises:
        ValueError: it cannot be had, or has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{name} is no local path, and hub data sets need: pip install 'tenfold[data]'") from error
    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is neither a local path nor a hub data set within reach: {reason}") from error
    if text_field not in data.column_names:
        raise ValueError(f"{name}: no column {text_field!r}, there is {', '.join(data.column_names)}; set text_field")
    return data


def files_digest(files: list[Path]) -> str:
    """SHA-256 over names and contents of files."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0")
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
