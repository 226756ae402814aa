"""The demo's stages: train, export, score, compare, measure. Each is done once; an interrupted demo goes on."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import cli

CONFIGS = Path(__file__).parent
MODELS = ("dense", "moe", "mole")
TASKS = ("wikipedia_bits_per_byte", "wikipedia_title_cloze")
# exact equality of the two forms is shown with a table in the precision of the weights
TABLE_DTYPE = "float32"
LOOKUP = "mole-lookup"
NUM_COMPARED_SEQUENCES = 8
NUM_GREEDY_TOKENS = 128


class Demo:
    """One demo in one folder.

    Args:
        folder: where everything goes.
        size: `tiny` for CPUs, `small` for a GPU.
        seed: of initialisation and data order.
        wandb: `off`, `offline` or `online`.
        max_steps: optimiser steps of each model; the configuration's by default.
        limit: documents per task; all by default.
    """

    def __init__(
        self, folder: Path, *, size: str, seed: int, wandb: str, max_steps: int | None = None, limit: int | None = None
    ) -> None:
        self.folder, self.size, self.seed, self.wandb = folder, size, seed, wandb
        self.max_steps, self.limit = max_steps, limit
        self.seconds: dict[str, float] = {}
        self._stages = folder / "stages"
        self._stages.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Do a piece of work unless an earlier, interrupted demo has done it; returns what it gave (plain data)."""
        record = self._stages / f"{name.replace(' ', '-')}.json"
        if record.exists():
            done = json.loads(record.read_text(encoding="utf-8"))
            print(f"\n== {name}: done before", flush=True)
        else:
            print(f"\n== {name}", flush=True)
            start = time.perf_counter()
            done = {"result": work()}
            done["seconds"] = time.perf_counter() - start
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(done), encoding="utf-8")
            partial.replace(record)
        self.seconds[name] = round(done["seconds"], 2)
        return done["result"]

    def command(self, *argv: str | Path) -> None:
        """Run one of the user's commands in this process, shown as it would be typed.

        Raises:
            SystemExit: with the command's status when it fails.
        """
        words = [str(word) for word in argv]
        print("$ tenfold " + shlex.join(words), flush=True)
        if status := cli.main(words):
            raise SystemExit(status)

    def path(self, *parts: str) -> Path:
        """A path in the demo's folder."""
        return self.folder.joinpath(*parts)

    def train(self, name: str) -> None:
        """Train one model; goes on from its last checkpoint."""
        files = [CONFIGS / "base.yaml", CONFIGS / f"{name}.yaml"]
        overrides = []
        if self.size != "tiny":
            files.append(CONFIGS / f"{self.size}.yaml")
            preset = {"dense": "dense-{}", "moe": "moe-{}-10e", "mole": "mole-{}-4e"}[name].format(self.size)
            overrides.append(f"--model.init_args.model={preset}")
        if self.max_steps:
            overrides += [f"--trainer.max_steps={self.max_steps}", f"--trainer.val_check_interval={self.max_steps}"]
        self.command(
            "fit",
            *(word for file in files for word in ("--config", file)),
            f"--seed_everything={self.seed}",
            f"--run.root={self.folder}",
            "--run.experiment=train",
            f"--run.name={name}",
            f"--run.wandb={self.wandb}",
            "--ckpt_path=auto",
            *overrides,
        )

    def checkpoint(self, name: str) -> Path:
        """The last checkpoint of a model."""
        return self.path("train", name, "checkpoints", "last.ckpt")

    def export(self) -> None:
        """Every model as a plain folder, and MoLE as a table as well."""
        for name in MODELS:
            if not self.path("models", name).exists():
                self.command("export", "--model", self.checkpoint(name), "--output", self.path("models", name))
        if not self.path("models", LOOKUP).exists():
            self.command(
                *("export", "--form", "lookup", "--model", self.checkpoint("mole"), "--dtype", TABLE_DTYPE),
                *("--output", self.path("models", LOOKUP)),
            )

    def score(self, name: str) -> dict[str, Any]:
        """Scores of one form through lm-eval: {task: {metric: value}} with standard errors under `metric_stderr`."""
        output = self.path("scores", name)
        limit = ("--limit", str(self.limit)) if self.limit else ()
        self.command(
            *("evaluate", "--model", self.path("models", name), "--tasks", ",".join(TASKS)),
            *("--output", output, "--overwrite", *limit),
        )
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        scores = {}
        for task in TASKS:
            numbers = {
                metric.replace(",none", ""): value
                for metric, value in results["results"][task].items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            # lm-eval gives no errors for what it sums over documents
            ours = results["tenfold"]["standard_errors"].get(task, {})
            scores[task] = numbers | {f"{metric.replace(',none', '')}_stderr": value for metric, value in ours.items()}
        return scores

    def compare(self) -> dict[str, Any]:
        """Whether both forms of MoLE give the same logits and text on held-out text; bytes that a token reads."""
        import torch

        from ...datamodules import TextDataModule
        from ...lightning_modules.mole.convert import compare_forms, count_bytes_per_token
        from ..model_source import load_source, source_tokenizer

        training = load_source(str(self.path("models", "mole")))
        lookup = load_source(str(self.path("models", LOOKUP))).model
        tokenizer = source_tokenizer(training)
        documents = list(TextDataModule("asset:wikipedia-summaries", **self.data_options()).documents("test"))
        text = [document["text"] for document in documents if len(document["text"]) > 600][:NUM_COMPARED_SEQUENCES]
        ids = torch.tensor([tokenizer(part).input_ids[:96] for part in text])
        return {
            "lookup_equals_experts": compare_forms(training.model, lookup, ids, num_greedy_tokens=NUM_GREEDY_TOKENS),
            "bytes_per_token": count_bytes_per_token(lookup, int(ids[0, 0])),
        }

    def data_options(self) -> dict[str, Any]:
        """Options of the demo's data module, without those that only training needs."""
        import yaml

        options = yaml.safe_load((CONFIGS / "base.yaml").read_text(encoding="utf-8"))["data"]["init_args"]
        return {key: options[key] for key in ("tokenizer", "val_fraction", "test_fraction")}
