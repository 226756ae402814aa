"""`tenfold export`: a checkpoint or model folder into a plain model folder, or into the lookup form of MoLE."""

import argparse
import re
from pathlib import Path

UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str) -> int:
    """A number of bytes with an optional unit.

    >>> parse_bytes("1.5GiB"), parse_bytes("64 MB")
    (1610612736, 64000000)
    """
    match = re.fullmatch(r"([\d.]+)\s*([KMG]?i?B?)", text.strip())
    if not match or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes; write 512MiB, 2GiB, 4GB, ...")
    return int(float(match[1]) * UNITS[match[2]])


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="tenfold export", description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint file, model folder, hub id or asset:NAME")
    parser.add_argument("--output", required=True, type=Path, help="new folder to write")
    parser.add_argument(
        "--form",
        choices=("plain", "lookup"),
        default="plain",
        help="plain: config.json, safetensors and tokenizer; lookup: MoLE's experts as a table on disk",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder, hub id or asset:NAME; the model's own by default")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="type of the table (lookup; bfloat16 by default) or of the weights (plain; as stored by default)",
    )
    parser.add_argument(
        "--memory-limit",
        type=parse_bytes,
        default=2**30,
        metavar="BYTES",
        help="working memory for the table, the model aside (1GiB by default)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    import torch

    from ...inference.evals.progress import track
    from ...lightning_modules.mole.convert import TableDtype, export_lookup, new_folder, plan_table
    from ..model_source import load_source, source_tokenizer

    # a folder that is taken should be told before the model is loaded
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists; name a new folder or remove it")
    source = load_source(args.model, dtype="stored")
    tokenizer = source_tokenizer(source, args.tokenizer)
    if args.form == "lookup":
        dtype: TableDtype = args.dtype or "bfloat16"
        plan = plan_table(source.model, dtype, args.memory_limit)
        print(
            f"table: {plan.file_bytes:,} bytes, {plan.row_bytes:,} per token; {plan.chunk_ids:,} ids at a time in "
            f"{plan.working_bytes:,} bytes of memory"
        )
        with track("writing the table, token ids", source.model.config.vocab_size) as advance:
            export_lookup(
                source.model,
                args.output,
                tokenizer=tokenizer,
                dtype=dtype,
                memory_limit_bytes=args.memory_limit,
                progress=advance,
            )
    else:
        with new_folder(args.output) as folder:
            model = source.model if args.dtype is None else source.model.to(getattr(torch, args.dtype))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    print(f"written: {args.output}")
    return 0
