"""Finds lm-eval tasks by name, before any model is loaded, and points them at local copies of their data.

A local copy of a stock task's data set is `DATA_DIR/TASK/SPLIT.EXT`: the rows of the published data set, one file (or
several, `SPLIT-00000-of-00002.EXT`) per split, as JSON lines, JSON, Parquet or CSV. The task itself, its prompts,
answers and metrics, stays lm-eval's own: its YAML is included and only the data source is replaced.
"""

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .digest import files_digest

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SHIPPED_FOLDER = Path(__file__).parent / "tasks"

# how a local file's ending names the loader of `datasets`
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class LocalData:
    """The local files that a task reads.

    Args:
        loader: Name of the `datasets` loader.
        splits: Files by split name.
        source: The YAML of the task that they are given to.
    """

    loader: str
    splits: dict[str, list[Path]]
    source: str

    @property
    def digest(self) -> str:
        """Digest of all files."""
        return files_digest(path for paths in self.splits.values() for path in paths)


@dataclass(frozen=True)
class TaskSelection:
    """Tasks ready to be scored.

    Args:
        manager: lm-eval's task manager that knows them.
        objects: The tasks and groups, in the order asked for.
        tasks: All single tasks by name, those inside groups included.
        local_data: Local files by task name, for the tasks that read some.
    """

    manager: "TaskManager"
    objects: "list[Task | Group]"
    tasks: "dict[str, Task]"
    local_data: dict[str, LocalData] = field(default_factory=dict)


def shipped_task_names() -> list[str]:
    """Names of the tasks that come with Tenfold."""
    return sorted(path.stem for path in SHIPPED_FOLDER.glob("*.yaml"))


def all_task_names(include_paths: Sequence[Path] = ()) -> list[str]:
    """Names of all tasks, groups and tags: stock ones, shipped ones and those of the given folders."""
    from .long_context.catalogue import long_context_task_names

    return sorted({*_make_manager(include_paths, stock=True).task_index, *long_context_task_names()})


@contextmanager
def select_tasks(
    names: Sequence[str],
    *,
    data_dirs: Sequence[Path] = (),
    shipped_data_dir: Path | None = None,
    include_paths: Sequence[Path] = (),
    num_fewshot: int | None = None,
    metadata: dict[str, Any] | None = None,
    allow_none: bool = False,
) -> Iterator[TaskSelection]:
    """Find tasks by name and load their data.

    Where `data_dirs` are given, every task asked for must lie in one of them (the first that has it is taken), except
    those of `include_paths`, whose YAML says where their data is. The index of all stock tasks, which takes several
    seconds to build, is built only when a stock task is asked for.

    Args:
        names: Names of tasks, groups or tags, or patterns such as `mmlu_*`.
        data_dirs: Folders with local copies of data sets.
        shipped_data_dir: Folder with data of the shipped tasks, looked at last and for these only.
        include_paths: Folders with further task files.
        num_fewshot: Examples in the prompt; the task's own number when None.
        metadata: Passed to tasks that make their data themselves.
        allow_none: Whether no name at all is right, because tasks of other origin follow.

    Yields:
        The tasks, while a temporary folder holds what `datasets` made of local files.

    Raises:
        ValueError: A name is unknown, data is missing, or a task cannot be loaded.
        FileNotFoundError: A folder does not exist.
    """
    for kind, folders in (("data", data_dirs), ("task", include_paths)):
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(f"{kind} folder {folder} does not exist")
    manager = _make_manager(include_paths, stock=False, metadata=metadata)
    if allow_none and not names:
        yield TaskSelection(manager=manager, objects=[], tasks={})
        return
    if not _is_closed(names, manager):
        manager = _make_manager(include_paths, stock=True, metadata=metadata)
    names = _expand(names, manager)
    with TemporaryDirectory(prefix="tenfold-tasks-") as scratch:
        local_data = {}
        for leaf in _leaves(names, manager):
            shipped = Path(str(manager.task_index[leaf].yaml_path)).parent == SHIPPED_FOLDER
            folders = [*data_dirs, shipped_data_dir] if shipped and shipped_data_dir else [*data_dirs]
            if shipped and not folders:
                raise ValueError(f"task {leaf!r} needs its data: give the folder that build_wikipedia_tasks wrote")
            if folders and (
                found := _use_local_data(leaf, manager, folders, include_paths, num_fewshot, Path(scratch))
            ):
                local_data[leaf] = found
        yield _load(names, manager, local_data)


