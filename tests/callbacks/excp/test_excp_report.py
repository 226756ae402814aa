"""Numbers of a save: against what is in the payload, and as plain data."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from tenfold.callbacks.excp import ExCPOptions, ParameterReport, SaveReport, decode, encode


@pytest.fixture(scope="module")
def report(training_run: Any) -> SaveReport:
    first, second = training_run.checkpoints[:2]
    return encode(second, encode(first).reference, previous_weights=first["state_dict"]).report


def test_groups_differ_in_more_than_numbers(report: SaveReport) -> None:
    groups = report.by_group()
    assert "model.layers.*.mlp.up_proj.weight" in groups
    assert sum(group.numel for group in groups.values()) == report.total.numel
    pair = [part for part in report.parameters if part.name.endswith("up_proj.weight")]
    group = groups["model.layers.*.mlp.up_proj.weight"]
    assert len(pair) == 2
    assert group.squared_error == pytest.approx(sum(part.squared_error for part in pair))
    assert group.update_max == max(part.update_max for part in pair)


def test_numbers_inside_names_stay() -> None:
    parts = [ParameterReport(name=name, numel=1) for name in ("conv1.weight", "conv2.weight", "h.0.a", "h.12.a", "0.b")]
    whole = SaveReport(key_frame=True, parameters=parts, raw_bytes=1, payload_bytes=1, step_source="none")
    assert list(whole.by_group()) == ["conv1.weight", "conv2.weight", "h.*.a", "*.b"]


def test_plain_data_round_trips_through_json(report: SaveReport) -> None:
    again = SaveReport.from_dict(json.loads(json.dumps(report.to_dict())) | {"of a later version": 1})
    assert again.to_dict() == report.to_dict()


def test_sizes_add_up_and_stay_near_the_order_0_bound(report: SaveReport) -> None:
    total = report.total
    # what is not a parameter is in `rest`, or below `min_numel`
    assert total.coded_bytes == report.payload_bytes
    assert total.coded_bytes < 1.03 * total.bound_bytes
    assert report.ratio == report.raw_bytes / report.payload_bytes > 20


def test_metrics_are_numbers_a_logger_takes(report: SaveReport) -> None:
    metrics = report.metrics()
    assert set(metrics) >= {"ckpt/ratio", "ckpt/error_over_step", "ckpt/error_over_step_max", "ckpt/first_update_ratio"}
    assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
    assert metrics["ckpt/error_over_step"] <= metrics["ckpt/error_over_step_max"] <= 0.5


def test_update_ratio_is_that_of_the_decoded_state(training_run: Any) -> None:
    first, second = training_run.checkpoints[:2]
    base = encode(first)
    encoded = encode(second, base.reference, ExCPOptions(), previous_weights=first["state_dict"])
    decoded, _ = decode(encoded, base.reference)
    names = [name for name in second["state_dict"] if name != "lm_head.weight"]
    for part in encoded.report.parameters:
        number = names.index(part.name)
        exact, stored = (ck["optimizer_states"][0]["state"][number] for ck in (second, decoded))
        root = exact["exp_avg_sq"].double().sqrt()
        largest = []
        for state in (exact, stored):
            step = float(state["step"]) + 1
            bias1, bias2 = 1 - 0.9**step, 1 - 0.95**step
            sizes = [
                (
                    (0.9 * state["exp_avg"].double().abs() + 0.1 * g)
                    / bias1
                    / (((0.95 * state["exp_avg_sq"].double() + 0.05 * g**2) / bias2).sqrt() + 1e-8)
                ).max()
                for g in (root, 0 * root)
            ]
            largest.append(float(max(sizes)))
        assert part.exact_update_max == pytest.approx(largest[0], rel=1e-4)
        assert part.update_max == pytest.approx(largest[1], rel=1e-4)


def test_tied_tensors_are_counted_once() -> None:
    weight = torch.randn(70, 80)
    report = encode({"state_dict": {"embedding": weight, "head": weight, "other": torch.randn(70, 80)}}).report
    assert report.raw_bytes == 2 * 70 * 80 * 4
