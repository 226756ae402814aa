"""Adam's moments: formulas against float64, updates against torch.optim.Adam, spikes kept within their bound."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.callbacks.excp import ExCPOptions, decode, encode
from tenfold.callbacks.excp.adam import AdamRule
from tenfold.callbacks.excp.adam_state import AdamStateEncoder
from tenfold.callbacks.excp.second_moment import decode_gaps, encode_gaps, matrix_shape, rank1_factors


def first_update(
    momentum: torch.Tensor, variance: torch.Tensor, gradient: torch.Tensor, betas: tuple[float, float], step: float
) -> torch.Tensor:
    """|change| / lr of one step of torch's own Adam from a given state."""
    weight = torch.zeros_like(gradient, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([weight], lr=1.0, betas=betas, eps=1e-8)
    state = {"step": torch.tensor(step), "exp_avg": momentum.double(), "exp_avg_sq": variance.double()}
    optimiser.load_state_dict({"state": {0: state}, "param_groups": optimiser.state_dict()["param_groups"]})
    weight.grad = gradient.double()
    optimiser.step()
    return weight.detach().abs()


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("step", [1.0, 10.0, 1e5])
def test_update_is_adams(beta2: float, step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    true = 10 ** (torch.rand(50_001, generator=generator) * 8 - 16)
    stored = true * torch.exp(torch.randn(50_001, generator=generator))
    momentum = 0.3 * torch.randn(50_001, generator=generator) * true.sqrt()
    rule = AdamRule((0.9, beta2), 1e-8, step)
    ours = rule.updates(momentum.numpy(), stored.numpy(), true.numpy())
    along = first_update(momentum, stored, torch.sign(momentum) * true.double().sqrt(), (0.9, beta2), step)
    silent = first_update(momentum, stored, torch.zeros_like(true), (0.9, beta2), step)
    np.testing.assert_allclose(ours, torch.maximum(along, silent).numpy(), rtol=2e-5)


def test_rank1_factors_are_adafactors_in_float64() -> None:
    values = np.random.default_rng(0).gamma(0.5, 1e-9, (37, 53)).astype(np.float32)
    row, column = rank1_factors(values.reshape(-1), 37)
    wide = values.astype(np.float64)
    expected = np.outer(wide.sum(1), wide.sum(0)) / wide.sum()
    np.testing.assert_allclose(np.outer(row, column), expected, rtol=1e-6)
    assert not rank1_factors(np.zeros(12, np.float32), 3)[0].any()


@pytest.mark.parametrize("shape", [(4096,), (64, 64), (8, 64, 32), (64, 3, 3, 3), (1, 5000), (5000, 1)])
def test_matrix_shape_has_the_smallest_sum(shape: tuple[int, ...]) -> None:
    rows, columns = matrix_shape(shape)
    total = int(np.prod(shape))
    assert rows * columns == total
    sums = [int(np.prod(shape[:i])) + total // int(np.prod(shape[:i])) for i in range(len(shape))]
    assert rows + columns == min(sums)


@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [0, 1, 2], [3, 258, 259, 1000, 100_000]])
def test_gaps_round_trip(positions: list[int]) -> None:
    stream = encode_gaps(np.array(positions, dtype=np.int64), backend="rans")
    assert decode_gaps(memoryview(stream)).tolist() == positions


def restored(checkpoint: dict[str, Any], options: ExCPOptions, base: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    first = encode(base, None, options)
    second = encode(checkpoint, first.reference, options, previous_weights=base["state_dict"])
    return decode(second, first.reference)[0], second.report


def true_updates(state: dict[str, Any], gradients: list[torch.Tensor], betas: tuple[float, float]) -> list[float]:
    return [
        float(first_update(entry["exp_avg"], entry["exp_avg_sq"], gradient, betas, float(entry["step"])).max())
        for entry, gradient in zip(state.values(), gradients, strict=True)
        if entry["exp_avg"].dim() > 1
    ]


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("second_moment", ["rank1", "log_kmeans", "masked"])
def test_first_update_with_the_next_true_gradient_stays_within_bound(
    training_run: Any, slow_average_run: Any, beta2: float, second_moment: Any
) -> None:
    run = training_run if beta2 == 0.95 else slow_average_run
    for number in (1, 3):
        now = run.checkpoints[number]
        options = ExCPOptions(second_moment=second_moment)
        decoded, report = restored(now, options, run.checkpoints[number - 1])
        gradients = list(run.gradients[number].values())
        exact = true_updates(now["optimizer_states"][0]["state"], gradients, (0.9, beta2))
        stored = true_updates(decoded["optimizer_states"][0]["state"], gradients, (0.9, beta2))
        assert max(stored) <= 1.5 * max(exact)
        assert report.total.update_ratio <= 1.5


def test_pruned_second_moment_would_spike_at_slow_averages(slow_average_run: Any) -> None:
    before, now = copy.deepcopy(slow_average_run.checkpoints[2:4])
    for entry in now["optimizer_states"][0]["state"].values():
        # long after the start, when the second moment has its full size
        entry["step"].fill_(20_000)
        entry["exp_avg_sq"] /= 1 - 0.999**40
    options = ExCPOptions(second_moment="masked", update_target=None)
    decoded, _ = restored(now, options, before)
    # a gradient as large as usual on an entry whose second moment is gone: (1 - 0.9) / sqrt(1 - 0.999), bias corrected
    state = decoded["optimizer_states"][0]["state"][1]
    exact = now["optimizer_states"][0]["state"][1]
    gradient = exact["exp_avg_sq"].sqrt()
    spike = first_update(state["exp_avg"], state["exp_avg_sq"], gradient, (0.9, 0.999), float(state["step"]))
    usual = first_update(exact["exp_avg"], exact["exp_avg_sq"], gradient, (0.9, 0.999), float(exact["step"]))
    assert spike.median() > 3 * usual.median()
    bounded, report = restored(now, ExCPOptions(second_moment="masked"), before)
    assert any("instead of masked" in note for note in report.total.notes)
    state = bounded["optimizer_states"][0]["state"][1]
    kept = first_update(state["exp_avg"], state["exp_avg_sq"], gradient, (0.9, 0.999), float(state["step"]))
    assert kept.max() <= 1.5 * usual.max()


def test_rank1_keeps_entries_that_means_understate(make_checkpoint: Any, move: Any) -> None:
    torch.manual_seed(0)
    before = make_checkpoint({"w": torch.randn(100, 100)})
    after = move(before, seed=1)
    state = after["optimizer_states"][0]["state"][0]
    places = torch.randperm(10_000)[:20]
    state["exp_avg_sq"].view(-1)[places] = 1e-3
    state["exp_avg"].view(-1)[places] = 1e-2
    decoded, report = restored(after, ExCPOptions(), before)
    stored = decoded["optimizer_states"][0]["state"][0]["exp_avg_sq"]
    # exceptions are kept to the 8 bits of bfloat16
    torch.testing.assert_close(stored.view(-1)[places], torch.full((20,), 1e-3), rtol=2**-8, atol=0)
    assert report.parameters[0].kinds == ["residual", "rank1", "first_moment"]
    assert report.parameters[0].update_ratio <= 1.5


def test_log_levels_keep_every_second_moment(make_checkpoint: Any, move: Any) -> None:
    before = make_checkpoint({"w": torch.randn(100, 100)})
    after = move(before, seed=1)
    state = after["optimizer_states"][0]["state"][0]
    state["exp_avg_sq"] = 10 ** (-14 + 8 * torch.rand(100, 100))
    decoded, report = restored(after, ExCPOptions(second_moment="log_kmeans", update_target=None), before)
    stored = decoded["optimizer_states"][0]["state"][0]["exp_avg_sq"]
    # 8 decades in 15 levels: 0.27 decades either way
    assert (stored / state["exp_avg_sq"]).log10().abs().max() < 0.3
    assert report.parameters[0].kinds[1] == "log_kmeans"


def test_tiny_second_moments_are_not_flushed(make_checkpoint: Any, move: Any) -> None:
    before = make_checkpoint({"w": torch.randn(80, 80)})
    after = move(before, seed=1)
    state = after["optimizer_states"][0]["state"][0]
    state["exp_avg_sq"] *= 1e-13
    state["exp_avg"] *= 1e-7
    for second_moment in ("rank1", "log_kmeans"):
        decoded, _ = restored(after, ExCPOptions(second_moment=second_moment), before)
        stored = decoded["optimizer_states"][0]["state"][0]["exp_avg_sq"]
        # far below the smallest half-precision number, where released codebooks become zero
        assert 0 < stored.min() < stored.max() < 1e-19


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99])
def test_momentum_is_as_sparse_as_asked_and_inside_the_weights_mask(
    make_checkpoint: Any, move: Any, sparsity: float
) -> None:
    before = make_checkpoint({"w": torch.randn(100, 100)})
    after = move(before, seed=1)
    options = ExCPOptions(sparsity=0.6, momentum_sparsity=sparsity, error_target=None)
    decoded, report = restored(after, options, before)
    momentum = decoded["optimizer_states"][0]["state"][0]["exp_avg"]
    residual = decoded["state_dict"]["w"] - before["state_dict"]["w"]
    assert not momentum[residual == 0].any()
    zeros = float((momentum == 0).float().mean())
    assert zeros == pytest.approx(max(sparsity, report.parameters[0].weight_zero_ratio), abs=0.012)
    kept = momentum != 0
    exact = after["optimizer_states"][0]["state"][0]["exp_avg"]
    assert (momentum[kept].sign() == exact[kept].sign()).all()