def _make_manager(
    include_paths: Sequence[Path], *, stock: bool, metadata: dict[str, Any] | None = None
) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    folders: list[str | Path] = [SHIPPED_FOLDER, *include_paths]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if stock:
        for name, entry in _stock_index().items():
            manager.task_index.setdefault(name, entry)
    return manager


@functools.cache
def _stock_index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _is_closed(names: Iterable[str], manager: "TaskManager") -> bool:
    """Whether this index holds all that the names stand for."""
    try:
        _leaves(names, manager, strict=True)
    except KeyError:
        return False
    return True


def _expand(names: Iterable[str], manager: "TaskManager") -> list[str]:
    """Names with patterns resolved and repetitions dropped, in order."""
    known = sorted(manager.task_index)
    expanded: dict[str, None] = {}
    for name in names:
        if name in manager.task_index:
            expanded[name] = None
            continue
        matches = [other for other in known if _matches(other, name)]
        if not matches:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"nearest names: {', '.join(nearest)}; " if nearest else ""
            raise ValueError(f"unknown task {name!r}; {hint}`tenfold evaluate --list-tasks` lists all")
        expanded.update(dict.fromkeys(matches))
    if not expanded:
        raise ValueError("no task is asked for: give --tasks NAME[,NAME…]")
    return list(expanded)


def _matches(name: str, pattern: str) -> bool:
    return "*" in pattern and re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None


def _leaves(names: Iterable[str], manager: "TaskManager", *, strict: bool = False) -> list[str]:
    """The single tasks inside the given tasks, groups and tags.

    Raises:
        KeyError: A name is not in the index, and `strict` is on; a group may also define tasks in place.
    """
    leaves: dict[str, None] = {}

    def visit(member: "str | dict[str, Any]") -> None:
        # inside a group a member may be a name, a name with settings, or a group written in place
        inline = member.get("task") if isinstance(member, dict) and "group" in member else None
        name = member if isinstance(member, str) else member.get("group") or member.get("task")
        entry = manager.task_index.get(str(name))
        if entry is not None and entry.kind.name not in ("TAG", "GROUP"):
            leaves[entry.name] = None
            return
        tags = entry.tags if entry is not None and entry.kind.name == "TAG" else ()
        members = inline or sorted(tags) or ((entry.cfg or {}).get("task") if entry is not None else None)
        if members is None and strict:
            raise KeyError(name)
        for inner in [members] if isinstance(members, str) else members or ():
            visit(inner)

    for name in names:
        visit(name)
    return list(leaves)


