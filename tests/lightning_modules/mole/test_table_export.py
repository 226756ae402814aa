"""Streaming the table: independent of the chunk size, inside the stated memory, and nothing half-written."""

import errno
import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.lightning_modules.decoder import DecoderForCausalLM, decoder_config
from tenfold.lightning_modules.mole.convert import (
    TableError,
    export_lookup,
    new_folder,
    plan_table,
    table_chunks,
    write_table,
)
from tenfold.lightning_modules.mole.table import TABLE_FILE, LookupTable

Model = Callable[..., DecoderForCausalLM]


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_rows_do_not_depend_on_the_chunk_size(dtype: Any, small_model: Model, tmp_path: Path) -> None:
    model = small_model("mole")
    whole = plan_table(model, dtype, 2**30)
    assert whole.chunk_ids == 61
    per_id = whole.working_bytes - plan_table(model, dtype, whole.working_bytes - 1).working_bytes
    fixed = whole.working_bytes - 61 * per_id
    tables = []
    for chunk_ids in (1, 7, 60, 61):
        limit = fixed + chunk_ids * per_id
        assert plan_table(model, dtype, limit).chunk_ids == chunk_ids
        steps: list[int] = []
        write_table(model, tmp_path / str(chunk_ids), dtype=dtype, memory_limit_bytes=limit, progress=steps.append)
        assert sum(steps) == 61
        assert max(steps) == chunk_ids
        tables.append(LookupTable.open(tmp_path / str(chunk_ids), "memory").values.double())
    # matrix products of other shapes may round differently, in float64 before the cast
    step = torch.finfo(getattr(torch, dtype)).eps
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], rtol=step, atol=1e-12)
    with pytest.raises(ValueError, match=f"memory limit of {fixed + per_id - 1} bytes is below the {fixed + per_id} "):
        plan_table(model, dtype, fixed + per_id - 1)


@pytest.mark.parametrize(
    ("kind", "num_experts", "chunk_ids", "model_dtype"),
    [
        ("float32", 6, 500, torch.float32),
        ("bfloat16", 1, 5, torch.float32),
        ("float32", 1, 500, torch.bfloat16),
        ("bfloat16", 6, 5, torch.bfloat16),
        ("int8", 6, 500, torch.float32),
        ("nf4", 6, 500, torch.bfloat16),
        ("nf3", 6, 500, torch.float32),
    ],
)
def test_working_memory_stays_under_the_stated_bound(
    kind: Any, num_experts: int, chunk_ids: int, model_dtype: torch.dtype, tmp_path: Path
) -> None:
    # with narrow experts it is the quantising that takes the memory
    options = {"num_experts": num_experts, "expert_intermediate_size": 256 if "float" in kind else 32}
    fields = {"vocab_size": 1500, "num_hidden_layers": 3, "hidden_size": 64, "feed_forward_options": options}
    model = DecoderForCausalLM(decoder_config("mole-tiny-4e", **fields)).to(model_dtype)
    how = {"dtype": kind} if "float" in kind else {"dtype": "float32", "quantisation": kind}
    whole = plan_table(model, memory_limit_bytes=2**30, **how)
    per_id = whole.working_bytes - plan_table(model, memory_limit_bytes=whole.working_bytes - 1, **how).working_bytes
    plan = plan_table(model, memory_limit_bytes=whole.working_bytes - (1500 - chunk_ids) * per_id, **how)
    assert plan.chunk_ids == chunk_ids
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for _ in table_chunks(model, plan, error=TableError()):
            pass
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    allocated = [event["args"]["Total Allocated"] for event in events]
    before = allocated[0] - events[0]["args"]["Bytes"]
    peak = max(allocated) - before
    assert peak <= plan.working_bytes
    # a bound several times too high would waste what the user allows; with few ids it is the weights of a layer, which
    # are copied for 16-bit models only
    if chunk_ids == 500 or model_dtype == torch.bfloat16:
        assert peak > 0.45 * plan.working_bytes


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """The system refuses writes beyond so many bytes of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_refuses_leaves_nothing(small_model: Model, tmp_path: Path) -> None:
    model, steps = small_model("mole"), []
    plan = plan_table(model, "float32", 2**30)
    limit = (plan.working_bytes - plan_table(model, "float32", plan.working_bytes - 1).working_bytes) * 20
    with file_size_limit(plan.file_bytes // 2), pytest.raises(OSError, match=str(errno.EFBIG)):
        export_lookup(model, tmp_path / "x", dtype="float32", memory_limit_bytes=limit, progress=steps.append)
    # it was half-way: some chunks were written
    assert 0 < sum(steps) < 61
    assert list(tmp_path.iterdir()) == []
    # the same place can be used again
    export_lookup(model, tmp_path / "x", dtype="float32")
    assert (tmp_path / "x" / TABLE_FILE).exists()


def test_an_interrupt_leaves_nothing(small_model: Model, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_lookup(small_model("mole"), tmp_path / "x", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_new_folder_takes_empty_folders_and_clears_stale_leftovers(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / ".x.tmp").mkdir()
    (tmp_path / ".x.tmp" / "leftover").touch()
    with new_folder(tmp_path / "x") as folder:
        (folder / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["file"]
    for taken in (tmp_path / "x", tmp_path / "x" / "file"):
        with pytest.raises(ValueError, match="exists; name a new folder or remove it"), new_folder(taken):
            pass


def test_metadata_names_what_the_table_was_made_from(small_model: Model, tmp_path: Path) -> None:
    model = small_model("mole")
    first = write_table(model, tmp_path / "a", dtype="float64")
    assert first["shape"] == [61, 2, 3, 32]
    assert first["layout"] == "[vocab, layer, expert, hidden]"
    assert set(first["digests"]) == {"model.embed_tokens.weight"} | {
        f"model.layers.{layer}.feed_forward.lookup.{name}"
        for layer in range(2)
        for name in ("norm.weight", "experts.up", "experts.down")
    }
    assert LookupTable.open(tmp_path / "a").metadata == first
    for name in first["digests"]:
        changed = small_model("mole")
        with torch.no_grad():
            dict(changed.named_parameters())[name].view(-1)[0] += 1e-9
        second = write_table(changed, tmp_path / "b", dtype="float64")
        assert {key for key in first["digests"] if first["digests"][key] != second["digests"][key]} == {name}


def test_export_leaves_the_training_form_as_it_was(small_model: Model, tmp_path: Path) -> None:
    model = small_model("mole", dtype=torch.bfloat16).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_lookup(model, tmp_path / "x")
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.bfloat16
