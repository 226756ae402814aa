"""The copy that training waits for: of everything, exact, into the same memory each time."""

from typing import Any

import pytest
import torch
from tenfold.callbacks.excp import host_memory
from tenfold.callbacks.excp.host_memory import copy_to_host, same_bits
from tenfold.callbacks.excp.staging import HostStage

LARGE = 1 << 15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, LARGE + 1)])
def test_copies_and_comparisons_are_exact(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = (torch.randn(shape) * 50).to(dtype)
    target = torch.empty_like(source)
    copy_to_host(source, target)
    assert torch.equal(source, target)
    assert same_bits(source, target)
    if source.numel():
        target.view(-1)[-1] = target.view(-1)[-1].logical_not().to(dtype)
        assert not same_bits(source, target)


def test_views_are_copied_as_they_look() -> None:
    base = torch.randn(300, 400)
    for view in (base.t(), base[:, ::2], base[10:200, 3:]):
        target = torch.empty(view.shape)
        copy_to_host(view, target)
        assert torch.equal(target, view)
        assert same_bits(view, target)


def test_nan_and_signed_zero_are_bits() -> None:
    values = torch.full((LARGE,), float("nan"))
    assert same_bits(values, values.clone())
    assert not same_bits(torch.zeros(LARGE), -torch.zeros(LARGE))
    assert not same_bits(torch.zeros(4), torch.zeros(4, dtype=torch.int32))
    assert not same_bits(torch.zeros(4), torch.zeros(2, 2))


def test_without_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_MEMCMP", None)
    values = torch.randn(LARGE)
    other = values.clone()
    assert same_bits(values, other)
    other[-1] += 1
    assert not same_bits(values, other)


def state(seed: int) -> dict[str, Any]:
    weight = torch.randn(50, 60, generator=torch.Generator().manual_seed(seed))
    return {
        "state_dict": {"w": weight, "tied": weight, "count": torch.tensor(seed)},
        "optimizer_states": [{"state": {0: {"exp_avg": weight * 2, "exp_avg_sq": weight**2}}}],
        "global_step": seed,
        "list": [seed, {"deep": [seed]}],
    }


def test_staged_states_share_no_memory_with_the_live_one_and_keep_ties() -> None:
    stage = HostStage()
    live = state(1)
    staged = stage.stage(live).checkpoint
    live["state_dict"]["w"] += 1
    live["list"][1]["deep"].append(2)
    assert torch.equal(staged["state_dict"]["w"], state(1)["state_dict"]["w"])
    assert staged["list"] == [1, {"deep": [1]}]
    assert staged["state_dict"]["w"] is staged["state_dict"]["tied"]


def test_weights_of_the_state_before_are_left_alone_and_the_rest_is_used_again() -> None:
    stage = HostStage()
    first = stage.stage(state(1))
    weights, moment = first.weights()["w"], first.checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]
    second = stage.stage(state(2))
    assert torch.equal(weights, state(1)["state_dict"]["w"])
    memory = {tensor.data_ptr() for tensor in second.tensors.values()}
    assert moment.data_ptr() in memory
    third = stage.stage(state(3))
    assert weights.data_ptr() in {tensor.data_ptr() for tensor in third.tensors.values()}
    assert torch.equal(second.weights()["w"], state(2)["state_dict"]["w"])
    # one set of weights, two moments and a scalar, tied weights counted once
    assert third.num_bytes == 3 * 50 * 60 * 4 + 8


def test_a_state_is_recognised_by_step_and_bits() -> None:
    stage = HostStage()
    assert not stage.repeats(state(1))
    stage.stage(state(1))
    assert stage.repeats(state(1) | {"note": 5})
    assert not stage.repeats(state(1) | {"global_step": 2})
    assert not stage.repeats({key: value for key, value in state(1).items() if key != "global_step"})
    other = state(1)
    other["optimizer_states"][0]["state"][0]["exp_avg_sq"][3, 4] += 1
    assert not stage.repeats(other)
    other = state(1)
    del other["state_dict"]["count"]
    assert not stage.repeats(other)
    again = stage.again(state(1) | {"note": 5})
    assert again.checkpoint["note"] == 5
    assert stage.held is not None
    assert again.checkpoint["state_dict"]["w"] is stage.held.checkpoint["state_dict"]["w"]
