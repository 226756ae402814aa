"""`tenfold demo`: the main job on real text, from training to score."""

import argparse
from functools import partial
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="tenfold demo",
        description="Trains dense, MoE and MoLE decoders on Wikipedia summaries, writes MoLE's experts into a lookup "
        "table, scores all forms through lm-eval and writes report.html and summary.json. An interrupted demo goes on "
        "where it stopped.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the demo (runs/demo)")
    parser.add_argument("--gpu", action="store_true", help="the larger size; the default where there is a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and data order (0)")
    parser.add_argument(
        "--wandb", choices=("off", "offline", "online"), default="offline", help="W&B logging (offline)"
    )
    parser.add_argument("--max-steps", type=int, help="optimiser steps of each model, for a quick look")
    parser.add_argument("--limit", type=int, help="documents per task, for a quick look")
    return parser


def set_aside(folder: Path) -> None:
    """Move a finished demo out of the way, so that nothing is lost and nothing is mixed."""
    if not (folder / "summary.json").exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    folder.rename(target)
    print(f"the finished demo in {folder} is now in {target}")


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    from importlib.util import find_spec

    import torch

    from ..demo.measure import measure_forms
    from ..demo.report import summarise, write_report
    from ..demo.stages import LOOKUP, MODELS, Demo

    for package in ("lm_eval", "matplotlib"):
        if find_spec(package) is None:
            raise ValueError(
                f"the demo scores with lm-eval and needs {package}: pip install 'tenfold[data,eval,wandb]'"
            )
    if args.gpu and not torch.cuda.is_available():
        raise ValueError("--gpu: torch sees no GPU; leave --gpu out")
    wandb = args.wandb if find_spec("wandb") else "off"
    size = "small" if torch.cuda.is_available() else "tiny"
    set_aside(args.output)
    demo = Demo(args.output, size=size, seed=args.seed, wandb=wandb, max_steps=args.max_steps, limit=args.limit)
    for name in MODELS:
        demo.stage(f"train {name}", partial(demo.train, name))
    demo.stage("export", demo.export)
    forms = (*MODELS, LOOKUP)
    scores = {name: demo.stage(f"score {name}", partial(demo.score, name)) for name in forms}
    comparison = demo.stage("compare the forms of mole", demo.compare)
    costs = demo.stage("measure", lambda: measure_forms({name: demo.path("models", name) for name in forms}))
    summary = summarise(demo, scores, comparison, costs)
    write_report(demo, summary)
    print(f"\nreport: {demo.path('report.html')}\nsummary: {demo.path('summary.json')}")
    return 0
