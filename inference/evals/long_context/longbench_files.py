"""Reads LongBench's published files: rows, prompt templates and generation lengths, from a folder or a hub data set.

Layout: `SET.jsonl` (LongBench-E: `SET_e.jsonl`) in the folder, its `data` folder or `data.zip` (as published), and
`dataset2prompt.json` and `dataset2maxlen.json` in the folder or its `config` folder (as in the official repository).
Without these two, templates and lengths are those of the installed lm-eval.
"""

import functools
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# where the files lie below the folder that the user names: as unpacked, as published, as in the repository
_SUBFOLDERS = ("", "data", "LongBench/data", "LongBench", "config", "LongBench/config")
_ZIP = "data.zip"
_PROMPTS, _LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
HUB_DATASET = "THUDM/LongBench"
# the official templates have these spaces and line ends, which lm-eval's lack
_RESTORED = {
    "triviaqa": ("{context}\n{input}", "{context}\n\n{input}"),
    "samsum": ("{context}\n{input}", "{context}\n\n{input}"),
    "passage_count": (":", ": "),
    "passage_retrieval_en": (":", ": "),
    "lcc": (":", ":\n"),
    "repobench-p": (":", ":\n"),
}


@dataclass(frozen=True)
class Malformed:
    """A line that is not a row.

    Args:
        file: Its file.
        line: Its number, from 1.
        reason: What is wrong.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class SetRows:
    """The rows of one set.

    Args:
        rows: Mappings with `input`, `context`, `answers`, `length`, `all_classes` and `_id`.
        path: The file they come from; None from the hub.
        malformed: Lines that were left out.
    """

    rows: list[dict[str, Any]]
    path: Path | None
    malformed: list[Malformed] = field(default_factory=list)


@dataclass(frozen=True)
class Templates:
    """Prompt templates and generation lengths by set.

    Args:
        prompts: Templates with `{context}` and `{input}`.
        max_new_tokens: Generation lengths in tokens.
        origin: Where they come from, for the results.
    """

    prompts: Mapping[str, str]
    max_new_tokens: Mapping[str, int]
    origin: str

    def check(self, name: str) -> None:
        """Refuse a set that has no template or length.

        Raises:
            ValueError: It has none.
        """
        for what, known in (("prompt template", self.prompts), ("generation length", self.max_new_tokens)):
            if name not in known:
                raise ValueError(f"{self.origin} has no {what} for set {name!r}: it has {', '.join(sorted(known))}")


def is_published_folder(folder: Path) -> bool:
    """Whether a folder holds LongBench files in a published layout."""
    if any((folder / part / _ZIP).is_file() for part in _SUBFOLDERS):
        return True
    from .longbench_sets import SETS

    names = [f"{name}{ending}.jsonl" for name in SETS for ending in ("", "_e")]
    return any((folder / part / name).is_file() for part in _SUBFOLDERS for name in names)


def read_set(folder: Path, name: str, *, skip_malformed: bool = False) -> SetRows:
    """Read one set.

    Args:
        folder: Folder in a published layout.
        name: Name of the set; `SET_e` in LongBench-E.
        skip_malformed: Whether malformed lines are left out and counted; else they are refused.

    Raises:
        FileNotFoundError: The set's file is not there.
        ValueError: Lines are malformed, or no row is left.
    """
    path, member = _find(folder, f"{name}.jsonl")
    shown = f"{path}!{member}" if member else str(path)
    rows: list[dict[str, Any]] = []
    malformed: list[Malformed] = []
    for number, line in _lines(path, member):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, number))
        except ValueError as error:
            malformed.append(Malformed(shown, number, str(error)))
    if malformed and not skip_malformed:
        raise ValueError(
            f"{len(malformed)} malformed line{'s' if len(malformed) > 1 else ''} in {shown}: "
            f"{'; '.join(f'line {item.line}: {item.reason}' for item in malformed[:3])}"
            f"{', …' if len(malformed) > 3 else ''}; mend the file, or leave them out with --skip-malformed"
        )
    if not rows:
        raise ValueError(f"{shown} holds no rows")
    return SetRows(rows=rows, path=path, malformed=malformed)


def read_hub_set(name: str, *, dataset: str = HUB_DATASET) -> SetRows:
    """Read one set of a hub data set: out of its `data.zip`, or, for a mirror, as converted rows.

    Raises:
        FileNotFoundError: The hub cannot be reached or has no such data set.
        ValueError: A row lacks a column.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            archive = huggingface_hub.hf_hub_download(dataset, _ZIP, repo_type="dataset")
            return read_set(Path(archive).parent, name)
        # the second is also one of the first, but means that the hub is out of reach
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            table = datasets.load_dataset(dataset, name, split="test")
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        text = " ".join(str(error).split())[:200]
        raise FileNotFoundError(
            f"LongBench's set {name!r} is not within reach on the hub ({text}): give a local copy with --data-dir"
        ) from error
    return SetRows(rows=[_checked(dict(row), number) for number, row in enumerate(table, 1)], path=None)