def _use_local_data(
    name: str,
    manager: "TaskManager",
    data_dirs: Sequence[Path],
    include_paths: Sequence[Path],
    num_fewshot: int | None,
    scratch: Path,
) -> LocalData | None:
    """Replace the data source of a task by local files: a YAML that includes the task's own takes its place."""
    entry = manager.task_index[name]
    # the index holds each task's YAML with what it includes, functions still by name
    source, config = Path(str(entry.yaml_path)), entry.cfg or {}
    folder = next((base / name for base in data_dirs if (base / name).is_dir()), None)
    if folder is None:
        if any(source.resolve().is_relative_to(path.resolve()) for path in include_paths):
            return None
        wanted = f"{name}/{_scored_split(name, config)}.jsonl (or .json, .parquet, .csv)"
        raise ValueError(f"no data for task {name!r} in {' or '.join(map(str, data_dirs))}: expected {wanted}")
    found = _find_files(name, folder, str(source))
    scored = _scored_split(name, config)
    if scored not in found.splits:
        raise ValueError(
            f"{folder} has no {scored!r} split, which task {name!r} is scored on: "
            f"expected {scored}.jsonl (or .json, .parquet, .csv), found {', '.join(sorted(found.splits)) or 'nothing'}"
        )
    override = {
        "include": str(source),
        "custom_dataset": None,
        "dataset_path": found.loader,
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: [str(path) for path in paths] for split, paths in found.splits.items()},
            # what `datasets` makes of the files goes away with the run
            "cache_dir": str(scratch / "datasets"),
        },
        **_without_missing_splits(name, folder, config, found, num_fewshot),
    }
    # JSON is YAML; the folder per task keeps names that are not file names apart
    path = scratch / f"{len(list(scratch.glob('*.yaml')))}.yaml"
    path.write_text(json.dumps(override), encoding="utf-8")
    manager.task_index[name] = replace(entry, yaml_path=path)
    return found


def _scored_split(name: str, config: dict[str, Any]) -> str:
    split = config.get("test_split") or config.get("validation_split")
    if not split:
        raise ValueError(f"task {name!r} names no split to be scored on, so --data-dir cannot serve it")
    return split


def _find_files(name: str, folder: Path, source: str) -> LocalData:
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in _LOADERS and path.is_file():
            splits.setdefault(_SHARD.sub("", path.stem), []).append(path.resolve())
    loaders = {_LOADERS[path.suffix] for paths in splits.values() for path in paths}
    if len(loaders) > 1:
        raise ValueError(f"{folder} mixes file formats ({', '.join(sorted(loaders))}): keep one for task {name!r}")
    return LocalData(loader=loaders.pop() if loaders else "json", splits=splits, source=source)


def _without_missing_splits(
    name: str, folder: Path, config: dict[str, Any], found: LocalData, num_fewshot: int | None
) -> dict[str, None]:
    """Settings that take away splits which are not there, unless examples for the prompt come from them."""
    own_shots = config.get("num_fewshot")
    # lm-eval keeps a task at zero examples whose YAML says zero
    shots = own_shots if num_fewshot is None or own_shots == 0 else num_fewshot
    fewshot_config = config.get("fewshot_config") or {}
    fewshot = fewshot_config.get("split") or config.get("fewshot_split")
    if shots and not fewshot_config.get("samples"):
        wanted = fewshot or config.get("training_split") or config.get("validation_split") or config.get("test_split")
        if wanted not in found.splits:
            raise ValueError(
                f"task {name!r} puts {shots} examples into the prompt and takes them from split {wanted!r}: "
                f"add {folder / str(wanted)}.jsonl, or pass --num-fewshot 0"
            )
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    removed: dict[str, None] = {key: None for key in keys if config.get(key) and config[key] not in found.splits}
    if fewshot_config.get("split") and fewshot_config["split"] not in found.splits:
        removed["fewshot_config"] = None
    return removed


def _load(names: Sequence[str], manager: "TaskManager", local_data: dict[str, LocalData]) -> TaskSelection:
    objects: list[Any] = []
    tasks: dict[str, Any] = {}
    for name in names:
        try:
            loaded = manager.load([name])
        except ImportError as error:
            raise ValueError(f"task {name!r} needs a package that is not installed: {error}") from error
        except Exception as error:
            text = " ".join(str(error).split())[:240] or type(error).__name__
            if any(leaf in local_data for leaf in _leaves([name], manager)):
                raise ValueError(f"the local data of task {name!r} does not fit it: {text}") from error
            raise ValueError(
                f"the data of task {name!r} cannot be loaded ({text}): give a local copy with --data-dir"
            ) from error
        groups = loaded.get("groups", {})
        objects.extend([groups[name]] if name in groups else loaded["tasks"].values())
        tasks.update(loaded["tasks"])
    return TaskSelection(manager=manager, objects=objects, tasks=tasks, local_data=local_data)
