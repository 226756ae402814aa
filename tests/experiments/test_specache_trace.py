"""The picture of decoding steps: lanes, kinds and times from the profiler's events."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tenfold.experiments.bench.specache_trace import Span, draw_trace, record_steps, spans_of
from torch.autograd import DeviceType


def event(name: str, start: int, duration: int, *, stream: int | None = None, thread: int = 1) -> SimpleNamespace:
    device = DeviceType.CPU if stream is None else DeviceType.CUDA
    return SimpleNamespace(
        name=lambda: name,
        start_ns=lambda: start,
        duration_ns=lambda: duration,
        device_type=lambda: device,
        device_resource_id=lambda: stream,
        start_thread_id=lambda: thread,
    )


EVENTS = [
    event("decoding step", 1_000_000, 4_000_000),
    event("decoding step", 6_000_000, 4_000_000),
    event("decoding step", 1_000_000, 4_000_000, stream=7),
    event("gemm", 500_000, 100_000, stream=7),
    event("gemm", 2_000_000, 1_000_000, stream=7),
    event("Memcpy HtoD (Pinned -> Device)", 2_500_000, 500_000, stream=20),
    event("Memcpy DtoH (Device -> Pinned)", 3_500_000, 250_000, stream=20),
    event("Memcpy DtoD (Device -> Device)", 4_000_000, 250_000, stream=7),
    event("aten::linear", 1_200_000, 800_000),
    event("aten::addmm", 1_300_000, 500_000),
    event("aten::index_select", 1_400_000, 600_000, thread=2),
]


def test_streams_are_lanes_and_copies_are_told_apart() -> None:
    spans, begins = spans_of(EVENTS, cuda=True)
    assert begins == [0.0, 5.0]
    assert spans == [
        Span("stream 7", "computation", 1.0, 1.0),
        Span("stream 20", "to device", 1.5, 0.5),
        Span("stream 20", "to host", 2.5, 0.25),
        Span("stream 7", "copy", 3.0, 0.25),
    ]


def test_threads_are_lanes_on_a_cpu_and_inner_operations_are_not_drawn_twice() -> None:
    spans, _ = spans_of(EVENTS, cuda=False)
    assert spans == [
        Span("thread 1", "computation", pytest.approx(0.2), 0.8),
        Span("thread 2", "computation", pytest.approx(0.4), 0.6),
    ]


def test_steps_of_a_cpu_are_recorded_with_the_work_of_other_threads(tmp_path: Path) -> None:
    calls, weights = [], torch.randn(64, 64)

    def step() -> None:
        calls.append(1)
        worker = threading.Thread(target=lambda: weights @ weights)
        worker.start()
        worker.join()
        torch.relu(weights)

    spans, begins = record_steps(step, device="cpu", steps=2)
    assert len(calls) == 3
    assert len(begins) == 2
    assert begins[0] == 0 < begins[1]
    assert len({span.lane for span in spans}) >= 2
    assert all(span.start_ms >= 0 for span in spans)
    draw_trace(spans, begins, tmp_path / "new" / "trace.png", title="steps")
    assert (tmp_path / "new" / "trace.png").read_bytes()[:4] == b"\x89PNG"
