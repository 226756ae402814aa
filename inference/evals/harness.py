"""Scores a model on lm-eval tasks: the one function behind `tenfold evaluate` and the demo."""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from .digest import model_digest, samples_digest, tokenizer_digest
from .distributed import Processes, join_processes
from .loading import Dtype, load_model, load_tokenizer, pick_device
from .long_context.catalogue import plan_long_context
from .long_context.options import LongContextOptions
from .long_context.run import add_tasks, tell_by_suite
from .model_lm import NOT_FINITE, TransformersLM
from .progress import Mode
from .results import check_output_folder, write_results
from .scores import baselines, ratio_standard_errors
from .task_selection import TaskSelection, select_tasks
from .wandb_log import WandbOptions, check_wandb_installed, log_to_wandb

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_RECORDED_PACKAGES = ("tenfold", "lm_eval", "torch", "transformers", "tokenizers", "datasets")
_LOGLIKELIHOOD_TYPES = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")

_Folder = str | os.PathLike[str]


def evaluate_model(
    model: "_Folder | PreTrainedModel | LM",
    *,
    tasks: Sequence[str],
    tokenizer: "_Folder | PreTrainedTokenizerBase | None" = None,
    num_fewshot: int | None = None,
    batch_size: int | str = "auto",
    limit: int | float | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: Dtype = "auto",
    max_length: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    use_cache: _Folder | None = None,
    data_dir: "_Folder | Sequence[_Folder] | None" = None,
    shipped_data_dir: _Folder | None = None,
    include_path: "_Folder | Sequence[_Folder] | None" = None,
    bootstrap_iters: int = 100_000,
    output_dir: _Folder | None = None,
    overwrite: bool = False,
    log_samples: bool = True,
    wandb: WandbOptions | None = None,
    model_label: str | None = None,
    confirm_run_unsafe_code: bool = False,
    long_context: LongContextOptions | None = None,
    progress: Mode = "auto",
    lm_class: Callable[..., TransformersLM] = TransformersLM,
) -> dict[str, Any] | None:
    """Score a model with lm-eval, and write what came out.

    The numbers are lm-eval's own: the same as `lm_eval.simple_evaluate` gives for the same model and settings.
    Started by torchrun, the processes share the documents; the first one prints, writes and returns.

    Args:
        model: A model folder, a hub id, a loaded model (which keeps its device and dtype), or a model of lm-eval such
            as `SpeCacheLM` (which keeps its own settings too). Types of our own must be registered by the caller:
            importing `tenfold.lightning_modules` does it.
        tasks: Names of tasks, groups or tags, stock, shipped or from `include_path`; `mmlu_*` is a pattern.
        tokenizer: Where the tokenizer is, or the tokenizer; the one beside the model when None.
        num_fewshot: Examples in the prompt; each task's own number when None.
        batch_size: Sequences per forward pass; `auto` finds it (on a CPU by a fixed number of tokens).
        limit: First documents per task: a number, or a fraction below 1. For trials only.
        seed: Seed of all random draws; lm-eval's own seeds (0 for Python, 1234 for the rest) when None.
        device: Where the model runs; a GPU when there is one.
        dtype: dtype of the weights; `auto` is the stored one, but float32 on a CPU.
        max_length: Longest input in tokens; the model's own limit when None.
        apply_chat_template: Whether prompts go through the tokenizer's chat template.
        system_instruction: System message in front of each prompt.
        use_cache: Prefix of a file with answers. A digest of model, tokenizer, dtype and length is added to its name,
            so one prefix serves any number of models.
        data_dir: Folder, or folders, with local copies of data sets: `DATA_DIR/TASK/SPLIT.jsonl`. All tasks asked for
            must be there, except those of `include_path`. LongBench's published files may lie there as they are.
        shipped_data_dir: Data of the tasks that ship with Tenfold, where `data_dir` has none; what
            `build_wikipedia_tasks` writes.
        include_path: Folder, or folders, with further task files.
        bootstrap_iters: Resamples behind the standard errors that lm-eval finds by bootstrap.
        output_dir: Folder for `results.json`, `samples_TASK.jsonl` and `report.html`; nothing is written when None.
        overwrite: Whether results that lie there may be replaced.
        log_samples: Whether the sample files are written.
        wandb: Where to log to W&B.
        model_label: What the model is called in results and reports; its folder's name when None.
        confirm_run_unsafe_code: Whether tasks that run code written by the model may do so.
        long_context: Settings of LongBench, needle and RULER-like tasks (see `long_context/README.md`).
        progress: How progress is shown.
        lm_class: Wraps a network for lm-eval; takes what `TransformersLM` takes.

    Returns:
        lm-eval's results with `samples` and a block `tenfold`: digests of model, tokenizer and data, seeds, versions,
        dtype, device, baselines, and the standard errors that lm-eval lacks. None on processes but the first.

    Raises:
        ValueError: A task is unknown or its data missing, the model cannot be loaded whole, the tokenizer cannot belong
            to it, `max_length` is too small, or the model gives NaN or infinite log-likelihoods.
        FileNotFoundError: A folder does not exist.
        FileExistsError: `output_dir` holds results and `overwrite` is off.
    """
    _check_numbers(limit=limit, num_fewshot=num_fewshot, batch_size=batch_size)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(join_processes())
        stack.enter_context(_quiet_libraries(bars=processes.is_main and _shows_bars(progress)))
        if processes.is_main and output_dir is not None:
            check_output_folder(output_dir, overwrite=overwrite)
        if processes.is_main and wandb is not None:
            check_wandb_installed()
        label = model_label or _label_of(model)
        plan = plan_long_context(tasks, options=long_context, data_dirs=_folders(data_dir))
        selection = stack.enter_context(
            select_tasks(
                plan.others,
                allow_none=bool(plan.groups),
                data_dirs=_folders(data_dir),
                shipped_data_dir=None if shipped_data_dir is None else Path(shipped_data_dir),
                include_paths=_folders(include_path),
                num_fewshot=num_fewshot,
                metadata={"tokenizer": str(model)} if isinstance(model, (str, os.PathLike)) else None,
            )
        )
        _check_sizes(selection, limit, processes)
        started = time.perf_counter()
        lm, digest = _make_lm(
            model,
            tokenizer,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            max_length=max_length,
            processes=processes,
            progress=progress,
            lm_class=lm_class,
        )
        if apply_chat_template and not getattr(lm.tokenizer, "chat_template", None):
            raise ValueError("--apply-chat-template was asked for, but the tokenizer has no chat template")
        selection = add_tasks(
            selection, plan, lm, apply_chat_template=apply_chat_template, system_instruction=system_instruction
        )
        _check_sizes(selection, limit, processes)
        loaded = time.perf_counter()
        seeds = _seeds(seed)
        results = _run(
            lm,
            selection,
            model_args={"model": label},
            batch_size=batch_size,
            device=str(lm.device),
            limit=limit,
            use_cache=None if use_cache is None else _cache_prefix(use_cache, lm, digest),
            bootstrap_iters=bootstrap_iters,
            system_instruction=system_instruction,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
            **seeds,
        )
        num_truncated = processes.gather_object(getattr(lm, "num_truncated", 0))
        facts = processes.gather_object(lm.run_facts() if isinstance(lm, TransformersLM) else {})
        if results is None or num_truncated is None or facts is None:
            return None
        by_suite = tell_by_suite(results, selection.tasks)
        _restore_sources(results, selection)
        results |= {"model_source": "hf", "model_name": label, "model_name_sanitized": label.replace("/", "__")}
        results["tenfold"] = {
            "model": label,
            "model_digest": digest,
            "tokenizer_digest": tokenizer_digest(lm.tokenizer),
            "dtype": _dtype_of(lm),
            "device": str(lm.device),
            "world_size": processes.world_size,
            "max_length": lm.max_length,
            "num_truncated": sum(num_truncated),
            "seeds": {name.removesuffix("_seed"): value for name, value in seeds.items()},
            "seconds": {"load": round(loaded - started, 3), "score": round(time.perf_counter() - loaded, 3)},
            "versions": _versions(),
            **_from_samples(results["samples"], selection),
            **({"long_context": by_suite} if by_suite else {}),
            **(lm.merge_facts(facts) if isinstance(lm, TransformersLM) else {}),
        }
        if output_dir is not None:
            write_results(results, output_dir, log_samples=log_samples)
        if wandb is not None:
            log_to_wandb(results, wandb, folder=output_dir)
        return results


