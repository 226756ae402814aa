"""Round trips, bounds and the closed loop of the ExCP codec."""

import copy
import itertools
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.callbacks.excp import EncodedSave, ExCPOptions, Reference, decode, encode

Make = Callable[..., dict[str, Any]]
PLAIN = ExCPOptions(error_target=None, update_target=None)


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
    )


def chain(checkpoints: list[dict[str, Any]], options: ExCPOptions, *, exact_steps: bool = True) -> list[EncodedSave]:
    saves: list[EncodedSave] = []
    for number, checkpoint in enumerate(checkpoints):
        last = checkpoints[number - 1]["state_dict"] if number and exact_steps else None
        saves.append(encode(checkpoint, saves[-1].reference if saves else None, options, previous_weights=last))
    return saves


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], names: list[str]) -> float:
    return float(sum((first[name].double() - second[name].double()).square().sum() for name in names)) ** 0.5


def serialised(encoded: EncodedSave) -> bytes:
    return json.dumps(encoded.header).encode() + encoded.payload


def test_key_frame_keeps_weights_bit_for_bit(make_checkpoint: Make) -> None:
    odd = torch.randn(65, 67)
    odd[0, :6] = torch.tensor([0.0, -0.0, 1e-45, -1e-39, 3e38, -3e38])
    checkpoint = make_checkpoint({"a": odd, "b": torch.randn(4099), "c": torch.full((80, 80), 0.1)})
    encoded = encode(checkpoint)
    decoded, reference = decode(encoded)
    assert encoded.key_frame
    for name, weight in checkpoint["state_dict"].items():
        assert same_bits(decoded["state_dict"][name], weight)
        assert same_bits(reference.weights[name], weight)