def read_templates(folder: Path | None) -> Templates:
    """Templates and lengths of the folder, or, where it has none, of the installed lm-eval.

    Raises:
        FileNotFoundError: The folder has one of the two files only.
        ValueError: A file is not a mapping of the right kind.
    """
    found = {} if folder is None else {name: _existing(folder, name) for name in (_PROMPTS, _LENGTHS)}
    if folder is None or not any(found.values()):
        return lm_eval_templates()
    for name, path in found.items():
        if path is None:
            other = next(str(other) for other in found.values() if other)
            raise FileNotFoundError(f"{name} is missing beside {other}: copy it from the official repository's config")
    prompts = _read_mapping(found[_PROMPTS], str)
    lengths = _read_mapping(found[_LENGTHS], int)
    return Templates(prompts, lengths, origin=str(found[_PROMPTS]))


@functools.cache
def lm_eval_templates() -> Templates:
    """Templates and lengths of the installed lm-eval's LongBench tasks, with the official field names and white space.

    lm-eval trims six of them; a test compares digests of all 21 with those of the official file.
    """
    import importlib.metadata

    import lm_eval
    import yaml

    from .longbench_sets import SETS

    class Loader(yaml.SafeLoader):
        """Reads task files, functions by name only."""

    Loader.add_constructor("!function", lambda loader, node: None)
    folder = Path(str(lm_eval.__file__)).parent / "tasks" / "longbench"
    prompts, lengths = {}, {}
    for name in SETS:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            continue
        # the loader is a safe one
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
        text = config["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
        prompts[name] = _restored(name, text)
        lengths[name] = int(config["generation_kwargs"]["max_gen_toks"])
    return Templates(prompts, lengths, origin=f"lm_eval {importlib.metadata.version('lm_eval')}, white space restored")


def _restored(name: str, text: str) -> str:
    trimmed, official = _RESTORED.get(name, ("", ""))
    if not trimmed or text.endswith(official) or not text.endswith(trimmed):
        return text
    return text.removesuffix(trimmed) + official


def _existing(folder: Path, name: str) -> Path | None:
    return next((folder / part / name for part in _SUBFOLDERS if (folder / part / name).is_file()), None)


def _find(folder: Path, name: str) -> tuple[Path, str | None]:
    """The file, or the archive and its member."""
    if (path := _existing(folder, name)) is not None:
        return path, None
    archive = _existing(folder, _ZIP)
    if archive is not None:
        try:
            with zipfile.ZipFile(archive) as opened:
                members = [member for member in opened.namelist() if member.rpartition("/")[2] == name]
        except zipfile.BadZipFile as error:
            raise ValueError(f"{archive} is not a whole zip file: download it again") from error
        if members:
            return archive, min(members, key=len)
    where = f"{archive} or {folder}" if archive else f"{folder} or its folder data"
    raise FileNotFoundError(f"no {name} in {where}: get LongBench's data.zip and name the folder with --data-dir")


def _lines(path: Path, member: str | None) -> Iterator[tuple[int, str]]:
    if member is None:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            yield from enumerate(file, 1)
        return
    with zipfile.ZipFile(path) as archive, archive.open(member) as raw:
        yield from enumerate(io.TextIOWrapper(raw, encoding="utf-8", errors="surrogateescape"), 1)


def _row(line: str, number: int) -> dict[str, Any]:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not UTF-8") from None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1})") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    return _checked(row, number)


def _checked(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row with the fields that are used, under their official names.

    Raises:
        ValueError: A field is missing or of the wrong kind.
    """
    # a mirror calls the input question
    text = row.get("input", row.get("question"))
    for name, value in (("input", text), ("context", row.get("context"))):
        if not isinstance(value, str):
            raise ValueError(f"field {name!r} is {'missing' if value is None else 'not a string'}")
    answers = row.get("answers")
    if not _is_strings(answers) or not answers:
        raise ValueError("field 'answers' is not a list of strings with at least one")
    classes = row.get("all_classes")
    if classes is not None and not _is_strings(classes):
        raise ValueError("field 'all_classes' is neither null nor a list of strings")
    length = row.get("length")
    if isinstance(length, bool) or not isinstance(length, (int, float)):
        raise ValueError("field 'length' is not a number")
    return {
        "_id": str(row.get("_id", number)),
        "input": text,
        "context": row["context"],
        "answers": list(answers),
        "length": length,
        "all_classes": list(classes) if classes else [],
    }


def _is_strings(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, str) for item in value)


def _read_mapping(path: Path | None, kind: type) -> dict[str, Any]:
    try:
        value = json.loads(Path(str(path)).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict) or not all(type(item) is kind for item in value.values()):
        raise ValueError(f"{path} is not a JSON object with {'numbers' if kind is int else 'strings'} by set")
    return value
