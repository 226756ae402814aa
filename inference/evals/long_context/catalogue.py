"""Names of the long-context tasks, and how each is made once the tokenizer and the window are known.

lm-eval has tasks called `longbench…` and `ruler` of its own, so ours are `longbench_official…` and `ruler_local`. Two
short forms mean ours where nothing else can be meant: `longbench…` beside a data folder in the published layout, and
`ruler` beside lengths.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .longbench_files import SetRows, Templates, is_published_folder, read_hub_set, read_set, read_templates
from .longbench_sets import CATEGORIES, LOCAL_SETS, SETS, sets_of_e
from .options import LongContextOptions
from .prompts import PromptFitter, Wrap

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from transformers import PreTrainedTokenizerBase

    from .task import LongContextTask

OFFICIAL, V2, LOCAL, NEEDLE, RULER = "longbench_official", "longbench_v2", "longbench_local", "needle", "ruler_local"


@dataclass(frozen=True)
class Leaf:
    """A single task.

    Args:
        name: Its name.
        suite: Which family of tasks it is from.
        item: The set or family in the suite.
        in_e: Whether it is LongBench-E's form of the set.
    """

    name: str
    suite: str
    item: str
    in_e: bool = False


def _all_leaves() -> dict[str, Leaf]:
    from .ruler import family_names

    leaves = [
        *(Leaf(f"{OFFICIAL}_{name}", OFFICIAL, name) for name in SETS),
        *(Leaf(f"{OFFICIAL}_{item.name}_e", OFFICIAL, item.name, in_e=True) for item in sets_of_e()),
        Leaf(V2, V2, V2),
        *(Leaf(f"{LOCAL}_{name}", LOCAL, name) for name in LOCAL_SETS),
        Leaf(NEEDLE, NEEDLE, NEEDLE),
        *(Leaf(f"{RULER}_{name}", RULER, name) for name in family_names()),
    ]
    return {leaf.name: leaf for leaf in leaves}


def _all_groups(leaves: dict[str, Leaf]) -> dict[str, list[Leaf]]:
    def of(suite: str, *, in_e: bool = False) -> list[Leaf]:
        return [leaf for leaf in leaves.values() if leaf.suite == suite and leaf.in_e == in_e]

    return {
        OFFICIAL: of(OFFICIAL),
        f"{OFFICIAL}_e": of(OFFICIAL, in_e=True),
        **{
            f"{OFFICIAL}_{category}": [leaf for leaf in of(OFFICIAL) if SETS[leaf.item].category == category]
            for category in CATEGORIES
        },
        LOCAL: of(LOCAL),
        RULER: of(RULER),
    }


def long_context_task_names() -> list[str]:
    """Names of all long-context tasks and groups."""
    leaves = _all_leaves()
    return sorted({*leaves, *_all_groups(leaves)})


@dataclass(frozen=True)
class BuiltTasks:
    """Tasks ready for lm-eval.

    Args:
        objects: Tasks and groups, in the order asked for.
        tasks: All single tasks by name.
    """

    objects: "list[LongContextTask | Group]"
    tasks: "dict[str, LongContextTask]"


class LongContextPlan:
    """The long-context tasks among the names asked for, their files read.

    Args:
        groups: Leaves by the name asked for.
        others: Names that are not ours.
        options: Settings.
        sources: Rows of LongBench sets by task.
        templates: LongBench's prompt templates.
        v2_template: LongBench v2's.
    """

    def __init__(
        self,
        groups: dict[str, list[Leaf]],
        others: list[str],
        *,
        options: LongContextOptions,
        sources: dict[str, SetRows],
        templates: Templates | None,
        v2_template: str | None,
    ) -> None:
        self.groups, self.others, self.options = groups, others, options
        self._sources, self._templates, self._v2_template = sources, templates, v2_template

    def build(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        window: int,
        wrap: Wrap | None = None,
        transformers_lm: bool = True,
    ) -> BuiltTasks:
        """Make the tasks for a model.

        Args:
            tokenizer: The model's tokenizer.
            window: Longest input and output together, in tokens.
            wrap: Puts a prompt into the chat template; None without one.
            transformers_lm: Whether generation settings of transformers are understood.

        Raises:
            ValueError: A length passes the window, a template does not fit, or documents are missing.
        """
        from .task import make_group

        fitter = PromptFitter(tokenizer, window=window, prompt_tokens=self.options.prompt_tokens, wrap=wrap)
        builder = _Builder(self, fitter, transformers_lm=transformers_lm)
        tasks: dict[str, LongContextTask] = {}
        objects: list[LongContextTask | Group] = []
        for name, leaves in self.groups.items():
            for leaf in leaves:
                if leaf.name not in tasks:
                    tasks[leaf.name] = builder.make(leaf)
            made = [tasks[leaf.name] for leaf in leaves]
            objects.append(made[0] if [leaf.name for leaf in leaves] == [name] else make_group(name, made))
        return BuiltTasks(objects, tasks)


class _Builder:
    def __init__(self, plan: LongContextPlan, fitter: PromptFitter, *, transformers_lm: bool) -> None:
        from .haystack import Material
        from .local_tasks import LocalRows

        self._plan, self._fitter, self._transformers_lm = plan, fitter, transformers_lm
        self._local = LocalRows(plan.options, fitter)
        self._material = Material(plan.options.documents, seed=plan.options.seed)

    def make(self, leaf: Leaf) -> "LongContextTask":
        from .local_tasks import local_templates
        from .longbench import longbench_task, newline_settings
        from .longbench_v2 import longbench_v2_task
        from .needle import needle_task
        from .ruler import ruler_task

        plan, fitter = self._plan, self._fitter
        if leaf.suite == NEEDLE:
            return needle_task(fitter, plan.options)
        if leaf.suite == RULER:
            return ruler_task(leaf.name, leaf.item, fitter, plan.options, material=self._material)
        if leaf.suite == V2:
            return longbench_v2_task(plan._sources[leaf.name], str(plan._v2_template), name=leaf.name, fitter=fitter)
        local = leaf.suite == LOCAL
        templates = local_templates() if local else plan._templates
        assert templates is not None
        return longbench_task(
            (LOCAL_SETS if local else SETS)[leaf.item],
            self._local.rows(leaf.item) if local else plan._sources[leaf.name],
            name=leaf.name,
            suite=f"{OFFICIAL}_e" if leaf.in_e else leaf.suite,
            templates=templates,
            fitter=fitter,
            newline_generation=newline_settings(fitter.tokenizer, transformers_lm=self._transformers_lm),
        )


def plan_long_context(
    names: Sequence[str], *, options: LongContextOptions | None = None, data_dirs: Sequence[Path] = ()
) -> LongContextPlan:
    """Find the long-context tasks among names, and read what they need from disk.

    Args:
        names: Names of tasks and groups, ours and others', or patterns such as `needle*`.
        options: Settings; the default ones when None.
        data_dirs: Folders, one of which may hold LongBench.

    Raises:
        ValueError: A name begins like ours and is none of them, files are malformed, or a setting is out of its range.
        FileNotFoundError: A file of LongBench is missing.
    """
    options = options or LongContextOptions()
    options.check()
    leaves = _all_leaves()
    groups = {**{name: [leaf] for name, leaf in leaves.items()}, **_all_groups(leaves)}
    published = next((folder for folder in data_dirs if is_published_folder(folder)), None)
    asked: dict[str, list[Leaf]] = {}
    others = []
    for name in names:
        found = _names_like(_full_name(name, published=published, options=options), groups)
        asked.update({own: groups[own] for own in found})
        if not found:
            others.append(name)
    wanted = {leaf.name: leaf for members in asked.values() for leaf in members}
    sources: dict[str, SetRows] = {}
    templates, v2_template = None, None
    for leaf in wanted.values():
        if leaf.suite == OFFICIAL:
            file_name = f"{leaf.item}_e" if leaf.in_e else leaf.item
            templates = templates or read_templates(published)
            templates.check(leaf.item)
            sources[leaf.name] = _read_official(file_name, published, options, data_dirs)
        elif leaf.suite == V2:
            from .longbench_v2 import DATA_FILE, read_v2, read_v2_template

            if not data_dirs:
                raise ValueError(f"{V2} needs its data: name the folder of its {DATA_FILE} with --data-dir")
            folder = next((folder for folder in data_dirs if (folder / DATA_FILE).is_file()), data_dirs[0])
            sources[leaf.name] = read_v2(folder, skip_malformed=options.skip_malformed)
            v2_template = read_v2_template(folder)
    return LongContextPlan(
        asked, others, options=options, sources=sources, templates=templates, v2_template=v2_template
    )


def _read_official(
    name: str, published: Path | None, options: LongContextOptions, data_dirs: Sequence[Path]
) -> SetRows:
    if published is not None:
        return read_set(published, name, skip_malformed=options.skip_malformed)
    if data_dirs:
        raise FileNotFoundError(
            f"no LongBench files in {' or '.join(map(str, data_dirs))}: expected data.zip, or {name}.jsonl in the "
            "folder or its folder data"
        )
    return read_hub_set(name, dataset=options.hub_dataset)


def _full_name(name: str, *, published: Path | None, options: LongContextOptions) -> str:
    """The short forms written out."""
    if name == "ruler" and options.lengths is not None:
        return RULER
    short = re.fullmatch(r"longbench(_.*)?", name)
    if published is not None and short and not name.startswith((OFFICIAL, V2, LOCAL)):
        return f"{OFFICIAL}{short.group(1) or ''}"
    return name


def _names_like(name: str, groups: dict[str, list[Leaf]]) -> list[str]:
    if name in groups:
        return [name]
    if "*" in name:
        pattern = re.compile(".*".join(map(re.escape, name.split("*"))))
        return [own for own in groups if len(groups[own]) == 1 and pattern.fullmatch(own)]
    if name.startswith((f"{OFFICIAL}_", f"{V2}_", f"{LOCAL}_", f"{RULER}_", f"{NEEDLE}_")):
        nearest = difflib.get_close_matches(name, groups, n=3, cutoff=0.5)
        raise ValueError(
            f"unknown set {name!r}; nearest names: {', '.join(nearest) or ', '.join(sorted(groups))}; "
            "`tenfold evaluate --list-tasks` lists all"
        )
    return []
