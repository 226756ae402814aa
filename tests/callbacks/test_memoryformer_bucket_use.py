"""BucketUse: histograms, entropy and dead rows against counting by hand; files; refusals."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tenfold.callbacks import BucketUse
from tenfold.callbacks.bucket_use import TableUse, draw
from torch import nn
from torch.utils.data import DataLoader


class Hashing(nn.Module):
    """Two tables of two bits; the second sub-vector has one value only."""

    num_bits = 2
    reachable_buckets = (4, 2)

    def buckets(self, x):
        positive = (x >= 0).long()
        return torch.stack([2 * positive[..., 0] + positive[..., 1], 2 * positive[..., 2] + 1], dim=-1)

    def forward(self, x):
        return x


class Module(pl.LightningModule):
    def __init__(self, part):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 3), part)

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().sum()

    def validation_step(self, batch, batch_idx):
        self.model(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))


def fit(folder, callback, part=None, **options):
    torch.manual_seed(0)
    module = Module(part or Hashing())
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=CSVLogger(folder), callbacks=[callback], log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, batch_size=10), DataLoader(DATA, batch_size=10))
    return module, trainer


@pytest.mark.parametrize("max_batches", [3, 100])
def test_the_logged_values_are_those_counted_by_hand(max_batches, tmp_path):
    callback = BucketUse(max_batches=max_batches)
    module, trainer = fit(tmp_path, callback)
    with torch.no_grad():
        x = module.model[0](DATA[: 10 * max_batches])
    shares, dead = [], 0
    for patterns, bits in ((x[:, :2] >= 0, 2), (x[:, 2:] >= 0, 1)):
        counts = {}
        for row in map(tuple, patterns.tolist()):
            counts[row] = counts.get(row, 0) + 1
        entropy = -sum(n / len(x) * math.log2(n / len(x)) for n in counts.values())
        shares.append(entropy / bits)
        dead += 2**bits - len(counts)
    found = trainer.logged_metrics
    assert float(found["buckets/entropy_share"]) == pytest.approx(sum(shares) / 2, rel=1e-5)
    assert float(found["buckets/entropy_share_min"]) == pytest.approx(min(shares), rel=1e-5)
    assert float(found["buckets/dead_rows_share"]) == pytest.approx(dead / 6, abs=1e-6)
    # the sanity check leaves no line
    (line,) = (tmp_path / "lightning_logs" / "version_0" / "bucket_use.jsonl").read_text().splitlines()
    tables = json.loads(line)["tables"]
    histogram = tables["1"].pop("histogram")
    assert (sum(histogram), histogram[0]) == (6, dead)
    assert tables == {
        "1": {"num_bits": 2, "dead_rows": dead, "entropy_share": pytest.approx(shares)},
    }
    assert not module.model[1]._forward_pre_hooks
    pytest.importorskip("matplotlib")
    assert (tmp_path / "lightning_logs" / "version_0" / "bucket_use.png").read_bytes()[:4] == b"\x89PNG"


def test_even_and_single_use():
    use = TableUse(3, [8, 8])
    use.add(torch.stack([torch.arange(8).repeat(5), torch.full((40,), 6)], dim=1))
    torch.testing.assert_close(use.entropy_share, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert use.dead_rows == 7
    assert use.counts.sum(1).tolist() == [40, 40]


def test_the_picture_shows_hits_relative_to_even_use():
    pytest.importorskip("matplotlib")
    use = TableUse(1, [2])
    use.add(torch.tensor([[0], [1], [1], [1]]))
    figure = draw({"layer": use}, "bucket use at step 7")
    curve, entropy = (axes.lines[0].get_ydata() for axes in figure.axes)
    assert list(curve) == [1.5, 0.5]
    assert list(entropy) == pytest.approx([-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))])


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="max_batches is 0"):
        BucketUse(max_batches=0)
    with pytest.raises(ValueError, match="this one has none; leave the callback out"):
        fit(tmp_path, BucketUse(), nn.Identity())


def test_the_histogram_counts_reachable_rows_by_hits_relative_to_even_use():
    use = TableUse(2, [4, 2])
    # first table: 8 hits, even use is 2 each; the second reaches two rows, even use is 4 each
    for first, second, times in ((0, 1, 5), (1, 1, 2), (3, 1, 1)):
        use.add(torch.tensor([[first, second]] * times))
    assert use.counts.tolist() == [[5, 2, 0, 1], [0, 8, 0, 0]]
    # relative: 2.5, 1, none, 0.5 and 2, none; edges 1/8, 1/4, 1/2, 1, 2, 4, 8
    assert use.histogram == [2, 0, 0, 1, 1, 1, 1, 0, 0]
    assert sum(use.histogram) == 6
    assert use.histogram[0] == use.dead_rows
