"""`tenfold evaluate`: score a model through lm-eval."""

import argparse
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from ..cache_arguments import add_cache_arguments, cache_request
from ..table_storage import STORAGES
from .long_context_arguments import add_long_context_arguments, long_context_options

_WIKIPEDIA_TASKS = ("wikipedia_bits_per_byte", "wikipedia_title_cloze", "wikipedia_yes_no")
_WIKIPEDIA_GROUP = "tenfold_wikipedia"
_WIKIPEDIA_ASSET = "asset:wikipedia-summaries"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenfold evaluate",
        description="Score a model on lm-eval tasks. Start it with `torchrun --nproc-per-node N --no-python tenfold "
        "evaluate …` to share the documents among N processes.",
        epilog="The Wikipedia tasks that ship with Tenfold use the test split of asset:wikipedia-summaries "
        "(`tenfold assets get wikipedia-summaries`), unless --data-dir has files for them.",
    )
    what = parser.add_argument_group("what is scored")
    what.add_argument("--model", metavar="M", help="a model folder, a hub id, or asset:NAME")
    what.add_argument("--tokenizer", metavar="T", help="likewise; default: the one beside the model")
    what.add_argument("--tasks", metavar="A,B,…", help="names of tasks, groups or tags; mmlu_* is a pattern")
    what.add_argument(
        "--list-tasks", nargs="?", const="*", metavar="PATTERN", help="print task names (all, or those like *PATTERN*)"
    )
    what.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="local copies of the tasks' data: DIR/TASK/SPLIT.jsonl (or .json, .parquet, .csv), published columns; or "
        "the folder of LongBench's published files",
    )
    what.add_argument("--include-path", type=Path, metavar="DIR", help="folder with further lm-eval task files")
    what.add_argument(
        "--limit", type=_number, metavar="N", help="first N documents per task, or a fraction; for trials"
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the prompt; default: the task's own number"
    )
    how.add_argument("--apply-chat-template", action="store_true", help="send prompts through the chat template")
    how.add_argument("--system-instruction", metavar="TEXT", help="system message in front of each prompt")
    how.add_argument("--batch-size", default="auto", metavar="N", help="a number, auto (default) or auto:N")
    how.add_argument("--max-length", type=int, metavar="TOKENS", help="longest input; default: the model's own limit")
    how.add_argument("--device", help="default: a GPU when there is one")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto (default): as stored, but float32 on a CPU",
    )
    how.add_argument(
        "--storage",
        choices=STORAGES,
        help="where MoLE's table is read from (mmap), or MemoryFormer's stored tables lie: memory or mmap keep "
        "them off the device",
    )
    how.add_argument("--seed", type=int, help="seed of all random draws; default: lm-eval's own seeds")
    how.add_argument(
        "--use-cache", metavar="PREFIX", help="keep answers in PREFIX-DIGEST_rankN.db; the digest names the model"
    )
    how.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="let tasks run code that the model has written"
    )

    add_long_context_arguments(parser)
    add_cache_arguments(parser).add_argument(
        "--cache-likelihood",
        choices=("refuse", "decode"),
        help="log-likelihood tasks, which a forward pass scores without reading any cache: refuse them (default), or "
        "decode token by token",
    )

    where = parser.add_argument_group("where results go")
    where.add_argument("--output", type=Path, metavar="DIR", help="default: runs/evaluate/MODEL-TIME")
    where.add_argument("--overwrite", action="store_true", help="replace results that lie in the output folder")
    where.add_argument(
        "--log-samples",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write samples_TASK.jsonl (on by default)",
    )
    where.add_argument("--wandb", metavar="PROJECT", help="log to this W&B project")
    where.add_argument("--wandb-offline", action="store_true", help="write the W&B run to disk only; no account needed")
    return parser


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: What follows `tenfold evaluate`.

    Returns:
        Exit status 0.

    Raises:
        ValueError: Wrong input, with one line that says how to mend it.
        OSError: A folder is missing or cannot be written.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if not sys.stderr.isatty():
        # bars of other libraries fill a log file; the variables count only before these are imported
        for name, value in {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
            os.environ.setdefault(name, value)
    if arguments.list_tasks is not None:
        _list_tasks(arguments.list_tasks, arguments.include_path)
        return 0
    if arguments.model is None or arguments.tasks is None:
        parser.error("--model and --tasks are required")
    if arguments.wandb_offline and arguments.wandb is None:
        parser.error("--wandb-offline needs --wandb PROJECT")
    _evaluate(arguments)
    return 0


def _list_tasks(pattern: str, include_path: Path | None) -> None:
    from ...inference.evals.task_selection import all_task_names, shipped_task_names

    shipped = shipped_task_names()
    for name in [*shipped, *(name for name in all_task_names(_paths(include_path)) if name not in shipped)]:
        if pattern == "*" or pattern.strip("*") in name:
            print(name)


def _evaluate(arguments: argparse.Namespace) -> None:
    from ... import lightning_modules  # noqa: F401  registers our model types
    from ...inference.evals import WandbOptions, evaluate_model, print_scores

    main_process = int(os.environ.get("RANK", "0")) == 0
    tasks = [name for name in (part.strip() for part in arguments.tasks.split(",")) if name]
    label = Path(arguments.model.removeprefix("asset:").rstrip("/")).name or "model"
    output = arguments.output or Path("runs/evaluate") / f"{label}-{datetime.now():%Y%m%d-%H%M%S}"
    wandb = None
    if arguments.wandb is not None:
        wandb = WandbOptions(
            project=arguments.wandb, offline=arguments.wandb_offline, log_samples=arguments.log_samples
        )
    data_dirs = _paths(arguments.data_dir)
    shipped_data = _write_wikipedia(arguments.model) if _needs_wikipedia(tasks, data_dirs) else None
    model = _resolve(arguments.model)
    uses: dict[str, Any] = {}
    with _table_storage(arguments, model), _counting_buckets(model, uses):
        results = evaluate_model(
            model,
            tasks=tasks,
            tokenizer=None if arguments.tokenizer is None else _resolve(arguments.tokenizer),
            num_fewshot=arguments.num_fewshot,
            batch_size=arguments.batch_size,
            limit=arguments.limit,
            seed=arguments.seed,
            device=arguments.device,
            dtype=arguments.dtype,
            max_length=arguments.max_length,
            apply_chat_template=arguments.apply_chat_template,
            system_instruction=arguments.system_instruction,
            use_cache=arguments.use_cache,
            data_dir=data_dirs,
            shipped_data_dir=shipped_data,
            include_path=arguments.include_path,
            output_dir=output,
            overwrite=arguments.overwrite,
            log_samples=arguments.log_samples,
            wandb=wandb,
            model_label=label,
            confirm_run_unsafe_code=arguments.confirm_run_unsafe_code,
            long_context=long_context_options(arguments, tasks),
            **_cache_options(arguments),
        )
    if results is not None and main_process:
        print_scores(results)
        if uses:
            from ..bucket_report import add_bucket_use

            values = add_bucket_use(results, uses, output)
            print(
                f"bucket use: entropy {values['buckets/entropy_share']:.1%} of the bits, "
                f"{values['buckets/dead_rows_share']:.1%} of the rows not reached"
            )
        if truncated := results["tenfold"]["num_truncated"]:
            print(
                f"{truncated} prompts were longer than {results['tenfold']['max_length']} tokens and lost their start"
            )
        if (facts := results["tenfold"].get("cache")) and "device_bytes" in facts:
            from ...inference.specache import facts_line

            print(f"cache {facts['name']}: {facts_line(facts)}")
        print(f"results: {output}")


def _cache_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `--cache` asks for, as `evaluate_model` takes it."""
    request = cache_request(arguments)
    if request is None:
        if arguments.cache_likelihood is not None:
            raise ValueError("--cache-likelihood has no effect without --cache; add --cache specache")
        return {}
    from functools import partial

    from ...inference.specache import SpeCacheLM

    likelihood = arguments.cache_likelihood or "refuse"
    return {"lm_class": partial(SpeCacheLM, cache=request.name, cache_options=request.options, likelihood=likelihood)}


def _paths(path: Path | None) -> list[Path]:
    return [] if path is None else [path]


def _table_storage(arguments: argparse.Namespace, model: str | Path) -> AbstractContextManager[Any]:
    """What `--storage` asks for, while the model is loaded."""
    if arguments.storage is None:
        return nullcontext()
    from ..table_storage import has_stored_tables, table_storage

    if not has_stored_tables(model):
        raise ValueError(
            f"--storage {arguments.storage}: {arguments.model} is not the folder of a lookup form or of stored tables; "
            f"export one, or leave it out"
        )
    return table_storage(arguments.storage)


def _counting_buckets(model: str | Path, uses: dict[str, Any]) -> AbstractContextManager[Any]:
    """Counts of MemoryFormer's buckets for the report; nothing for other models."""
    from ..bucket_report import counting_buckets, has_hash_tables

    return counting_buckets(uses) if has_hash_tables(model) else nullcontext()


def _resolve(name: str) -> str | Path:
    """A model or tokenizer as `evaluate_model` takes it."""
    if not name.startswith("asset:"):
        return name
    from ...datamodules.assets import resolve

    return resolve(name)


def _needs_wikipedia(tasks: list[str], data_dirs: list[Path]) -> bool:
    asked = set(_WIKIPEDIA_TASKS if _WIKIPEDIA_GROUP in tasks else tasks) & set(_WIKIPEDIA_TASKS)
    return any(not any((folder / name).is_dir() for folder in data_dirs) for name in asked)


def _write_wikipedia(model: str) -> Path:
    from ...datamodules import TextDataModule
    from ...datamodules.assets import cache_dir
    from ...inference.evals import build_wikipedia_tasks

    folder = cache_dir() / "tasks" / _WIKIPEDIA_ASSET.removeprefix("asset:")
    # which documents are held out does not depend on the tokenizer
    documents = TextDataModule(data=_WIKIPEDIA_ASSET, tokenizer=model).documents("test")
    build_wikipedia_tasks(documents, folder)
    return folder
