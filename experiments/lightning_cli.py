"""`tenfold fit|validate|test|predict`: Lightning's CLI with run folders, loggers and checkpoints of this project."""

import logging
import os
import sys
import uuid
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from typing_extensions import override

from .. import callbacks, datamodules, lightning_modules
from ..callbacks import (
    AtomicCheckpointIO,
    ExCPCheckpointIO,
    ExCPMetrics,
    GracefulInterrupt,
    PlainProgress,
    RunCheckpoint,
    StepSeed,
)
from ..callbacks.excp.container import KEY
from ..callbacks.excp.restore import read_rest
from .cli import is_our_complaint
from .parser_messages import condense, said_by_a_constructor
from .run_folder import CHECKPOINTS, LAST, RunFolder, RunOptions, free_name, named

TERMINATED, INTERRUPTED = 143, 130

_CONFIG_HELP = (
    "Configuration file, YAML or JSON; may be given several times and mixed with flags, where later ones win. A list "
    "replaces the whole earlier list: write `callbacks+:` in a file, or --trainer.callbacks+=NAME, to append to it."
)


def register_short_names() -> list[str]:
    """Imports every public class that a configuration may name, so that its short name is known.

    Returns:
        The names.
    """
    names = []
    for package in (lightning_modules, datamodules, callbacks):
        for name in getattr(package, "__all__", ()):
            if isinstance(getattr(package, name), type):
                names.append(name)
    return names