@pytest.mark.parametrize("backend", ["rans", "zstd", "lzma"])
@pytest.mark.parametrize("second_moment", ["rank1", "log_kmeans", "masked"])
@pytest.mark.parametrize("mode", ["sparsity", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reader_has_the_writers_bits(
    make_checkpoint: Make, move: Make, backend: Any, second_moment: Any, mode: Any, dtype: torch.dtype
) -> None:
    weights = {
        "a": torch.randn(65, 67).to(dtype),
        "b": torch.randn(3, 40, 41).to(dtype),
        "c": torch.randn(5001).to(dtype),
    }
    options = ExCPOptions(backend=backend, second_moment=second_moment, mode=mode)
    checkpoint = make_checkpoint(weights)
    first = encode(checkpoint, None, options)
    second = encode(move(checkpoint, seed=1, size=0.02), first.reference, options)
    third = encode(move(checkpoint, seed=2, size=0.03), second.reference, options)
    reference = None
    for encoded in (first, second, third):
        decoded, reference = decode(encoded, reference)
        assert encoded.reference is not None
        assert reference.digest == encoded.reference.digest
        assert reference.squared_errors == encoded.reference.squared_errors
        for name in weights:
            assert same_bits(reference.weights[name], encoded.reference.weights[name])
            assert same_bits(decoded["state_dict"][name], reference.weights[name])
        for name in encoded.reference.classes:
            np.testing.assert_array_equal(reference.classes[name], encoded.reference.classes[name])
    assert any(record["kind"] == "residual" for record in third.header["records"])


def test_paper_thresholds_are_those_of_the_formulas(make_checkpoint: Make, move: Make) -> None:
    # n = 4, alpha and beta as released; medians and means recomputed in float64
    options = replace(PLAIN, mode="paper", second_moment="masked")
    before = make_checkpoint({"w": torch.randn(70, 80)})
    after = move(before, seed=1)
    for variance, expected in ((1e-7, 5e-5 / (1e-7**0.5 * (13 / 12) ** 0.5)), (1e-14, 2.5)):
        state = after["optimizer_states"][0]["state"][0]
        state["exp_avg_sq"] *= variance / 1e-7
        first = encode(before, None, options)
        decoded, _ = decode(encode(after, first.reference, options), first.reference)
        residual = (after["state_dict"]["w"].float() - before["state_dict"]["w"]).double().numpy().ravel()
        ratio = min(2.5, 5e-5 / np.sqrt(state["exp_avg_sq"].double().mean().item()))
        assert ratio == pytest.approx(expected, rel=0.02)
        threshold = ratio * np.sort(np.abs(residual))[(len(residual) - 1) // 2]
        weight_mask = np.abs(residual) > threshold
        stored = (decoded["state_dict"]["w"] - before["state_dict"]["w"]).numpy().ravel()
        np.testing.assert_array_equal(np.abs(stored) > 1e-7, weight_mask)
        momentum = state["exp_avg"].double().numpy().ravel()
        moment_mask = (np.abs(momentum) > 2.0 * np.abs(momentum).mean()) & weight_mask
        stored_state = decoded["optimizer_states"][0]["state"][0]
        np.testing.assert_array_equal(stored_state["exp_avg"].numpy().ravel() != 0, moment_mask)
        np.testing.assert_array_equal(stored_state["exp_avg_sq"].numpy().ravel() != 0, moment_mask)


@pytest.mark.parametrize("constrained", [False, True])
def test_errors_stay_within_threshold_and_gaps_of_the_stored_levels(
    make_checkpoint: Make, move: Make, constrained: bool
) -> None:
    options = replace(PLAIN, sparsity=0.8, entropy_constrained=constrained)
    before = make_checkpoint({"w": torch.randn(100, 120)})
    after = move(before, seed=3)
    first = encode(before, None, options)
    second = encode(after, first.reference, options)
    decoded, _ = decode(second, first.reference)
    record = next(record for record in second.header["records"] if record["path"][-1] == "w")
    offset, length, _ = record["streams"]["codebook"]
    levels = np.frombuffer(second.payload[offset : offset + length], "<f4")[1:].astype(np.float64)
    residual = (after["state_dict"]["w"] - before["state_dict"]["w"]).double().numpy().ravel()
    stored = (decoded["state_dict"]["w"].double() - before["state_dict"]["w"].double()).numpy().ravel()
    error = np.abs(stored - residual)
    pruned = np.abs(stored) < np.abs(levels).min() / 2
    threshold = np.sort(np.abs(residual))[int(0.8 * len(residual))] * (1 + 2**-7)
    assert error[pruned].max() <= threshold
    for side in (1, -1):
        mine = np.sort(levels[levels * side > 0] * side)
        gap = np.diff(mine).max() if len(mine) > 1 else 0.0
        # half a gap is the bound of nearest levels; with a price on bits a value may go to the level beyond the middle
        gap *= 1.0 if constrained else 0.5
        inside = ~pruned & (residual * side > 0) & (np.abs(residual) <= mine[-1])
        bound = max(gap, mine[0] - threshold * (1 - 2**-6)) + 2**-7 * np.abs(residual[inside]) + 1e-7
        assert (error[inside] <= bound).all()


def test_closed_loop_error_is_that_of_the_last_step_alone(training_run: Any) -> None:
    checkpoints = training_run.checkpoints
    options = replace(PLAIN, sparsity=0.85)
    saves = chain(checkpoints, options)
    names = [name for name in saves[1].reference.classes if name]  # type: ignore[union-attr]
    assert len(saves) >= 11
    assert len(names) > 10
    for number in range(1, len(saves)):
        last, now = saves[number - 1].reference, saves[number].reference
        assert last is not None
        assert now is not None
        true = checkpoints[number]["state_dict"]
        error = distance(now.weights, true, names)
        # what this save alone threw away: the residual minus its quantised form
        alone = sum(
            ((true[n].double() - last.weights[n].double()) - (now.weights[n].double() - last.weights[n].double()))
            .square().sum()
            for n in names
        )  # fmt: skip
        assert error == pytest.approx(float(alone) ** 0.5, rel=1e-9)
        reported = sum(now.squared_errors[n] for n in names) ** 0.5
        assert reported == pytest.approx(error, rel=1e-4)
    open_loop = 0.0
    drift = {name: torch.zeros_like(checkpoints[0]["state_dict"][name], dtype=torch.float64) for name in names}
    for before, after in itertools.pairwise(checkpoints):
        base = encode(before, None, options).reference
        assert base is not None
        stored = encode(after, base, options).reference
        assert stored is not None
        for name in names:
            drift[name] += stored.weights[name].double() - after["state_dict"][name].double()
        open_loop = float(sum(part.square().sum() for part in drift.values())) ** 0.5
    closed = distance(saves[-1].reference.weights, checkpoints[-1]["state_dict"], names)  # type: ignore[union-attr]
    assert open_loop > 1.5 * closed


def test_replay_gives_the_writers_reference_and_open_loop_does_not(training_run: Any) -> None:
    checkpoints = training_run.checkpoints
    saves = chain(checkpoints, ExCPOptions())
    reference = None
    for encoded in saves:
        decoded, reference = decode(encoded, reference)
        assert encoded.reference is not None
        for name, weight in encoded.reference.weights.items():
            assert same_bits(reference.weights[name], weight)
            assert same_bits(decoded["state_dict"][name], weight)
    # a writer that took the residual against the true weights, as the paper's formula has it
    first, honest = saves[0].reference, saves[1].reference
    assert honest is not None
    exact = Reference(checkpoints[1]["state_dict"], honest.classes, {}, honest.digest)
    cheating = encode(checkpoints[2], exact, ExCPOptions())
    _, replayed = decode(saves[1], first)
    with pytest.raises(ValueError, match="decodes to other values than were saved"):
        decode(cheating, replayed)


@pytest.mark.parametrize("exact_steps", [True, False])
def test_error_target_holds_for_every_weight_of_a_long_chain(training_run: Any, exact_steps: bool) -> None:
    for target in (0.9, 0.5):
        saves = chain(training_run.checkpoints, ExCPOptions(error_target=target), exact_steps=exact_steps)
        for number, encoded in enumerate(saves[1:], 1):
            before, after = (training_run.checkpoints[number - i]["state_dict"] for i in (1, 0))
            assert encoded.reference is not None
            for name in encoded.reference.classes:
                step = distance(before, after, [name])
                error = distance(encoded.reference.weights, after, [name])
                assert error <= target * step * (1.0 + 1e-6)
            report = encoded.report
            assert report.step_source == ("exact" if exact_steps else "bound")
            if exact_steps:
                assert report.largest_error_over_step <= target
                assert report.total.error_over_step == pytest.approx(
                    distance(encoded.reference.weights, after, list(encoded.reference.classes))
                    / distance(before, after, list(encoded.reference.classes)),
                    rel=1e-3,
                )


def test_without_error_target_fixed_pruning_drifts_past_the_step(training_run: Any) -> None:
    saves = chain(training_run.checkpoints[:6], replace(PLAIN, sparsity=0.95))
    assert saves[-1].report.total.error_over_step > 1.0


def test_tighter_targets_cost_more(training_run: Any) -> None:
    sizes = [
        len(chain(training_run.checkpoints[:3], ExCPOptions(error_target=target))[-1].payload)
        for target in (0.9, 0.6, 0.3, 0.1, 1e-3)
    ]
    assert sizes == sorted(sizes)


def test_unreachable_target_stores_weights_exactly_and_advises_a_key_frame(training_run: Any) -> None:
    saves = chain(training_run.checkpoints[:2], ExCPOptions(error_target=1e-6))
    report = saves[1].report
    assert report.key_frame_advised
    assert report.largest_error_over_step == 0.0
    decoded, _ = decode(saves[1], saves[0].reference)
    for name, weight in training_run.checkpoints[1]["state_dict"].items():
        assert same_bits(decoded["state_dict"][name], weight)


def test_same_bytes_for_any_number_of_threads_and_workers(training_run: Any) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads, workers in ((1, 1), (2, 1), (3, 4)):
            torch.set_num_threads(threads)
            first = encode(training_run.checkpoints[0], workers=workers)
            second = encode(training_run.checkpoints[1], first.reference, workers=workers)
            decode(second, first.reference, workers=workers)
            results.append(serialised(first) + serialised(second))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


def test_arguments_stay_as_they_are(training_run: Any) -> None:
    checkpoint = copy.deepcopy(training_run.checkpoints[1])
    first = encode(training_run.checkpoints[0])
    assert first.reference is not None
    weights = {name: weight.clone() for name, weight in first.reference.weights.items()}
    second = encode(checkpoint, first.reference)
    decoded, reference = decode(second, first.reference)
    for weight in decoded["state_dict"].values():
        weight.zero_()
    for name, weight in weights.items():
        assert same_bits(first.reference.weights[name], weight)
        assert reference.weights[name].any()
    for name, weight in training_run.checkpoints[1]["state_dict"].items():
        assert same_bits(checkpoint["state_dict"][name], weight)
    assert list(decoded) == list(checkpoint)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_exact_and_reported(make_checkpoint: Make, move: Make, bad: float) -> None:
    checkpoint = make_checkpoint({"a": torch.randn(70, 70), "b": torch.randn(70, 70)})
    first = encode(checkpoint)
    broken = move(checkpoint, seed=1)
    broken["state_dict"]["a"][3, 4] = bad
    broken["optimizer_states"][0]["state"][1]["exp_avg"][0, 0] = bad
    second = encode(broken, first.reference)
    decoded, reference = decode(second, first.reference)
    assert same_bits(decoded["state_dict"]["a"], broken["state_dict"]["a"])
    for key in ("exp_avg", "exp_avg_sq"):
        states = [part["optimizer_states"][0]["state"][1][key] for part in (decoded, broken)]
        assert same_bits(*states)
    notes = {part.name: part.notes for part in second.report.parameters}
    assert notes["a"] == ["weight exact: not finite"]
    assert any("moments exact: not finite" in note for note in notes["b"])
    # and the save after it, whose residual against them is not finite either
    third = encode(move(checkpoint, seed=2), reference)
    decoded, _ = decode(third, reference)
    assert same_bits(decoded["state_dict"]["a"], move(checkpoint, seed=2)["state_dict"]["a"])


@pytest.mark.parametrize(
    "values",
    [
        lambda: torch.zeros(64, 65),
        lambda: torch.full((64, 65), 1e-3),
        lambda: 1e-41 * torch.randn(64, 65),
        lambda: torch.randint(-3, 4, (64, 65)).float(),
        lambda: 1e30 * torch.randn(64, 65),
        lambda: torch.where(torch.rand(64, 65) > 0.999, 100.0, 1e-9),
    ],
    ids=["zeros", "constant", "denormal", "seven-values", "huge", "outliers"],
)
def test_odd_residuals_and_moments(make_checkpoint: Make, values: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    before = make_checkpoint({"w": torch.zeros(64, 65)})
    after = make_checkpoint({"w": values()})
    state = after["optimizer_states"][0]["state"][0]
    state["exp_avg"], state["exp_avg_sq"] = values(), values().abs()
    first = encode(before)
    decoded, _ = decode(encode(after, first.reference, previous_weights=before["state_dict"]), first.reference)
    error = (decoded["state_dict"]["w"] - after["state_dict"]["w"]).double().norm()
    assert error <= 0.5 * after["state_dict"]["w"].double().norm() + 1e-39
    for key in ("exp_avg", "exp_avg_sq"):
        assert decoded["optimizer_states"][0]["state"][0][key].isfinite().all()


def test_everything_else_is_exact() -> None:
    torch.manual_seed(0)
    shared = torch.randn(80, 80)
    state_dict: OrderedDict[str, torch.Tensor] = OrderedDict(
        embed=shared,
        norm=torch.randn(80),
        counts=torch.randint(0, 9, (100, 100)),
        mask=torch.rand(100, 100) > 0.5,
        statistics=torch.randn(90, 90, dtype=torch.float64),
        head=shared,
        empty=torch.empty(0, 5),
        scalar=torch.tensor(3.5),
    )
    state_dict._metadata = OrderedDict({"": {"version": 2}})  # type: ignore[attr-defined]
    checkpoint = {
        "state_dict": state_dict,
        "optimizer_states": [
            {
                "state": {0: {"momentum_buffer": torch.randn(80, 80)}, 1: {"momentum_buffer": torch.randn(80)}},
                "param_groups": [{"params": [0, 1], "lr": 0.1, "momentum": 0.9}],
            }
        ],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [0.1]}],
        "loops": {"fit_loop": {"state": (1, 2.5, None, "x", {"deep": [torch.arange(5000)]})}},
        "callbacks": {"Ema{'decay': 0.9}": {"weights": torch.randn(100, 100)}},
        "rng": torch.get_rng_state(),
        ("odd", "key"): torch.randn(100, 100),
        "hyper_parameters": {"betas": (0.9, 0.95), "flag": True},
    }
    encoded = encode(checkpoint)
    decoded, reference = decode(encoded)

    def compare(first: Any, second: Any) -> None:
        assert type(first) is type(second)
        if isinstance(first, torch.Tensor):
            assert same_bits(first, second)
        elif isinstance(first, dict):
            assert list(first) == list(second)
            for key in first:
                compare(first[key], second[key])
        elif isinstance(first, list | tuple):
            assert len(first) == len(second)
            for pair in zip(first, second, strict=True):
                compare(*pair)
        else:
            assert first == second

    compare(decoded, checkpoint)
    assert decoded["state_dict"]["embed"].data_ptr() == decoded["state_dict"]["head"].data_ptr()
    assert decoded["state_dict"]._metadata == state_dict._metadata  # type: ignore[attr-defined]
    # a tied weight is stored once: 80 * 80 floats, 1.2 times smaller at most
    assert sum(record["kind"] == "tied" for record in encoded.header["records"]) == 1
    # later saves may move the weight but nothing else
    moved = copy.deepcopy(checkpoint)
    moved["state_dict"]["embed"].add_(1e-3 * torch.randn(80, 80))
    again, _ = decode(encode(moved, reference), reference)
    for key in checkpoint:
        if key != "state_dict":
            compare(again[key], checkpoint[key])
    for name in state_dict:
        if name not in ("embed", "head"):
            compare(again["state_dict"][name], state_dict[name])
    assert again["state_dict"]["embed"].data_ptr() == again["state_dict"]["head"].data_ptr()


def test_unchanged_weights_cost_nothing(make_checkpoint: Make, move: Make) -> None:
    frozen = torch.randn(200, 200)
    checkpoint = make_checkpoint({"frozen": frozen, "w": torch.randn(70, 70)}, trained=["w"])
    first = encode(checkpoint)
    after = move(checkpoint, seed=1)
    after["state_dict"]["frozen"] = frozen.clone()
    second = encode(after, first.reference)
    decoded, reference = decode(second, first.reference)
    assert same_bits(decoded["state_dict"]["frozen"], frozen)
    assert same_bits(reference.weights["frozen"], frozen)
    assert len(second.payload) < frozen.numel() / 4


def test_frozen_layers_do_not_take_the_moments_of_trained_ones(make_checkpoint: Make, move: Make) -> None:
    layers = {f"layers.{i}.weight": torch.randn(70, 70) for i in range(4)}
    checkpoint = make_checkpoint(layers, trained=["layers.2.weight", "layers.3.weight"])
    first = encode(checkpoint)
    after = move(checkpoint, seed=1)
    for name in ("layers.0.weight", "layers.1.weight"):
        after["state_dict"][name] = layers[name].clone()
    second = encode(after, first.reference)
    assert [part.name for part in second.report.parameters] == ["layers.2.weight", "layers.3.weight"]
    assert all(part.kinds == ["residual", "rank1", "first_moment"] for part in second.report.parameters)
    decoded, _ = decode(second, first.reference)
    for number, name in enumerate(("layers.2.weight", "layers.3.weight")):
        kept = decoded["state_dict"][name] != layers[name]
        assert not decoded["optimizer_states"][0]["state"][number]["exp_avg"][~kept].any()


def test_the_same_state_once_more_costs_nothing_and_keeps_moments(training_run: Any) -> None:
    checkpoints = [training_run.checkpoints[i] for i in (0, 1, 1)]
    for exact_steps in (True, False):
        saves = chain(checkpoints, ExCPOptions(), exact_steps=exact_steps)
        assert sum(part.weight_bytes for part in saves[2].report.parameters) == 0
        decoded, _ = decode(saves[2], saves[1].reference)
        for name, weight in saves[1].reference.weights.items():  # type: ignore[union-attr]
            assert same_bits(decoded["state_dict"][name], weight)
        assert saves[2].report.total.momentum_zero_ratio < 0.99


def test_parameters_come_and_go(make_checkpoint: Make, move: Make) -> None:
    both = {"a": torch.randn(70, 70), "b": torch.randn(70, 71), "c": torch.randn(70, 72)}
    first = encode(make_checkpoint({name: both[name] for name in "ab"}))
    after = move(make_checkpoint({name: both[name] for name in "ac"}), seed=1)
    second = encode(after, first.reference)
    decoded, reference = decode(second, first.reference)
    assert second.report.added == ["c"]
    assert second.report.removed == ["b"]
    assert sorted(reference.weights) == ["a", "c"]
    assert same_bits(decoded["state_dict"]["c"], after["state_dict"]["c"])


def test_weight_of_another_shape_is_exact(make_checkpoint: Make) -> None:
    first = encode(make_checkpoint({"a": torch.randn(70, 70), "b": torch.randn(80, 80)}))
    after = make_checkpoint({"a": torch.randn(70, 75), "b": torch.randn(80, 80)})
    decoded, _ = decode(encode(after, first.reference), first.reference)
    assert same_bits(decoded["state_dict"]["a"], after["state_dict"]["a"])


def test_another_model_and_another_save_are_refused(make_checkpoint: Make, move: Make) -> None:
    checkpoint = make_checkpoint({"a": torch.randn(70, 70)})
    first = encode(checkpoint)
    with pytest.raises(ValueError, match=r"only 0 of the 1 weights .* another model; start a new chain"):
        encode(make_checkpoint({"x": torch.randn(70, 70)}), first.reference)
    second = encode(move(checkpoint, seed=1), first.reference)
    with pytest.raises(ValueError, match=r"needs the save .* none is given; decode the chain from its key frame"):
        decode(second)
    third = encode(move(checkpoint, seed=2), second.reference)
    with pytest.raises(ValueError, match=r"needs the save"):
        decode(third, first.reference)


def test_damage_names_the_tensor(make_checkpoint: Make) -> None:
    encoded = encode(make_checkpoint({"layer.weight": torch.randn(70, 70)}))
    for record in encoded.header["records"]:
        for offset, length, _ in record["streams"].values():
            payload = bytearray(encoded.payload)
            payload[offset + length // 2] ^= 1
            label = "/".join(map(str, record["path"]))
            with pytest.raises(ValueError, match=f"{label} .* is damaged"):
                decode(replace(encoded, payload=bytes(payload)))
    with pytest.raises(ValueError, match="is cut off"):
        decode(replace(encoded, payload=encoded.payload[:-1]))


def test_bare_state_dict() -> None:
    state = {"a": torch.randn(70, 70), "b": torch.randn(3)}
    first = encode(state)
    moved = {name: value + 1e-3 * torch.randn_like(value) for name, value in state.items()}
    second = encode(moved, first.reference, previous_weights=state)
    decoded, _ = decode(second, first.reference)
    assert (decoded["a"] - moved["a"]).norm() <= 0.5 * (moved["a"] - state["a"]).norm()
    assert same_bits(decoded["b"], moved["b"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_meet_the_target_too(make_checkpoint: Make, move: Make, dtype: torch.dtype) -> None:
    checkpoints = [make_checkpoint({"w": torch.randn(90, 90).to(dtype)})]
    for seed in range(1, 5):
        checkpoints.append(move(checkpoints[-1], seed=seed, size=0.05))
    for encoded in chain(checkpoints, ExCPOptions())[1:]:
        assert encoded.report.largest_error_over_step <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0 is out of range"),
        ({"weight_bits": 9}, "weight_bits=9 is out of range; use 2 to 8"),
        ({"error_target": 0.0}, "error_target=0.0"),
        ({"update_target": 0.5}, "update_target=0.5 is out of range; use a value above 1"),
        ({"mode": "fast"}, "mode='fast'"),
        ({"backend": "gzip"}, "backend='gzip' is out of range; use rans, zstd or lzma"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExCPOptions(**change)