def _check_numbers(*, limit: float | None, num_fewshot: int | None, batch_size: int | str) -> None:
    if limit is not None and not (limit > 0 and math.isfinite(limit) and (limit < 1 or limit == int(limit))):
        raise ValueError(f"limit is {limit}: give a whole number of documents, or a fraction between 0 and 1")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot is {num_fewshot}: it must be 0 or more")
    if str(batch_size).partition(":")[0] != "auto" and not (str(batch_size).isdigit() and int(batch_size) > 0):
        raise ValueError(f"batch_size is {batch_size!r}: give a number of at least 1, auto, or auto:N")


def _check_sizes(selection: TaskSelection, limit: float | None, processes: Processes) -> None:
    """Refuse a task with fewer documents than processes: lm-eval fails on a process that has none."""
    for name, task in selection.tasks.items():
        num_documents = len(task.eval_docs)
        if limit is not None:
            num_documents = min(num_documents, math.ceil(num_documents * limit) if limit < 1 else int(limit))
        if num_documents < processes.world_size:
            raise ValueError(
                f"task {name!r} has {num_documents} documents to score for {processes.world_size} processes: "
                "start fewer processes, or raise --limit"
            )


def _make_lm(
    model: "_Folder | PreTrainedModel | LM",
    tokenizer: "_Folder | PreTrainedTokenizerBase | None",
    *,
    device: str | None,
    dtype: Dtype,
    processes: Processes,
    lm_class: Callable[..., TransformersLM],
    **options: Any,
) -> tuple[Any, str]:
    """The model as lm-eval sees it, and its digest."""
    from lm_eval.api.model import LM

    if isinstance(model, LM):
        network = getattr(model, "model", None)
        if isinstance(network, transformers.PreTrainedModel):
            return model, model_digest(network)
        return model, type(model).__name__
    if isinstance(model, (str, os.PathLike)):
        source = model
        tokenizer = source if tokenizer is None else tokenizer
        picked = pick_device(device, local_rank=processes.local_rank)
        network = load_model(source, dtype=dtype, device=picked)
        digest = model_digest(source if Path(source).is_dir() else network)
    else:
        network, digest = model, model_digest(model)
        if tokenizer is None:
            raise ValueError("a loaded model comes without its tokenizer: pass tokenizer=")
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    return lm_class(network, tokenizer, processes=processes, **options), digest