def test_entries_that_cannot_be_kept_within_the_target_are_dropped_not_the_whole_moment_stored() -> None:
    generator = torch.Generator().manual_seed(0)
    variance = torch.full((80, 90), 1e-8)
    momentum = 1e-4 * torch.randn(80, 90, generator=generator).clamp(-3, 3)
    # epsilon keeps the updates of a row that is hardly ever trained small; over the root of its second moment they are
    # the largest of all, and share a level with an entry that epsilon does nothing for
    variance[0] = 1e-20
    momentum[0], momentum[0, :10] = 0, 8e-10
    momentum[3, 4] = 6e-4
    options = ExCPOptions(momentum_mask="own", momentum_sparsity=0.9, momentum_bits=2, update_target=1.1)
    rule = AdamRule(betas=(0.9, 0.999), eps=1e-8, step=2000.0)
    encoder = AdamStateEncoder(momentum, variance, weight=None, rule=rule, options=options)
    state = encoder.encode()
    assert state.first.kind == "first_moment"
    assert any("dropped for the update target" in note for note in state.notes)
    stored = state.first.decoded.double()
    decoded = state.second.decoded.double()
    updates = rule.updates(stored.numpy().ravel(), decoded.numpy().ravel(), variance.double().numpy().ravel())
    assert updates.max() <= 1.1 * state.exact_update_max
    assert (stored != 0).sum() > 100
