"""Experts divided over two gloo processes: loss, gradients, training and export are those of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.lightning_modules import DecoderForCausalLM, MoLELightning, decoder_config
from tenfold.lightning_modules.mole.convert import export_lookup
from tenfold.lightning_modules.mole.divided_experts import DividedExperts, divide_experts
from tenfold.lightning_modules.mole.table import TABLE_FILE, LookupTable

PREAMBLE = """
import os, sys, warnings
warnings.filterwarnings("ignore")
from pathlib import Path
import torch
import torch.distributed as dist
import tenfold.lightning_modules
from tenfold.lightning_modules import DecoderForCausalLM, MoLELightning, decoder_config
from tenfold.lightning_modules.mole.convert import export_lookup
from tenfold.lightning_modules.mole.divided_experts import divide_experts, whole_model
from torch.distributed.device_mesh import init_device_mesh

torch.set_num_threads(1)
rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
inputs = torch.load(folder / "inputs.pt")
config = decoder_config("mole-tiny-4e", **inputs["fields"])


def save(name, value):
    if rank == 0:
        torch.save(value, folder / name)


def build():
    model = DecoderForCausalLM(config).double()
    model.load_state_dict(inputs["state"])
    return model


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
"""
FIELDS = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


def run_processes(script: str, folder: Path, num_processes: int = 2) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "script.py").write_text(PREAMBLE + script)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    # as torchrun would start them
    shared |= {"TORCHELASTIC_RUN_ID": "test", "LOCAL_WORLD_SIZE": str(num_processes), "GROUP_RANK": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, str(folder / "script.py"), str(folder)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        for process in running:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()


def make() -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = DecoderForCausalLM(decoder_config("mole-tiny-4e", **FIELDS))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


def batches(count: int) -> torch.Tensor:
    ids = torch.randint(61, (count, 2, 9), generator=torch.Generator().manual_seed(4))
    # ids that repeat within a process, and between the two
    ids[:, :, 3] = ids[:, :, 0]
    ids[1, :, 5] = ids[0, :, 5]
    return ids


STEP = """
dist.init_process_group("gloo")
ids = inputs["ids"][rank]
for name, division, shape, checkpointing in inputs["cases"]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data_parallel", "tensor_parallel"))
    model = build().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    divide_experts(model, mesh, division=division)
    here = sum(p.to_local().numel() for p in model.parameters())
    loss = loss_of(model, ids)
    loss.backward()
    grads = {key: p.grad.full_tensor() for key, p in model.named_parameters()}
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    # while evaluating, processes may have different numbers of tokens
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:, : 4 + rank], use_cache=False).logits
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, logits)
    whole = whole_model(model)
    save(name, {"loss": mean / dist.get_world_size(), "grads": grads, "logits": every, "local": here})
    if rank == 0:
        export_lookup(whole, folder / f"{name}-export", dtype="float64")
    dist.barrier()
dist.destroy_process_group()
"""
# by name: division, data-parallel and tensor-parallel processes, recomputed activations
TWO = [
    ("experts", "experts", (1, 2), False),
    ("width", "width", (1, 2), False),
    ("recomputed", "experts", (1, 2), True),
    ("fsdp-only", "experts", (2, 1), False),
]
FOUR = [("both-experts", "experts", (2, 2), False), ("both-width", "width", (2, 2), False)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    torch.save({"fields": FIELDS, "state": make().state_dict(), "ids": batches(2), "cases": TWO}, folder / "inputs.pt")
    run_processes(STEP, folder)
    return folder


def check_step(folder: Path, name: str, num_processes: int) -> None:
    found = torch.load(folder / name)
    model, ids = make().train(), batches(num_processes)
    one = ids.flatten(0, 1)
    # in double precision, which the model's own loss is not
    logits = model(input_ids=one, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), one[:, 1:].flatten())
    loss.backward()
    assert torch.allclose(found["loss"], loss, rtol=1e-12)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (found["grads"][key] - parameter.grad).abs().max() < 1e-10, key
    model.eval()
    for rank, logits in enumerate(found["logits"]):
        expected = model(input_ids=ids[rank][:, : 4 + rank], use_cache=False).logits
        assert (logits - expected).abs().max() < 1e-10
    experts = sum(p.numel() for layer in model.model.layers for p in layer.feed_forward.lookup.experts.parameters())
    dense = sum(p.numel() for p in model.parameters()) - experts
    # of two by two processes, each pair has all dense weights; vocabulary rows and experts divide by two unevenly
    assert experts / num_processes + dense / 2 == pytest.approx(found["local"], rel=0.02)
    export_lookup(make(), folder / f"{name}-one", dtype="float64")
    divided, plain = (LookupTable.open(folder / f"{name}-{kind}" / TABLE_FILE) for kind in ("export", "one"))
    assert torch.equal(divided.values, plain.values)
    assert divided.metadata == plain.metadata


@pytest.mark.parametrize("name", [case[0] for case in TWO])
def test_a_step_of_two_processes_is_that_of_one(name: str, two_processes: Path) -> None:
    check_step(two_processes, name, 2)


@pytest.mark.slow
def test_two_by_two_processes(tmp_path: Path) -> None:
    torch.save(
        {"fields": FIELDS, "state": make().state_dict(), "ids": batches(4), "cases": FOUR}, tmp_path / "inputs.pt"
    )
    run_processes(STEP, tmp_path, 4)
    for case in FOUR:
        check_step(tmp_path, case[0], 4)


TRAIN = """
import logging
import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