def _run(lm: Any, selection: TaskSelection, **options: Any) -> dict[str, Any] | None:
    import lm_eval

    # lm-eval prints the batch size it finds; standard output belongs to the scores
    with contextlib.redirect_stdout(io.StringIO()):
        results = lm_eval.simple_evaluate(
            model=lm, tasks=selection.objects, task_manager=selection.manager, log_samples=True, **options
        )
    if results is None:
        return None
    for name, rows in results["samples"].items():
        # processes hand in their shares one after the other
        rows.sort(key=lambda row: (row["doc_id"], row["filter"]))
        for row in rows:
            # a process with fewer documents asks its last question again, and lm-eval keeps those answers too
            row["resps"] = [answers[: selection.tasks[name].config.repeats] for answers in row["resps"]]
        if selection.tasks[name].OUTPUT_TYPE in _LOGLIKELIHOOD_TYPES and not all(map(_is_finite, rows)):
            raise ValueError(NOT_FINITE)
    return dict(results)


def _is_finite(row: dict[str, Any]) -> bool:
    values = (value[0] if isinstance(value, (list, tuple)) else value for value in row["filtered_resps"])
    return all(math.isfinite(value) for value in values)


def _seeds(seed: int | None) -> dict[str, int]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    others = DEFAULT_OTHER_SEED if seed is None else seed
    return {
        "random_seed": DEFAULT_RANDOM_SEED if seed is None else seed,
        "numpy_random_seed": others,
        "torch_random_seed": others,
        "fewshot_random_seed": others,
    }