class TenfoldArgumentParser(LightningArgumentParser):
    """Lightning's parser, which answers wrong input with one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        options = [action.dest for action in parser._actions]
        text = condense(message, class_names=register_short_names(), options=options)
        sys.stderr.write(f"{prog}: error: {text} (options: {prog} --help)\n")
        self.exit(2)
        raise AssertionError("unreachable")


class SaveRunConfig(SaveConfigCallback):
    """Saves the whole configuration of a training run in its folder.

    A run that is continued with other options keeps the earlier files: `config.yaml`, `config-2.yaml`, ….
    """

    run_folder: Path

    @override
    def save_config(self, trainer: Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        text = self.parser.dump(self.config, skip_none=False)
        newest = max(self.run_folder.glob("config*.yaml"), key=lambda p: p.stat().st_mtime_ns, default=None)
        if newest is not None and newest.read_text(encoding="utf-8") == text:
            return
        self.run_folder.mkdir(parents=True, exist_ok=True)
        path = free_name(self.run_folder / "config.yaml")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)


class TenfoldCLI(LightningCLI):
    """LightningCLI over any model and data by name, with one folder per run.

    On top of Lightning's options: a `run` group (`RunOptions`) and a `checkpoint` group (`RunCheckpoint`, always on).
    The metrics go to `RUN/logs/version_N/metrics.csv`, one version per launch, and to W&B when asked.
    `--ckpt_path` also takes `last` (the youngest `last.ckpt` of this run's name), `auto` (the same, or a fresh start
    when there is none) and `best` (the best checkpoint of the run that has the youngest `last.ckpt`).

    Args:
        args: the arguments, subcommand first.
        run: whether `args` names a subcommand to run; without one, model, data and trainer are only built.

    Attributes:
        run_folder: folder of the run.
        run_options: options of the run, names filled in.
    """

    run_folder: Path
    run_options: RunOptions

    def __init__(self, args: list[str] | dict[str, Any], *, run: bool = True) -> None:
        register_short_names()
        super().__init__(
            save_config_callback=SaveRunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            seed_everything_default=0,
            parser_class=TenfoldArgumentParser,
            parser_kwargs={"prog": "tenfold", "description": "Train and score models with Lightning."},
            args=args,
            run=run,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        for action in parser._actions:
            if action.dest == "config":
                action.help = _CONFIG_HELP
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # a checkpoint is data; nothing in it is executed unless the user says so
        parser.set_defaults({"weights_only": True})
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # as in Lightning, without its warning about arguments that are both given and in sys.argv: ours are the same
        self.config = parser.parse_args(args) if isinstance(args, list) else parser.parse_object(args or {})

    @property
    def _section(self) -> Any:
        return self.config.get(str(self.config.get("subcommand")), self.config)

    @override
    def _parse_ckpt_path(self) -> None:
        section = self._section
        files = section.get("config") or self.config.get("config") or []
        last_file = Path(str(files[-1])) if files else None
        self.run_options = named(RunOptions(**section.run.as_dict()), last_file)
        section.run.experiment, section.run.name = self.run_options.experiment, self.run_options.name
        folders = RunFolder(self.run_options)
        checkpoint = self._find_checkpoint(folders)
        if checkpoint is not None and self.run_options.hyper_parameters == "checkpoint":
            self._take_hyper_parameters(checkpoint)
        # last, so that wrong input leaves no folder behind
        self._choose_folder(folders, checkpoint)

    def _take_hyper_parameters(self, path: Path) -> None:
        before = _flat_model(self._section)
        super()._parse_ckpt_path()
        after = _flat_model(self._section)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                rank_zero_warn(
                    f"{key} is {after.get(key)!r} from the checkpoint {path}, not {before.get(key)!r} as configured"
                    " (--run.hyper_parameters=config keeps the configured ones)"
                )

    def _find_checkpoint(self, folders: RunFolder) -> Path | None:
        """The local checkpoint that `--ckpt_path` means, checked; also puts it there."""
        section = self._section
        asked = section.get("ckpt_path")
        checkpoint = None
        if asked in ("last", "auto", "best"):
            checkpoint = self._newest_last(folders)
            if checkpoint is None and asked != "auto":
                raise ValueError(
                    f"--ckpt_path {asked}: no {folders.base}*/{CHECKPOINTS}/last.ckpt to go by; leave --ckpt_path"
                    " out to start afresh, or name the file"
                )
            if checkpoint is not None and asked == "best":
                checkpoint = _best_of(checkpoint)
            section["ckpt_path"] = None if checkpoint is None else str(checkpoint)
        elif asked and "://" not in asked and asked != "hpc":
            checkpoint = Path(asked)
            if not checkpoint.exists():
                raise FileNotFoundError(f"--ckpt_path {asked} does not exist; name a checkpoint file, or `last`")
        if checkpoint is not None and checkpoint.is_file():
            _open_checkpoint(checkpoint)
        return checkpoint

    def _choose_folder(self, folders: RunFolder, checkpoint: Path | None) -> None:
        trains = self.config.get("subcommand") == "fit" and not self._section.trainer.fast_dev_run
        existing = folders.existing()
        of_checkpoint = folders.of_checkpoint(checkpoint) if checkpoint else None
        if of_checkpoint is not None:
            self.run_folder = of_checkpoint
        elif trains:
            self.run_folder = folders.fresh(create=_is_first_process())
        else:
            self.run_folder = existing[-1] if existing else folders.base

    def _newest_last(self, folders: RunFolder) -> Path | None:
        own = self._section.checkpoint.dirpath
        if own is None:
            return folders.newest_last()
        return path if (path := Path(own, LAST)).exists() else None

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = list(callbacks)
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        for callback in callbacks:
            if isinstance(callback, RunCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run_folder.absolute() / CHECKPOINTS)
        self.interrupt = GracefulInterrupt()
        callbacks.append(self.interrupt)
        if self._section.seed_everything is not False and not any(isinstance(c, StepSeed) for c in given):
            callbacks.append(StepSeed())
        if config.get("logger") in (None, True):
            config["logger"] = self._loggers()
        if config.get("default_root_dir") is None:
            config["default_root_dir"] = str(self.run_folder)
        shown = any(isinstance(c, (ProgressBar, PlainProgress)) for c in given)
        if config.get("enable_progress_bar") is not False and not shown:
            if sys.stdout.isatty():
                callbacks.append(RichProgressBar())
            else:
                config["enable_progress_bar"] = False
                callbacks.append(PlainProgress())
        if any(isinstance(plugin, ExCPCheckpointIO) for plugin in _listed(config.get("plugins"))):
            _check_strategy(config.get("strategy"))
            if not any(isinstance(c, ExCPMetrics) for c in given):
                callbacks.append(ExCPMetrics())
        SaveRunConfig.run_folder = self.run_folder
        try:
            trainer = super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError) as error:
            raise ValueError(f"the trainer cannot be built: {error}") from error
        _write_atomically(trainer)
        return trainer

    def _loggers(self) -> list[Logger]:
        options, folder = self.run_options, self.run_folder
        # flushed often, so that a killed run loses few values
        loggers: list[Logger] = [CSVLogger(folder, name="logs", flush_logs_every_n_steps=10)]
        if options.wandb == "off" or self._section.trainer.fast_dev_run:
            return loggers
        if find_spec("wandb") is None:
            raise ValueError("--run.wandb needs the package wandb; run `pip install 'tenfold[wandb]'`, or leave it off")
        loggers.append(
            WandbLogger(
                name=f"{options.experiment}/{folder.name}",
                project=options.wandb_project,
                save_dir=folder,
                id=_wandb_id(folder),
                offline=options.wandb == "offline",
                # a continued run goes on under its own id
                resume="allow" if options.wandb == "online" else None,
            )
        )
        return loggers

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # what one of our constructors said is buried in the parser's message about all the types it tried
            for cause in _chain(error):
                if is_our_complaint(cause) and cause is not error:
                    raise ValueError(str(cause)) from error
            if said := said_by_a_constructor(str(error)):
                raise ValueError(said) from error
            raise

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        exit_code = 1
        try:
            super()._run_subcommand(subcommand)
            exit_code = 0
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except SIGTERMException:
            interrupted = self.interrupt.interrupted
            how = "interrupted" if interrupted else "terminated"
            rank_zero_info(f"tenfold {subcommand}: {how}; `--ckpt_path last` continues the run")
            exit_code = INTERRUPTED if interrupted else TERMINATED
            sys.exit(exit_code)
        finally:
            # else a second run of this process would go on in the first one's
            if self.run_options.wandb != "off" and "wandb" in sys.modules:
                sys.modules["wandb"].finish(exit_code=exit_code)

    def after_fit(self) -> None:
        """Says where the run is."""
        checkpoint = next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)
        if checkpoint is not None and checkpoint.last_model_path and Path(checkpoint.last_model_path).exists():
            rank_zero_only(print)(f"last checkpoint: {os.path.relpath(checkpoint.last_model_path)}")


def _flat_model(section: Any) -> dict[str, Any]:
    """The model's class and options by their flags, without the separator between class and options."""
    model = section.model.clone()
    extra = model.pop("dict_kwargs", None) or {}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        value = value.as_dict() if hasattr(value, "as_dict") else value
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}", item)
        else:
            flat[prefix] = value

    walk("model", model)
    walk("model.init_args", extra)
    return flat


