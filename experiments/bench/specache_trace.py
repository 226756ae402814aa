"""A picture of decoding steps: what each stream of the GPU, or each thread of a CPU, did when."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

_STEP = "decoding step"
_COLOURS = {"computation": "#3f7fd9", "to device": "#d98c3f", "to host": "#7a9e3f", "copy": "#999999"}


@dataclass(frozen=True)
class Span:
    """Something that ran.

    Attributes:
        lane: Stream or thread.
        kind: `computation`, `to device`, `to host` or `copy` (inside the device).
        start_ms: From the first step's begin.
        duration_ms: How long.
    """

    lane: str
    kind: str
    start_ms: float
    duration_ms: float


def record_steps(step: Callable[[], Any], *, device: str, steps: int = 3) -> tuple[list[Span], list[float]]:
    """Profile some steps; the first of them is preceded by one that is not recorded.

    Args:
        step: Decodes one token per sequence.
        device: `cuda`, whose streams are the lanes, or `cpu`, whose threads are.
        steps: How many.

    Returns:
        What ran, and where each step began, in milliseconds from the first's begin.
    """
    cuda = device == "cuda"
    step()
    if cuda:
        torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    with profile(activities=activities, experimental_config=every_thread) as profiler:
        for _ in range(steps):
            with record_function(_STEP):
                step()
        if cuda:
            torch.cuda.synchronize()
    assert profiler.profiler is not None, "the profiler has run"
    results = profiler.profiler.kineto_results
    assert results is not None, "the profiler has run"
    return spans_of(results.events(), cuda=cuda)


def spans_of(events: Any, *, cuda: bool) -> tuple[list[Span], list[float]]:
    """Sort the profiler's events into lanes; of nested operations of a thread the outermost counts."""
    events = sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns()))
    begins = [event.start_ns() for event in events if event.name() == _STEP and event.device_type() == DeviceType.CPU]
    origin, spans = begins[0], []
    busy_until: dict[str, int] = {}
    for event in events:
        on_device = event.device_type() == DeviceType.CUDA
        if on_device != cuda or event.name() == _STEP or event.start_ns() < origin:
            continue
        lane = f"stream {event.device_resource_id()}" if cuda else f"thread {event.start_thread_id()}"
        end = event.start_ns() + event.duration_ns()
        if end <= busy_until.get(lane, 0):
            continue
        busy_until[lane] = end
        spans.append(Span(lane, _kind(event.name()), (event.start_ns() - origin) / 1e6, event.duration_ns() / 1e6))
    return spans, [(begin - origin) / 1e6 for begin in begins]


def _kind(name: str) -> str:
    if "HtoD" in name:
        return "to device"
    if "DtoH" in name:
        return "to host"
    return "copy" if name.startswith("Memcpy") else "computation"


def draw_trace(spans: list[Span], begins: list[float], path: Path, *, title: str) -> None:
    """One bar per lane, the busiest on top; dashed lines where steps begin.

    Args:
        spans: What ran.
        begins: Where steps begin, in milliseconds.
        path: PNG file.
        title: Of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    busy: dict[str, float] = {}
    for span in spans:
        busy[span.lane] = busy.get(span.lane, 0.0) + span.duration_ms
    lanes = sorted(busy, key=lambda lane: -busy[lane])
    figure = Figure(figsize=(12, 1.2 + 0.5 * max(len(lanes), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, lane in enumerate(lanes):
        own = [span for span in spans if span.lane == lane]
        ranges = [(span.start_ms, span.duration_ms) for span in own]
        axis.broken_barh(ranges, (place - 0.4, 0.8), facecolors=[_COLOURS[span.kind] for span in own])
    for begin in begins:
        axis.axvline(begin, color="black", linestyle="--", linewidth=0.8)
    axis.set_yticks(range(len(lanes)), [f"{lane}\n{busy[lane]:.1f} ms" for lane in lanes], fontsize="small")
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds; dashed: a step begins on the host")
    axis.set_title(title, fontsize="medium")
    kinds = [kind for kind in _COLOURS if any(span.kind == kind for span in spans)]
    axis.legend(
        handles=[Patch(color=_COLOURS[kind], label=kind) for kind in kinds], loc="upper right", fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