def _dtype_of(lm: Any) -> str:
    return str(getattr(getattr(lm, "model", None), "dtype", "unknown")).removeprefix("torch.")


def _cache_prefix(prefix: _Folder, lm: Any, digest: str) -> str:
    """The prefix with what answers depend on: lm-eval's own key is the request's text alone."""
    parts: tuple[Any, ...] = (digest, tokenizer_digest(lm.tokenizer), _dtype_of(lm), lm.max_length, str(lm.device))
    if cache := getattr(lm, "cache_name", None):
        # a cache that loses something gives other answers
        parts += (cache, sorted(map(repr, lm.cache_options.items())))
    return f"{os.fspath(prefix)}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _from_samples(samples: dict[str, list[dict[str, Any]]], selection: TaskSelection) -> dict[str, Any]:
    data, errors, guesses = {}, {}, {}
    for name, rows in samples.items():
        data[name] = {"digest": samples_digest(rows), "num_documents": len({row["doc_id"] for row in rows})}
        if local := selection.local_data.get(name):
            data[name]["files_digest"] = local.digest
        errors[name] = ratio_standard_errors(rows)
        guesses[name] = baselines(rows, selection.tasks[name].OUTPUT_TYPE)
    return {
        "data": data,
        "standard_errors": {name: found for name, found in errors.items() if found},
        "baselines": {name: found for name, found in guesses.items() if found},
    }


def _restore_sources(results: dict[str, Any], selection: TaskSelection) -> None:
    """Name the tasks' own YAML and files, not those of the temporary folder that is gone after this run."""
    for name, local in selection.local_data.items():
        config = results["configs"].get(name, {})
        if isinstance(config.get("metadata"), dict):
            config["metadata"]["config_source"] = local.source
        if isinstance(config.get("dataset_kwargs"), dict):
            config["dataset_kwargs"].pop("cache_dir", None)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _label_of(model: "_Folder | PreTrainedModel | LM") -> str:
    if not isinstance(model, (str, os.PathLike)):
        model = getattr(model, "model", model)
        return Path(getattr(model, "name_or_path", None) or "").name or type(model).__name__
    return Path(model).resolve().name if Path(model).is_dir() else str(model)


def _folders(value: "_Folder | Sequence[_Folder] | None") -> list[Path]:
    if value is None:
        return []
    folders = [value] if isinstance(value, (str, os.PathLike)) else value
    return [Path(folder).expanduser() for folder in folders]


def _shows_bars(progress: Mode) -> bool:
    return progress == "bar" or (progress == "auto" and sys.stderr.isatty())


@contextlib.contextmanager
def _quiet_libraries(*, bars: bool) -> Iterator[None]:
    """Keep other libraries' bars and remarks out of the way; what matters of them is checked and said by us.

    Args:
        bars: Whether lm-eval may show bars while it builds requests.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("lm_eval")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    shown = transformers_logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    # these two have no switch that could be thrown after their import
    modules: tuple[Any, ...] = (lm_eval.api.model, lm_eval.api.task)
    originals = [module.tqdm for module in modules]
    if not bars:
        for module, original in zip(modules, originals, strict=True):
            module.tqdm = functools.partial(original, disable=True)
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if shown[0]:
            transformers_logging.enable_progress_bar()
        if shown[1]:
            datasets.enable_progress_bars()
        for module, original in zip(modules, originals, strict=True):
            module.tqdm = original
