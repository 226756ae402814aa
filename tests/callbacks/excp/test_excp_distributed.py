"""Two processes on gloo: who writes, and that what each strategy loads is what one process reads from the files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import FSDPStrategy
from tenfold.callbacks import ExCPCheckpointIO, ExCPFSDPStrategy
from tenfold.callbacks.excp import ExCPOptions, load_checkpoint
from tenfold.callbacks.excp.container import is_save, read_identity
from tenfold.callbacks.excp.sharded import LIST, ExCPStorageReader, ExCPStorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

SCRIPT = '''
import json, os, sys, warnings
warnings.filterwarnings("ignore")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tenfold.callbacks import ExCPCheckpointIO, ExCPModelParallelStrategy
from tenfold.callbacks.excp import ExCPOptions

torch.set_num_threads(1)
folder, kind, output = sys.argv[1:]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is not None:
            return
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 97), nn.ReLU(), nn.Linear(97, 64))
        if kind.startswith("model_parallel"):
            from torch.distributed.fsdp import fully_shard
            for layer in (self.net[0], self.net[2]):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.net(batch[0]), batch[0].flip(1))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.trainer.model.parameters(), 1e-3, betas=(0.9, 0.95), foreach=False)


class Dump(Callback):
    """What training goes on from, in full, on the first process."""

    def on_train_start(self, trainer, module):
        if trainer.global_step == 0:
            return
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        if kind.startswith("model_parallel"):
            model, optimiser = get_state_dict(module, trainer.optimizers, options=options)
            state = optimiser.get("state", {})
        else:
            model = module.state_dict()
            state = {module_name(n): v for n, v in trainer.optimizers[0].state_dict()["state"].items()}
        if trainer.is_global_zero:
            torch.save({"model": model, "state": state, "step": trainer.global_step}, output)


def module_name(number):
    return ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"][number]


world = int(os.environ.get("WORLD_SIZE", 1))
strategies = {
    "ddp": lambda: "ddp",
    "model_parallel_full": lambda: ExCPModelParallelStrategy(world, 1, save_distributed_checkpoint=False),
    "model_parallel": lambda: ExCPModelParallelStrategy(world, 1),
}
data = TensorDataset(torch.randn(4000, 64, generator=torch.Generator().manual_seed(1)))
for steps, resume in ((15, None), (20, folder + "/step15.ckpt")):
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", devices=world, strategy=strategies[kind](),
        plugins=[ExCPCheckpointIO(ExCPOptions(min_numel=256), workers=1)], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Dump(), ModelCheckpoint(folder, "step{step}", auto_insert_metric_name=False, save_top_k=-1,
                                           every_n_train_steps=5)],
    )
    trainer.fit(Net(), DataLoader(data, batch_size=8), ckpt_path=resume)
    os.write(1, f"DONE {trainer.global_step}\\n".encode())
'''


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "train.py"
    path.write_text(SCRIPT)
    return path


def train(script: Path, folder: Path, kind: str) -> Any:
    """Trains for 15 steps, goes on to 20, and gives what the second part went on from."""
    output = script.with_name(f"{kind}.pt")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*map(str, [*launcher, script, folder, kind, output])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("DONE 20") == 2
    return torch.load(output, weights_only=True)


def assert_same(resumed: dict[str, Any], stored: dict[str, Any]) -> None:
    names = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert sorted(resumed["model"]) == sorted(names)
    for number, name in enumerate(names):
        assert torch.equal(resumed["model"][name], stored["state_dict"][name])
        expected = stored["optimizer_states"][0]["state"][number]
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(resumed["state"][name][kind], expected[kind]), (name, kind)
        assert float(resumed["state"][name]["step"]) == float(expected["step"])


@pytest.mark.parametrize("kind", ["ddp", "model_parallel_full"])
def test_full_checkpoints_of_two_processes(script: Path, tmp_path: Path, kind: str) -> None:
    resumed = train(script, tmp_path, kind)
    assert resumed["step"] == 15
    assert_same(resumed, load_checkpoint(tmp_path / "step15.ckpt"))
    # the chain goes on: what was read is what the next save is coded against
    assert [read_identity(tmp_path / f"step{step}.ckpt").position for step in (5, 10, 15, 20)] == [0, 1, 2, 3]
    assert load_checkpoint(tmp_path / "step20.ckpt")["global_step"] == 20


def test_shards_are_coded_by_each_process_and_read_by_any_number(script: Path, tmp_path: Path) -> None:
    two = train(script, tmp_path, "model_parallel")
    assert two["step"] == 15
    folder = tmp_path / "step15.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["meta.pt", "rank00000.ckpt", "rank00001.ckpt", LIST]
    )
    assert all(is_save(folder / f"rank0000{rank}.ckpt") for rank in (0, 1))
    assert [read_identity(folder / f"rank0000{rank}.ckpt").position for rank in (0, 1)] == [2, 2]
    # 97 rows over two processes: shards of 49 and 48
    entry = json.loads((folder / LIST).read_text())["entries"]["state_dict.net.0.weight"]
    assert [chunk["sizes"] for chunk in entry["chunks"]] == [[49, 64], [48, 64]]
    # one process, without any strategy, finds what the two went on from
    one: dict[str, Any] = {
        "state_dict": {name: torch.full_like(weight, 7) for name, weight in two["model"].items()},
        "optimizer_0": {
            "state": {
                name: {kind: torch.full_like(value, 7) for kind, value in values.items()}
                for name, values in two["state"].items()
            }
        },
    }
    dcp.load(one, storage_reader=ExCPStorageReader(folder), no_dist=True)
    for name, weight in two["model"].items():
        assert torch.equal(weight, one["state_dict"][name])
        for kind in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(two["state"][name][kind], one["optimizer_0"]["state"][name][kind])


def test_fsdp_is_handed_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # FSDP itself needs an accelerator: what it reads is looked at instead
    weight = torch.randn(70, 80)
    io = ExCPCheckpointIO(asynchronous=False)
    io.save_checkpoint({"state_dict": {"w": weight}, "epoch": 3}, tmp_path / "0.ckpt")
    io.teardown()
    read: list[Any] = []

    def load(self: Any, path: Path, weights_only: bool | None = None) -> dict[str, Any]:
        read.append((path, torch.load(path, weights_only=True) if path.exists() else None))
        return {}

    monkeypatch.setattr(FSDPStrategy, "load_checkpoint", load)
    strategy = ExCPFSDPStrategy(cluster_environment=LightningEnvironment(), parallel_devices=[torch.device("cpu")])
    strategy.checkpoint_io = io
    strategy.load_checkpoint(tmp_path / "0.ckpt")
    path, content = read[0]
    assert torch.equal(content["state_dict"]["w"], weight)
    assert content["epoch"] == 3
    assert not path.exists()
    strategy.load_checkpoint(tmp_path / "other.ckpt")
    assert read[-1][0] == tmp_path / "other.ckpt"


def test_sharded_fsdp_is_refused() -> None:
    with pytest.raises(ValueError, match="leave state_dict_type at 'full', or use ExCPModelParallelStrategy"):
        ExCPFSDPStrategy(state_dict_type="sharded")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_parts_of_a_shard_are_read_where_they_are(tmp_path: Path) -> None:
    weight = torch.randn(70, 80)
    state = {"model": {"w": weight}, "step": 3}
    writer = ExCPStorageWriter(tmp_path / "0", ExCPOptions(min_numel=256))
    dcp.save(state, storage_writer=writer, no_dist=True)
    writer.close()
    reader = ExCPStorageReader(tmp_path / "0")
    reader.read_metadata()
    place = MetadataIndex("model.w", torch.Size([0, 0]))
    target = torch.zeros(5, 7)
    committed = []

    class Planner:
        def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
            return target

        def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
            committed.append(item)

    item = ReadItem(LoadItemType.TENSOR, place, torch.Size([0, 0]), place, torch.Size([3, 11]), torch.Size([5, 7]))
    reader.read_data(LoadPlan([item]), Planner())  # type: ignore[arg-type]
    assert torch.equal(target, weight[3:8, 11:18])
    assert committed == [item]
    loaded = {"model": {"w": torch.zeros(70, 80)}, "step": 0}
    dcp.load(loaded, storage_reader=ExCPStorageReader(tmp_path / "0"), no_dist=True)
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], weight)


@pytest.mark.filterwarnings("ignore:a new chain begins", "ignore:torch.distributed is disabled")
def test_sharded_saves_form_a_chain_and_a_removed_one_is_collected(tmp_path: Path) -> None:
    weight = torch.randn(70, 80)
    writer = ExCPStorageWriter(options=ExCPOptions(min_numel=256))
    for number in range(3):
        weight = weight + 1e-3 * torch.randn(70, 80)
        dcp.save({"model": {"w": weight}}, checkpoint_id=tmp_path / f"{number}", storage_writer=writer, no_dist=True)
    store = tmp_path / "excp" / "rank00000"
    assert [read_identity(path).position for path in sorted(store.glob("*.excp"))] == [0, 1, 2]
    found = {"model": {"w": torch.zeros(70, 80)}}
    dcp.load(found, storage_reader=ExCPStorageReader(tmp_path / "2"), no_dist=True)
    assert 0 < (found["model"]["w"] - weight).norm() < 1e-3 * (70 * 80) ** 0.5
    for number in range(3):
        shutil.rmtree(tmp_path / f"{number}")
    new = torch.randn(90, 80)
    dcp.save({"model": {"v": new}}, checkpoint_id=tmp_path / "3", storage_writer=writer, no_dist=True)
    writer.close()
    assert [read_identity(path).position for path in store.glob("*.excp")] == [0]


def test_an_unfinished_or_altered_sharded_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"is not a finished sharded ExCP checkpoint: it has no tenfold_excp\.json"
    ):
        ExCPStorageReader(tmp_path).read_metadata()
    for text, message in (
        ('{"version": 2}', "version 2, this tenfold reads 1; upgrade tenfold"),
        ("{", "cannot be read"),
        ('{"version": 1}', "'entries'"),
    ):
        (tmp_path / LIST).write_text(text)
        with pytest.raises(ValueError, match=message):
            ExCPStorageReader(tmp_path).read_metadata()