logging.getLogger("lightning.pytorch").addHandler(logging.FileHandler(folder / f"log-{rank}"))


def loader(ids):
    return DataLoader([{"input_ids": row, "labels": row, "num_bytes": torch.tensor(9)} for row in ids], batch_size=2)


# not the same everywhere: what rank 0 has drawn counts
torch.manual_seed(rank)
fields = {"preset": "mole-tiny-4e", **inputs["fields"]}
module = MoLELightning(fields, expert_division=inputs["division"], **inputs["options"])
strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2, save_distributed_checkpoint=False)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy=strategy, use_distributed_sampler=False, gradient_clip_val=0.5,
    enable_progress_bar=False, enable_model_summary=False, logger=False, enable_checkpointing=False, max_epochs=1,
)
# the second process has a sequence and a batch less to validate
val = inputs["ids"][2 + rank].repeat(2, 1)[: 3 - rank]
trainer.fit(module, loader(inputs["ids"][rank].repeat(3, 1)), loader(val))
save("val", float(trainer.callback_metrics["val/loss"]))
trainer.save_checkpoint(folder / "last.ckpt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("division", ["experts", "width"])
def test_lightning_trains_validates_and_saves_as_one_process(division: str, tmp_path: Path) -> None:
    import lightning.pytorch as pl
    from tenfold.experiments.model_source import load_source
    from torch.utils.data import DataLoader

    ids = batches(4)
    options = {"learning_rate": 1e-2, "warmup_ratio": 0.0}
    torch.save(
        {"fields": FIELDS, "state": {}, "ids": ids, "division": division, "options": options}, tmp_path / "inputs.pt"
    )
    run_processes(TRAIN, tmp_path)
    said = (tmp_path / "log-0").read_text()
    assert f"{sum(p.numel() for p in make().parameters()):,} parameters" in said
    assert "on 2 processes 0.00 GB each; experts divided by 2" in said
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    # one process with both batches in one
    torch.manual_seed(0)
    module = MoLELightning({"preset": "mole-tiny-4e", **FIELDS}, **options)
    rows = torch.cat([ids[:2]] * 3).view(3, 2, 2, 9).flatten(1, 2).flatten(0, 1)
    val = torch.cat([ids[2].repeat(2, 1)[:3], ids[3]])
    load = lambda part, size: DataLoader(  # noqa: E731
        [{"input_ids": row, "labels": row, "num_bytes": torch.tensor(9)} for row in part], batch_size=size
    )
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, gradient_clip_val=0.5, enable_checkpointing=False, **quiet)
    trainer.fit(module, load(rows, 4), load(val, 2))
    assert torch.load(tmp_path / "val") == pytest.approx(float(trainer.callback_metrics["val/loss"]), rel=1e-5)
    for key, value in module.state_dict().items():
        assert torch.allclose(checkpoint["state_dict"][key], value, rtol=1e-3, atol=2e-5), key
    # and it exports like any other checkpoint
    export_lookup(load_source(str(tmp_path / "last.ckpt")).model, tmp_path / "table", dtype="float32")
    plain = DecoderForCausalLM(decoder_config("mole-tiny-4e", **FIELDS))
    prefix = "model."
    plain.load_state_dict(
        {key.removeprefix(prefix): value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    )
    export_lookup(plain, tmp_path / "plain", dtype="float32")
    tables = [LookupTable.open(folder / TABLE_FILE).values for folder in (tmp_path / "table", tmp_path / "plain")]
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda mesh: divide_experts(torch.nn.Linear(2, 2), mesh), "only a decoder with feed_forward 'mole' has"),
        (
            lambda mesh: divide_experts(
                DecoderForCausalLM(
                    decoder_config("mole-tiny-4e", **FIELDS, feed_forward_options={"expert_evaluation": "naive"})
                ),
                mesh,
            ),
            "use expert_evaluation distinct",
        ),
        (
            lambda mesh: MoLELightning(expert_division="layers"),
            "expert_division 'layers' is neither 'experts' nor 'width'",
        ),
    ],
)
def test_what_cannot_be_divided(build: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(None)


def test_sizes_that_do_not_divide() -> None:
    class Mesh:
        def size(self) -> int:
            return 5

    experts = make().model.layers[0].feed_forward.lookup.experts
    with pytest.raises(ValueError, match="4 experts do not divide by 5 processes; use a divisor of 4"):
        DividedExperts(experts, Mesh(), "experts")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="24 hidden units of an expert do not divide by 5 processes"):
        DividedExperts(make().model.layers[0].feed_forward.lookup.experts, Mesh(), "width")  # type: ignore[arg-type]
