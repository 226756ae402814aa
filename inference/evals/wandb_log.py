"""Logs an evaluation to Weights & Biases through lm-eval's own logger."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WandbOptions:
    """Where an evaluation is logged.

    Args:
        project: W&B project.
        name: Name of the run; the model's label when None.
        group: Group of the run.
        tags: Tags of the run.
        offline: Write to disk only; `wandb sync` uploads later. Needs no account.
        log_samples: Whether each document's answer is logged as a table.
    """

    project: str
    name: str | None = None
    group: str | None = None
    tags: Sequence[str] = ()
    offline: bool = False
    log_samples: bool = True


def check_wandb_installed() -> None:
    """Refuse early what would fail after the scoring.

    Raises:
        ValueError: wandb or pandas is not installed.
    """
    try:
        import pandas  # noqa: F401
        import wandb  # noqa: F401
    except ImportError as error:
        raise ValueError(f"logging to W&B needs the package {error.name!r}: pip install 'tenfold[wandb]'") from error


def log_to_wandb(
    results: Mapping[str, Any], options: WandbOptions, *, folder: str | os.PathLike[str] | None = None
) -> Path | None:
    """Log scores, samples and the results as an artifact; an open run is used, otherwise one is opened and finished.

    Args:
        results: What `evaluate_model` returns.
        options: Project and run.
        folder: Where W&B keeps its files; the working directory when None.

    Returns:
        The run's local folder.

    Raises:
        ValueError: wandb or pandas is not installed.
    """
    check_wandb_installed()
    import wandb
    from lm_eval.loggers import WandbLogger

    extra = results.get("tenfold", {})
    opened = wandb.run is None
    init_args = {
        "project": options.project,
        "name": options.name or extra.get("model"),
        "group": options.group,
        "tags": list(options.tags) or None,
        "job_type": "evaluate",
        "mode": "offline" if options.offline else None,
        "dir": os.fspath(folder) if folder is not None else None,
        "settings": wandb.Settings(silent=True),
    }
    logger = WandbLogger(init_args={key: value for key, value in init_args.items() if value is not None})
    try:
        logger.post_init({key: value for key, value in results.items() if key not in ("samples", "tenfold")})
        logger.log_eval_result()
        logger.run.config.update({"tenfold": dict(extra)}, allow_val_change=True)
        if options.log_samples and results.get("samples"):
            _log_samples(logger, results)
        run_folder = getattr(logger.run.settings, "sync_dir", None)
    finally:
        if opened:
            logger.run.finish()
    return Path(run_folder) if run_folder else None


def _log_samples(logger: Any, results: Mapping[str, Any]) -> None:
    # a group without an aggregate metric has a row among the results but is not listed as a group: the logger would
    # take it for a task and fail for want of its samples; and a task that computes its own metrics may lack the
    # metric_list by which the logger makes its tables
    logger.task_names = [name for name in logger.task_names if (results["configs"].get(name) or {}).get("metric_list")]
    logger.log_eval_samples(results["samples"])
