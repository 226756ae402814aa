"""How evenly a model's hash tables are used: histograms, entropy and dead rows on validation data, with a picture."""

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

# of `TableUse.histogram`: hits over those of even use
EDGES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class TableUse:
    """Hits of every row of one layer's tables.

    Args:
        num_bits: bits of a bucket, tau.
        reachable: rows of each table that an input can reach.
    """

    def __init__(self, num_bits: int, reachable: list[int]) -> None:
        self.num_bits, self.reachable = num_bits, reachable
        self.counts = torch.zeros(len(reachable), 1 << num_bits, dtype=torch.int64)

    def add(self, buckets: Tensor) -> None:
        """Count (..., K) buckets."""
        num_tables, num_rows = self.counts.shape
        places = buckets.reshape(-1, num_tables) + torch.arange(num_tables, device=buckets.device) * num_rows
        hits = torch.bincount(places.reshape(-1), minlength=self.counts.numel())
        self.counts += hits.view_as(self.counts).cpu()

    @property
    def entropy_share(self) -> Tensor:
        """Entropy of each table's use as a share of the bits that can differ: (K,) float64, 1 for even use."""
        share = self.counts.double() / self.counts.sum(1, keepdim=True).clamp_min(1)
        bits = torch.special.entr(share).sum(1) / math.log(2)
        return bits / torch.tensor(self.reachable, dtype=torch.float64).log2()

    @property
    def histogram(self) -> list[int]:
        """Reachable rows by hits relative to even use of their table: none, then up to each of `EDGES`, then more."""
        even = self.counts.sum(1, keepdim=True) / torch.tensor(self.reachable).unsqueeze(1)
        relative = self.counts / even.clamp_min(1e-9)
        bins = torch.bucketize(relative, torch.tensor((0.0, *EDGES)))
        found = torch.bincount(bins.flatten(), minlength=len(EDGES) + 2)
        # rows that nothing can reach are not dead
        found[0] -= self.counts.numel() - sum(self.reachable)
        return found.tolist()

    @property
    def dead_rows(self) -> int:
        """Rows that could have been reached and were not."""
        return sum(self.reachable) - int((self.counts > 0).sum())


def shares(uses: dict[str, TableUse]) -> dict[str, float]:
    """Entropy over bits, mean and lowest of all tables, and the share of rows that nothing reached."""
    entropies = torch.cat([use.entropy_share for use in uses.values()])
    rows = sum(sum(use.reachable) for use in uses.values())
    return {
        "buckets/entropy_share": float(entropies.mean()),
        "buckets/entropy_share_min": float(entropies.min()),
        "buckets/dead_rows_share": sum(use.dead_rows for use in uses.values()) / rows,
    }


class BucketUse(Callback):
    """Counts into which buckets validation tokens fall, in every module with `buckets(x)` and `reachable_buckets`.

    Logs `buckets/entropy_share` (mean over all tables of entropy over bits), `buckets/entropy_share_min` and
    `buckets/dead_rows_share`. Beside the metrics of a CSV logger it writes `bucket_use.jsonl` (one line per validation
    with all tables' values and each layer's histogram of hits) and, where matplotlib is installed, the picture
    `bucket_use.png`; a W&B logger gets the picture. Entropy is only as good as the number of tokens behind it: with n
    tokens it is about (rows - 1) / (2 n ln 2) bits too low, so count several tokens per row.

    Args:
        max_batches: validation batches to count, per process; the counts are those of the first process.
        picture: draw.

    Raises:
        ValueError: `max_batches` is below 1, or the model has no such modules.
    """

    def __init__(self, *, max_batches: int = 8, picture: bool = True) -> None:
        if max_batches < 1:
            raise ValueError(f"max_batches is {max_batches}; at least 1 batch has to be counted")
        self.max_batches, self.picture = max_batches, picture
        self.uses: dict[str, TableUse] = {}
        self._handles: list[Any] = []

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        layers = {name: part for name, part in pl_module.named_modules() if hasattr(part, "reachable_buckets")}
        if not layers:
            raise ValueError("BucketUse needs a model with memory layers, this one has none; leave the callback out")
        self.uses = {}
        for name, layer in layers.items():
            # names as in the exported model
            self._count(name.removeprefix("model.").removeprefix("model."), layer)

    def _count(self, name: str, layer: Any) -> None:
        use = self.uses[name] = TableUse(layer.num_bits, layer.reachable_buckets)

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            use.add(layer.buckets(inputs[0]))

        self._handles.append(layer.register_forward_pre_hook(before))

    @override
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if batch_idx + 1 >= self.max_batches:
            self._stop()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()
        values = shares(self.uses)
        pl_module.log_dict(values)
        if trainer.is_global_zero and not trainer.sanity_checking:
            self._write(trainer, values)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _write(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        step = trainer.global_step
        text = f"{values['buckets/entropy_share']:.1%} of their bits (lowest {values['buckets/entropy_share_min']:.1%})"
        rank_zero_info(f"buckets step {step}: {text}, {values['buckets/dead_rows_share']:.1%} of the rows dead")
        tables = {
            name: {
                "num_bits": use.num_bits,
                "dead_rows": use.dead_rows,
                "entropy_share": use.entropy_share.tolist(),
                "histogram": use.histogram,
            }
            for name, use in self.uses.items()
        }
        title = f"bucket use at step {step}"
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "bucket_use.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values, "tables": tables}) + "\n")
                if self.picture and (figure := draw(self.uses, title)) is not None:
                    figure.savefig(folder / "bucket_use.png", dpi=100)
            elif isinstance(logger, WandbLogger) and self.picture and (figure := draw(self.uses, title)) is not None:
                logger.log_image("buckets/use", [figure], step=step)


def draw(uses: dict[str, TableUse], title: str) -> Any:
    """Figure with each layer's rows sorted by hits (left) and each table's entropy (right); None without matplotlib.

    Hits are relative to even use, the mean over a layer's tables.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, use in uses.items():
        full = [k for k, rows in enumerate(use.reachable) if rows == use.counts.shape[1]]
        counts = use.counts[full or slice(None)].double()
        relative = counts / counts.mean(1, keepdim=True).clamp_min(1e-9)
        curve = relative.sort(1, descending=True).values.mean(0)
        left.plot(torch.linspace(0, 1, len(curve)).tolist(), curve.tolist(), label=name)
        right.plot(sorted(use.entropy_share.tolist()), label=name)
    left.axhline(1, color="black", linewidth=0.5)
    left.set(xlabel="rows of a table, most used first (share)", ylabel="hits relative to even use", yscale="symlog")
    right.set(xlabel="tables, lowest first", ylabel="entropy as a share of the bits", ylim=(0, 1.02))
    if len(uses) <= 12:
        right.legend(fontsize="xx-small")
    figure.suptitle(title)
    return figure
