"""Where a run lives: one folder per run, never shared with an earlier one, found again to continue."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
_CHILD_VARIABLE = "TENFOLD_RUN_FOLDER"


@dataclass(kw_only=True)
class RunOptions:
    """Names of a run, and who hears of it.

    A run's folder is `ROOT/EXPERIMENT/NAME`; when that holds a run already, a new one goes to `NAME-2`, and so on.

    Args:
        experiment: group of runs; the folder of the last `--config` file when left out.
        name: the run; the name of the last `--config` file when left out.
        root: folder of all runs.
        wandb: whether Weights & Biases gets the metrics: not at all, into local files, or online.
        wandb_project: project there.
        hyper_parameters: whose model options win when `--ckpt_path` is given: the checkpoint's (each option that
            changes is announced), or those of the configuration.
    """

    experiment: str | None = None
    name: str | None = None
    root: str = "runs"
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "tenfold"
    hyper_parameters: Literal["checkpoint", "config"] = "checkpoint"


def named(options: RunOptions, config_path: Path | None) -> RunOptions:
    """Fills in the names that were left out.

    Args:
        options: the options as given.
        config_path: the last configuration file, if any.

    Returns:
        Options with both names set.

    Raises:
        ValueError: a name is not one plain folder name.
    """
    experiment = options.experiment or (config_path.resolve().parent.name if config_path else "default")
    name = options.name or (config_path.stem if config_path else "run")
    for key, value in (("experiment", experiment), ("name", name)):
        if not re.fullmatch(r"[\w+=,][\w.+=,-]*", value):
            raise ValueError(
                f"--run.{key} is {value!r}; a folder name of letters, digits and . _ - + = , is needed"
                " (--run.root sets the folder around it)"
            )
    return RunOptions(**{**vars(options), "experiment": experiment, "name": name})


class RunFolder:
    """The folder of one run among those of the same name.

    Args:
        options: options with both names set.
    """

    def __init__(self, options: RunOptions) -> None:
        assert options.experiment is not None
        assert options.name is not None
        self.base = Path(options.root, options.experiment, options.name)

    def existing(self) -> list[Path]:
        """Folders of earlier runs of this name, in the order of their numbers."""
        numbered = re.compile(re.escape(self.base.name) + r"(?:-(\d+))?")
        found = []
        for path in self.base.parent.glob(f"{glob.escape(self.base.name)}*"):
            match = numbered.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1] or 1), path))
        return [path for _, path in sorted(found)]

    def newest_last(self) -> Path | None:
        """The youngest `last.ckpt` of this name, or None."""
        files = [path / CHECKPOINTS / LAST for path in self.existing()]
        return max((f for f in files if f.exists()), key=lambda f: f.stat().st_mtime_ns, default=None)

    def of_checkpoint(self, checkpoint: Path) -> Path | None:
        """The run of this name that a checkpoint belongs to, or None."""
        folder = checkpoint.resolve().parent.parent
        return next((path for path in self.existing() if path.resolve() == folder), None)

    def fresh(self, *, create: bool) -> Path:
        """A folder that no run has used.

        Args:
            create: make it now, so that nobody else takes it. Only the first process of a run does.
        """
        # processes that Lightning starts for a run on several devices take their parent's folder
        if os.environ.get("LOCAL_RANK", "0") != "0" and _CHILD_VARIABLE in os.environ:
            return Path(os.environ[_CHILD_VARIABLE])
        number = 1
        while True:
            path = self.base if number == 1 else self.base.with_name(f"{self.base.name}-{number}")
            number += 1
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                continue
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    path.mkdir()
                except FileExistsError:
                    # empty folders are taken too: another run may just have made it
                    continue
                os.environ[_CHILD_VARIABLE] = str(path)
            return path


def free_name(path: Path) -> Path:
    """`path`, or with a number before its suffix when that is taken (`config.yaml`, `config-2.yaml`, …)."""
    number = 2
    candidate = path
    while candidate.exists():
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return candidate
