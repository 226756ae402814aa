"""Two processes on gloo, columns of tables and FSDP2 shards: losses, gradients and resumed runs equal one process's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tenfold.lightning_modules import MemoryLayer
from tenfold.lightning_modules.memoryformer.sharding import shard_columns

COMMON = """
import copy, json, os, sys, warnings
warnings.filterwarnings("ignore")
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tenfold.lightning_modules import MemoryFormerLightning, MemoryLayer

torch.set_num_threads(1)
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
FIELDS = {
    # five bits do not divide the width; 72 and 35 columns, the latter odd
    "hash": {"preset": "memoryformer-tiny", **SIZES, "projection_options": {"num_bits": 5},
             "feed_forward_options": {"num_bits": 5, "extra_bits": 2}},
    "ngram": {"preset": "ngram-tiny", **SIZES,
              "feed_forward_options": {"key": "ngram_hash", "num_rows": 32, "orders": [2, 3]}},
}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value
"""

DIRECT = (
    COMMON
    + """
from torch.distributed.device_mesh import init_device_mesh
from tenfold.lightning_modules.memoryformer.module import modules_with_tables
from tenfold.lightning_modules.memoryformer.sharding import shard_columns

mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
layer = MemoryLayer(12, 7, num_bits=5).double()
shared = copy.deepcopy(layer)
# every rank starts from its own values: those of rank 0 count
torch.manual_seed(dist.get_rank())
if dist.get_rank():
    torch.nn.init.normal_(shared.table)
shard_columns([shared], mesh)
assert shared.table.to_local().shape[1] == (4, 3)[dist.get_rank()]
torch.manual_seed(1)
x, grad = torch.randn(3, 5, 12, dtype=torch.float64), torch.randn(3, 5, 7, dtype=torch.float64)
found = []
for part in (layer, shared):
    inputs = x.clone().requires_grad_()
    out = part(inputs)
    out.backward(grad)
    found.append([out, inputs.grad, whole(part.table.grad), part.bias.grad])
for one, other in zip(*found):
    torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-13)
# one token of one dimension, and none
torch.testing.assert_close(shared(x[0, 0]), layer(x[0, 0]))
assert shared(x[:0]).shape == (0, 5, 7)
for fields in FIELDS.values():
    torch.manual_seed(2)
    module = MemoryFormerLightning(fields)
    module.configure_model()
    model, other = module.model.double(), copy.deepcopy(module.model.double())
    shard_columns(modules_with_tables(other), mesh)
    assert sum(isinstance(p, DTensor) for p in other.parameters()) == (6 if fields is FIELDS["hash"] else 2)
    ids = torch.randint(61, (2, 9))
    losses = [m(input_ids=ids, labels=ids, use_cache=False).loss for m in (model, other)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, atol=1e-12, rtol=1e-12)
    for (name, one), two in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(one.grad, whole(two.grad), atol=1e-12, rtol=1e-10, msg=name)
os.write(1, b"SAME\\n")
dist.destroy_process_group()
"""
)

TRAINED = (
    COMMON
    + """
import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

folder, kind = sys.argv[1:]
world = int(os.environ.get("WORLD_SIZE", 1))
sizes = {"columns": (1, 2), "fsdp": (2, 1), "ddp": (2, 1), "one": (1, 1)}[kind]


class Text(pl.LightningDataModule):
    vocab_size = 61

    def train_dataloader(self):
        ids = torch.randint(61, (24, 8), generator=torch.Generator().manual_seed(0))
        # data-parallel processes take every other sequence of a batch, the others the same
        ids = ids[int(os.environ.get("RANK", 0)) % sizes[0] :: sizes[0]]
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=4 // sizes[0])

    # an epoch that ends without a validation is begun again by a resumed run
    val_dataloader = train_dataloader


class Record(Callback):
    def __init__(self):
        self.gradients = self.weights = None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            # as clipped
            self.gradients = {n: whole(p.grad).clone() for n, p in module.named_parameters()}

    def on_train_end(self, trainer, module):
        self.weights = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}


def fit(steps, ckpt_path=None, saved=None):
    # rank 1 draws other initial weights, which must not count
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    record = Record()
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=world, logger=False, enable_progress_bar=False,
        strategy={"one": "auto", "ddp": "ddp"}.get(kind) or ModelParallelStrategy(*sizes),
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        callbacks=[record], gradient_clip_val=0.01,
    )
    rule = "lazy_adam" if kind == "ddp" else "adamw"
    module = MemoryFormerLightning(FIELDS["hash"], learning_rate=1e-3, total_steps=12, table_optimizer=rule)
    # on disk, read again by the same strategy
    trainer.fit(module, Text(), ckpt_path=ckpt_path)
    if saved:
        trainer.save_checkpoint(saved)
    return record


record = fit(12) if world > 1 else fit(1)
resumed = record
if world > 1:
    fit(6, saved=folder + "/half.ckpt")
    resumed = fit(12, ckpt_path=folder + "/half.ckpt")
for name, value in record.weights.items():
    assert torch.equal(value, resumed.weights[name]), name
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(record.gradients, folder + "/gradients.pt")
os.write(1, b"RESUMED\\n")
"""
)


def run(script: str, tmp_path: Path, *arguments: str, processes: int = 2) -> None:
    """Start the script and wait for what each process says at its end."""
    path = tmp_path / "script.py"
    path.write_text(script)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, str(path), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("SAME") + done.stdout.count("RESUMED") == processes


def test_columns_on_two_processes_give_the_loss_and_gradients_of_one(tmp_path):
    run(DIRECT, tmp_path)


@pytest.mark.slow
def test_lightning_clips_saves_and_resumes_sharded_tables(tmp_path):
    found = {}
    for kind, processes in (("one", 1), ("columns", 2), ("fsdp", 2), ("ddp", 2)):
        folder = tmp_path / kind
        folder.mkdir()
        run(TRAINED, folder, str(folder), kind, processes=processes)
        found[kind] = torch.load(folder / "gradients.pt", weights_only=True)
    for kind in ("columns", "fsdp", "ddp"):
        assert found[kind].keys() == found["one"].keys()
        torch.testing.assert_close(found[kind], found["one"], atol=1e-7, rtol=1e-4)
    norm = torch.nn.utils.get_total_norm(list(found["columns"].values()))
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_tables_that_cannot_be_sharded_are_refused():
    class Mesh:
        def size(self) -> int:
            return 8

    with pytest.raises(ValueError, match="a table of 7 columns cannot be sharded over 8 ranks"):
        shard_columns([MemoryLayer(8, 7, num_bits=4)], Mesh())  # type: ignore[arg-type]
    trained = MemoryLayer(8, 9, num_bits=4)
    trained(torch.ones(8)).sum().backward()
    with pytest.raises(ValueError, match="sharded already or has a gradient"):
        shard_columns([trained], Mesh())  # type: ignore[arg-type]