def _open_checkpoint(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises nearly anything for a file that is not its own
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        raise ValueError(
            f"--ckpt_path {path} cannot be read as a checkpoint of plain data ({reason}); it may be cut short, or hold"
            " objects: name another file"
        ) from error
    if isinstance(checkpoint, dict) and KEY in checkpoint:
        checkpoint = read_rest(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt_path {path} is no checkpoint of Lightning: it has no `state_dict`; name another file")
    return checkpoint


def _best_of(last: Path) -> Path:
    states = _open_checkpoint(last).get("callbacks", {})
    names = [v.get("best_model_path") for k, v in states.items() if k.startswith(RunCheckpoint.__name__)]
    # by its name, as the run's folder may have moved
    paths = [last.with_name(Path(name).name) for name in names if name]
    if not paths or not paths[0].exists():
        raise ValueError(f"--ckpt_path best: {last} names no other checkpoint that is still there; use `last`")
    return paths[0]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    for refused, instead in (("fsdp", "excp_fsdp"), ("modelparallel", "excp_model_parallel")):
        if name.lower().replace("_", "").startswith(refused):
            raise ValueError(
                f"strategy {name} reads checkpoint files past ExCPCheckpointIO; use --trainer.strategy={instead}, or"
                " leave the plugin out"
            )
    if name.lower().startswith("deepspeed"):
        raise ValueError(f"strategy {name} writes a format of its own, which ExCP does not code; leave the plugin out")


def _write_atomically(trainer: Trainer) -> None:
    try:
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    except NotImplementedError:
        rank_zero_info(f"{type(trainer.strategy).__name__} writes its checkpoints itself")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _wandb_id(folder: Path) -> str:
    path = folder / "wandb_id.txt"
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = uuid.uuid4().hex[:8]
    if _is_first_process():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(name + "\n", encoding="utf-8")
    return name


def main(argv: list[str]) -> int:
    """Runs one of Lightning's subcommands.

    Args:
        argv: the arguments, subcommand first.

    Returns:
        0, or 143 after SIGTERM and 130 after Ctrl+C, both with `last.ckpt` saved.
    """
    # what others' code says to its own developers
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.. is deprecated")
    # a folder is filled twice only when its run is continued
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    TenfoldCLI(argv)
    return 0
