"""Which tensors of a checkpoint belong to which parameter."""

from typing import Any

import torch
from tenfold.callbacks.excp.tree import find_parameters, replace, tensors_of


def adam(*shapes: tuple[int, ...]) -> dict[int, Any]:
    return {
        i: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        for i, shape in enumerate(shapes)
    }


def pairs(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return {item.name: item.exp_avg and item.exp_avg[3] for item in find_parameters(checkpoint)}


def test_groups_by_decay_are_matched_in_order_and_by_shape() -> None:
    # as optimisers are set up in practice: matrices first, then biases and norms
    state_dict = {
        "a.weight": torch.zeros(4, 3), "a.bias": torch.zeros(4), "b.weight": torch.zeros(4, 3),
        "b.bias": torch.zeros(4), "norm.weight": torch.zeros(4), "norm.running_mean": torch.zeros(5),
    }  # fmt: skip
    groups = [
        {"params": [0, 1], "betas": (0.8, 0.9), "eps": 1e-6},
        {"params": [2, 3, 4], "betas": (0.9, 0.999)},
    ]
    state = adam((4, 3), (4, 3), (4,), (4,), (4,))
    checkpoint = {"state_dict": state_dict, "optimizer_states": [{"state": state, "param_groups": groups}]}
    assert pairs(checkpoint) == {"a.weight": 0, "a.bias": 2, "b.weight": 1, "b.bias": 3, "norm.weight": 4}
    first = find_parameters(checkpoint)[0]
    assert (first.betas, first.eps, first.step) == ((0.8, 0.9), 1e-6, 7.0)


def test_a_group_goes_through_the_state_dict_once() -> None:
    state_dict = {"a": torch.zeros(4, 3), "x": torch.zeros(2, 2), "b": torch.zeros(4, 3)}
    checkpoint = {
        "state_dict": state_dict,
        "optimizer_states": [
            {"state": adam((2, 2), (4, 3), (4, 3)), "param_groups": [{"params": [0, 1]}, {"params": [2]}]}
        ],
    }
    assert pairs(checkpoint) == {"a": 2, "x": 0, "b": 1}


def test_names_win_over_numbers() -> None:
    state_dict = {"model.a": torch.zeros(4, 3), "model.b": torch.zeros(4, 3)}
    groups = [{"params": [0, 1], "param_names": ["b", "a"]}]
    checkpoint = {
        "state_dict": state_dict,
        "optimizer_states": [{"state": adam((4, 3), (4, 3)), "param_groups": groups}],
    }
    assert pairs(checkpoint) == {"model.a": 1, "model.b": 0}


def test_states_keyed_by_names() -> None:
    # full-state checkpoints of sharded strategies
    state_dict = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    state = dict(zip(["b", "a"], adam((4, 3), (4, 3)).values(), strict=True))
    groups = [{"params": ["b", "a"]}]
    checkpoint = {"state_dict": state_dict, "optimizer_states": [{"state": state, "param_groups": groups}]}
    assert pairs(checkpoint) == {"a": "a", "b": "b"}


def test_two_optimisers_share_out_the_weights() -> None:
    state_dict = {"generator": torch.zeros(4, 3), "critic": torch.zeros(4, 3)}
    states = [{"state": adam((4, 3)), "param_groups": [{"params": [0]}]} for _ in range(2)]
    found = find_parameters({"state_dict": state_dict, "optimizer_states": states})
    assert [(item.name, item.exp_avg[1]) for item in found if item.exp_avg] == [("generator", 0), ("critic", 1)]


def test_other_optimisers_have_no_moments_and_frozen_parameters_no_state() -> None:
    state_dict = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 2), "mean": torch.zeros(3)}
    state = {0: {"momentum_buffer": torch.zeros(4, 3)}}
    checkpoint = {"state_dict": state_dict, "optimizer_states": [{"state": state, "param_groups": [{"params": [0]}]}]}
    # every entry has found its weight: the rest of the state dict are buffers
    assert pairs(checkpoint) == {"a": None}
    checkpoint["optimizer_states"][0]["state"] = {}  # type: ignore[index]
    # plain gradient descent has no state to tell a shape by: matrices count as weights
    assert pairs(checkpoint) == {"a": None, "b": None}


def test_moments_without_a_weight_are_coded_alone() -> None:
    checkpoint = {
        "state_dict": {"a": torch.zeros(4, 3)},
        "optimizer_states": [{"state": adam((5, 5)), "param_groups": [{"params": [0]}]}],
    }
    found = {item.name: item.weight for item in find_parameters(checkpoint)}
    assert found == {"a": ("state_dict", "a"), "optimizer_states/0/state/0": None}


def test_walk_skips_what_is_not_a_plain_tensor() -> None:
    class Odd(dict):  # type: ignore[type-arg]
        pass

    tree = {
        "dense": torch.zeros(2),
        "sparse": torch.zeros(2, 2).to_sparse(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "odd": Odd(x=torch.zeros(2)),
        "list": [torch.zeros(1), ("x", torch.zeros(3))],
        ("tuple", "key"): torch.zeros(2),
    }
    paths = [path for path, _ in tensors_of(tree)]
    assert paths == [("dense",), ("list", 0), ("list", 1, 1)]
    changed = replace(tree, {("list", 1, 1): None})
    assert changed["list"][1] == ("x", None)
    assert changed["odd"] is tree["odd"]
    assert tree["list"][1][1] is not None
