"""Scores of a fine-tuned SmolLM2 through lm-eval before and after its last save went through the codec.

The run is that of `tenfold bench excp`, coded as one chain; what is scored is the end of the chain, with all the errors
that it has. Models and results go to `runs/bench/excp-downstream`.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...callbacks.excp import ExCPOptions, Reference, encode
from ..excp.training import RunSettings, make_model, make_saves
from .excp import CASES, QUICK, folder_of, paper_settings
from .excp_chain import load
from .registry import Settings
from .rows import Row, ratio

FOLDER = Path("runs", "bench", "excp-downstream")
TASK, METRIC, LIMIT = "wikipedia_bits_per_byte", "bits_per_byte", 200
CODERS = {"defaults": ExCPOptions(), "paper-settings": paper_settings("")}


def end_of_chain(paths: list[Path], options: ExCPOptions) -> tuple[dict[str, Any], float]:
    """Weights that the last save of a chain gives back, and their error over the last step."""
    reference: Reference | None = None
    previous = None
    error = 0.0
    for path in paths:
        checkpoint = load(path)
        encoded = encode(checkpoint, reference, options, previous_weights=previous)
        reference, previous = encoded.reference, checkpoint["state_dict"]
        error = encoded.report.total.error_over_step
    assert reference is not None
    # tensors too small to gain are exact, and not in the reference
    return {**checkpoint["state_dict"], **reference.weights}, error


def score(name: str, weights: dict[str, Any], run: RunSettings, limit: int) -> float:
    """Bits per byte of held-out text with these weights."""
    from ...datamodules import TextDataModule
    from .. import cli

    model_folder, output = FOLDER / "models" / name, FOLDER / "scores" / name
    data = TextDataModule(tokenizer=run.tokenizer, sequence_length=run.sequence_length)
    data.prepare_data()
    data.setup("fit")
    assert data.vocab_size is not None
    model: Any = make_model(run, data.vocab_size)
    model.load_state_dict(weights)
    shutil.rmtree(model_folder, ignore_errors=True)
    model.save_pretrained(model_folder)
    data.tokenizer.save_pretrained(model_folder)
    arguments = ["--model", model_folder, "--tasks", TASK, "--limit", limit, "--output", output, "--overwrite"]
    status = cli.main(["evaluate", *map(str, arguments)])
    if status:
        raise RuntimeError(f"tenfold evaluate ended with status {status}")
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))["results"][TASK]
    return float(results[f"{METRIC},none"])


def run(settings: Settings) -> Iterator[Row]:
    """Bits per byte of exact and coded weights."""
    name = "scratch" if settings.quick else "finetune-135m"
    training = (QUICK if settings.quick else CASES)[name]
    limit = 4 if settings.quick else LIMIT
    paths = make_saves(training, folder_of(name, training), lambda line: print(f"{name}: {line}", flush=True))
    exact = score("exact", load(paths[-1])["state_dict"], training, limit)
    start = score("first-save", load(paths[0])["state_dict"], training, limit)
    yield Row(name, f"{METRIC} first save", start, "bits", peer="exact", peer_value=exact, ratio=ratio(start, exact))
    for coder, options in CODERS.items():
        weights, error = end_of_chain(paths, options)
        bits = score(coder, weights, training, limit)
        case = f"{name} {coder}"
        yield Row(case, METRIC, bits, "bits", peer="exact", peer_value=exact, ratio=ratio(bits, exact))
        yield Row(case, "error_over_step", error, "of the step")
