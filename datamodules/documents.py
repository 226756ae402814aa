"""Documents from local files, folders and hub data sets, and the rule that sends each to one split."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
EXTENSIONS = (".txt", ".md", ".jsonl", ".jsonl.gz", ".parquet")
SECTION_BYTES = 4096


def split_of(text: str, *, val_fraction: float, test_fraction: float, split_seed: int = 0) -> Split:
    """The split that a document belongs to, from its text alone.

    The same text is never in two splits, and adding, removing or reordering other documents moves none.

    Args:
        text: the document.
        val_fraction: expected share of documents held out for validation.
        test_fraction: expected share held out for testing.
        split_seed: another seed gives another, independent choice.

    >>> split_of("a document", val_fraction=0.0, test_fraction=0.0)
    'train'
    """
    digest = hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8, salt=split_seed.to_bytes(16, "little", signed=True)
    )
    place = int.from_bytes(digest.digest(), "little") / 2**64
    if place < test_fraction:
        return "test"
    return "val" if place < test_fraction + val_fraction else "train"


def list_files(data: Path) -> list[Path]:
    """Text files that a path stands for, in a stable order.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: the extension is not known, or a folder holds no file with a known one.
    """
    known = ", ".join(EXTENSIONS)
    if data.is_file():
        if not data.name.lower().endswith(EXTENSIONS):
            raise ValueError(f"{data}: the extension {data.suffix!r} is not one of {known}")
        return [data]
    if not data.is_dir():
        raise FileNotFoundError(
            f"{data} does not exist; give a file or folder with {known}, asset:NAME or a hub data set"
        )
    files = [path for path in sorted(data.rglob("*")) if path.is_file() and path.name.lower().endswith(EXTENSIONS)]
    files = [path for path in files if not any(p.startswith(".") for p in path.relative_to(data).parts)]
    if not files:
        raise ValueError(f"{data} holds no file with one of the extensions {known}")
    return files


def digest_of_files(files: list[Path], root: Path) -> str:
    """SHA-256 over the names (below `root`) and contents of files, as hexadecimal digits."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        # the extension decides how a file is read; names otherwise do not change documents, only their order
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def read_documents(path: Path, *, text_field: str = "text") -> Iterator[dict[str, str]]:
    """Documents of one file, each with `text` and, where the record has one, `title`.

    A `.txt` or `.md` file is one document; one of more than `SECTION_BYTES` is cut at blank lines into sections of at
    least that size, so that a single book has parts to hold out and a large file is never in memory as a whole.
    `.jsonl` and `.parquet` give one document per record. Documents of nothing but white space are left out.

    Raises:
        ValueError: not UTF-8, NUL bytes, a record without the field or with something else than a string in it.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        records = _read_parquet(path, text_field)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        records = _read_jsonl(path, text_field)
    else:
        records = ({"text": section} for section in _read_sections(path))
    for record in records:
        if record["text"].strip():
            yield record


def _lines(path: Path) -> Iterator[str]:
    source: Any = gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")  # noqa: SIM115
    offset = 0
    with source:
        try:
            for line in source:
                try:
                    text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path} is not UTF-8 text: byte {line[error.start]:#04x} at offset {offset + error.start}"
                    ) from error
                if "\0" in text:
                    raise ValueError(f"{path} is a binary file: NUL byte at offset {offset + line.index(0)}")
                offset += len(line)
                yield text
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def _read_sections(path: Path) -> Iterator[str]:
    section: list[str] = []
    size = 0
    for line in _lines(path):
        section.append(line)
        size += len(line.encode())
        # without blank lines in reach, any line end will do
        if (size >= SECTION_BYTES and not line.strip()) or size >= 16 * SECTION_BYTES:
            yield "".join(section)
            section, size = [], 0
    yield "".join(section)


def _record(row: dict[str, Any], text_field: str, where: str) -> dict[str, str]:
    text = row.get(text_field)
    if not isinstance(text, str):
        found = f"{type(text).__name__} in it" if text_field in row else f"only {', '.join(map(str, row)) or 'nothing'}"
        raise ValueError(f"{where}: no text in field {text_field!r}, {found}; set text_field")
    title = row.get("title")
    return {"title": title, "text": text} if isinstance(title, str) and text_field != "title" else {"text": text}


def _read_jsonl(path: Path, text_field: str) -> Iterator[dict[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: a {type(row).__name__} where an object with {text_field!r} is due"
            )
        yield _record(row, text_field, f"{path}, line {number}")


def _read_parquet(path: Path, text_field: str) -> Iterator[dict[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())}") from error
    with file:
        names = file.schema_arrow.names
        if text_field not in names:
            raise ValueError(f"{path}: no text in field {text_field!r}, only {', '.join(names)}; set text_field")
        columns = [name for name in (text_field, "title") if name in names]
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                row += 1
                yield _record(record, text_field, f"{path}, row {row}")


def read_hub_rows(dataset: Any, name: str, *, text_field: str) -> Iterator[dict[str, str]]:
    """Documents of a loaded hub data set; errors as in `read_documents`."""
    columns = [column for column in (text_field, "title") if column in dataset.column_names]
    if text_field not in columns:
        raise ValueError(
            f"{name}: no text in field {text_field!r}, only {', '.join(dataset.column_names)}; set text_field"
        )
    for row, record in enumerate(dataset.select_columns(columns), start=1):
        document = _record(record, text_field, f"{name}, row {row}")
        if document["text"].strip():
            yield document
