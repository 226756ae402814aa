"""`tenfold export`: a checkpoint or model folder into a plain model folder, or a method's form for inference."""

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

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
        choices=("plain", "lookup", "memory", "fused"),
        default="plain",
        help="plain: config.json, safetensors and tokenizer; lookup: MoLE's experts as a table on disk; memory: "
        "MemoryFormer's tables as 8-bit rows, or as they are with --dtype float16; fused: SLAB's norms folded into the "
        "linear layers; image classifiers have plain and fused",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder, hub id or asset:NAME; the model's own by default")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="type of the table (lookup; bfloat16 by default) or of the weights (plain; as stored by default)",
    )
    parser.add_argument(
        "--quantisation",
        choices=("none", "int8", "nf4", "nf3"),
        default="none",
        help="store the table's values as codes with a scale per block: nf4 in blocks of 768 takes 25.1 %% of 16-bit "
        "values, nf3 in blocks of 128 19.5 %%, int8 in blocks of 128 50.8 %% (lookup)",
    )
    parser.add_argument(
        "--scale-dtype", choices=("float16", "float32"), default="float16", help="type of those scales (float16)"
    )
    parser.add_argument(
        "--score-text",
        metavar="FILE",
        help="UTF-8 text on which both forms are scored after the export; by default held-out documents of "
        "asset:wikipedia-summaries where that is there (lookup)",
    )
    parser.add_argument(
        "--untie-head",
        action="store_true",
        help="give an output layer that shares the embedding's weight its own, so that it takes over the last norm; "
        "otherwise that norm stays as one multiplication and addition per channel (fused)",
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

    from ...lightning_modules.mole.convert import new_folder
    from ..model_source import load_source, source_tokenizer

    lookup_only = {"--quantisation": args.quantisation != "none", "--score-text": args.score_text is not None}
    for option, given in lookup_only.items():
        if given and args.form != "lookup":
            raise ValueError(f"{option} is for --form lookup; add that, or leave it out")
    if args.untie_head and args.form != "fused":
        raise ValueError("--untie-head is for --form fused; add that, or leave it out")
    if args.form == "fused" and args.dtype:
        raise ValueError(f"--dtype {args.dtype} is not for --form fused, which keeps the model's type; leave it out")
    if args.quantisation != "none" and args.dtype:
        raise ValueError(
            f"--dtype {args.dtype} and --quantisation {args.quantisation} both name the table's type; drop one"
        )
    if args.score_text is not None and not Path(args.score_text).is_file():
        raise FileNotFoundError(f"--score-text {args.score_text}: no such file")
    if args.form == "memory" and args.dtype not in (None, "float16"):
        raise ValueError(
            f"--dtype {args.dtype} is no form of stored tables; use float16, or leave it out for 8-bit rows"
        )
    # a folder that is taken should be told before the model is loaded
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists; name a new folder or remove it")
    source = load_source(args.model, dtype="stored", images=True)
    if source.is_image_classifier:
        return _export_classifier(source.model, args)
    # a model of symbols that are no text has none
    textless = args.form in ("plain", "fused") and source.tokenizer is None and args.tokenizer is None
    tokenizer = None if textless else source_tokenizer(source, args.tokenizer)
    if args.form == "lookup":
        _export_lookup(source.model, tokenizer, args)
    elif args.form == "memory":
        from ...lightning_modules.memoryformer.inference import export_tables

        with new_folder(args.output) as folder:
            found = export_tables(
                source.model, folder, table_format="float16" if args.dtype else "int8", tokenizer=tokenizer
            )
        print(
            f"tables: {found['table_bytes']:,.0f} bytes, {found['training_table_bytes']:,.0f} in the training form; "
            f"error of the stored values: {found['relative_rms_error']:.2e} of their size (RMS)"
        )
    elif args.form == "fused":
        from ...lightning_modules.slab.convert import export_fused

        with new_folder(args.output) as folder:
            report = export_fused(source.model, folder, tokenizer=tokenizer, untie_head=args.untie_head)
        kept = f"; as an affine: {', '.join(report['affine'])}" if report["affine"] else ""
        print(f"{report['norms'] - len(report['affine'])} of {report['norms']} norms folded into linear layers{kept}")
        print(f"logits on random tokens differ by {report['max_abs_logit_diff']:.2e} at most")
    else:
        with new_folder(args.output) as folder:
            model = source.model if args.dtype is None else source.model.to(getattr(torch, args.dtype))
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    print(f"written: {args.output}" + (" (no tokenizer is known; --tokenizer adds one)" if textless else ""))
    return 0


def _export_classifier(model: Any, args: argparse.Namespace) -> int:
    """Write an image classifier, plain or fused.

    Raises:
        ValueError: an option or a form for language models; see `export_fused_classifier`.
    """
    import torch

    from ...lightning_modules.mole.convert import new_folder
    from ...lightning_modules.slab.vision_export import export_fused_classifier

    if args.form not in ("plain", "fused"):
        raise ValueError(
            f"--form {args.form} is for language models, {args.model} is an image classifier; use plain or fused"
        )
    for option, given in {"--tokenizer": args.tokenizer is not None, "--untie-head": args.untie_head}.items():
        if given:
            raise ValueError(f"{option} is for language models, {args.model} is an image classifier; leave it out")
    with new_folder(args.output) as folder:
        if args.form == "fused":
            report = export_fused_classifier(model, folder)
            print(f"{report['norms']} of {report['norms']} norms folded into linear layers")
            print(f"logits on random images differ by {report['max_abs_logit_diff']:.2e} at most")
        else:
            (model if args.dtype is None else model.to(getattr(torch, args.dtype))).save_pretrained(folder)
    print(f"written: {args.output}")
    return 0


def _export_lookup(model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
    """Write the table, and say what storing it did to its values and to the model's loss."""
    from ...inference.evals.progress import track
    from ...lightning_modules.mole.convert import TableError, compare_loss, export_lookup, plan_table
    from ..model_source import load_source

    how = {
        "dtype": args.dtype or "bfloat16",
        "quantisation": args.quantisation,
        "scale_dtype": args.scale_dtype,
        "memory_limit_bytes": args.memory_limit,
    }
    plan, error = plan_table(model, **how), TableError()
    print(
        f"table: {plan.file_bytes:,} bytes, {plan.row_bytes:,} per token; {plan.chunk_ids:,} ids at a time in "
        f"{plan.working_bytes:,} bytes of memory"
    )
    with track("writing the table, token ids", model.config.vocab_size) as advance:
        export_lookup(model, args.output, tokenizer=tokenizer, progress=advance, error=error, **how)
    print(f"error of the stored values: {error.relative_rms:.2e} of their size (RMS), {error.max_abs:.3g} at most")
    sequences = _held_out(tokenizer, args.score_text)
    if not sequences:
        print("not scored: no text at hand; name one with --score-text, or `tenfold assets get wikipedia-summaries`")
        return
    loss = compare_loss(model.float(), load_source(str(args.output)).model, sequences)
    print(
        f"loss on {sum(map(len, sequences)):,} tokens of held-out text: experts {loss['experts']:.4f}, table "
        f"{loss['lookup']:.4f} nats per token ({loss['lookup'] - loss['experts']:+.4f})"
    )


def _held_out(tokenizer: Any, path: str | None, *, num_sequences: int = 16, length: int = 256) -> list[Any]:
    """Token sequences of a file, or of documents that training on the default text holds out."""
    import torch

    if path is not None:
        texts = [Path(path).read_text(encoding="utf-8")]
    else:
        from ...datamodules import TextDataModule
        from ...datamodules.assets import find_asset

        if find_asset("wikipedia-summaries") is None:
            return []
        documents = TextDataModule(data="asset:wikipedia-summaries", tokenizer="bpe:300").documents("test")
        texts = [document["text"] for document in itertools.islice(documents, num_sequences)]
    ids = [torch.tensor(tokenizer(text).input_ids, dtype=torch.int64) for text in texts]
    pieces = [piece for sequence in ids for piece in sequence.split(length) if len(piece) > 1]
    return pieces[:num_sequences]
