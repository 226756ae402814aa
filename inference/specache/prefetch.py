"""Moves committed tokens to the host and exact rows back, beside the computation where the device allows it.

On CUDA, per layer and step: the copy stream waits for the layer's attention, copies the committed token and the chosen
indices to page-locked memory; a worker thread waits for that copy, stores the token, gathers the rows, and issues the
copy to the device; the computing stream waits for its event before the same layer's attention in the next step. One
buffer per layer is enough: a row is overwritten only after the event of the attention that read it.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .device_store import DeviceStore
from .host_store import HostRows
from .statistics import SpeCacheStatistics


@dataclass
class _Staging:
    """Page-locked memory of one layer, used by one step at a time."""

    token: torch.Tensor  # (B, N, 2, D)
    indices: torch.Tensor  # (B, N, K)
    rows: torch.Tensor  # (B, N, K, 2, D)


class Prefetcher:
    """The traffic between one cache's device and host stores.

    Args:
        asynchronous: Use a worker thread.
        statistics: Where bytes and waits are counted.
        measure: Time the waits of the stream.
    """

    def __init__(self, *, asynchronous: bool, statistics: SpeCacheStatistics, measure: bool) -> None:
        self.asynchronous, self.statistics, self.measure = asynchronous, statistics, measure
        self._worker: ThreadPoolExecutor | None = None
        self._pending: dict[int, Future[torch.cuda.Event | None]] = {}
        self._staging: dict[int, _Staging] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def store_prompt(self, host: HostRows, sequence: int, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store many tokens of one sequence, each (N, T, D), from `slot` on; on CUDA without waiting."""
        rows = torch.stack([keys, values], dim=2).transpose(0, 1).contiguous()  # (T, N, 2, D)
        target = host.rows[sequence, slot : slot + rows.shape[0]]
        self.statistics.bytes_to_host += rows.nbytes
        if not rows.is_cuda:
            target.copy_(rows)
            return
        stream = self._stream(rows.device)
        stream.wait_stream(torch.cuda.current_stream(rows.device))
        with torch.cuda.stream(stream):
            target.copy_(rows, non_blocking=True)
        rows.record_stream(stream)

    def advance(
        self,
        layer_index: int,
        host: HostRows,
        device: DeviceStore,
        *,
        token: torch.Tensor | None,
        slots: list[int],
        fetch: bool,
    ) -> None:
        """Store a committed token (B, N, 2, D), if there is one, then fetch the rows that `device.indices` names."""
        fetch = fetch and device.indices.shape[2] > 0
        if token is None and not fetch:
            return
        self.statistics.bytes_to_host += 0 if token is None else token.nbytes
        if fetch:
            self.statistics.bytes_to_host += device.indices.nbytes
            self.statistics.bytes_to_device += device.fetched.nbytes
        job: _CpuJob | _CudaJob
        if device.fetched.is_cuda:
            job = self._issue_cuda(layer_index, host, device, token, slots, fetch)
        else:
            # the originals may be overwritten before the worker comes to them
            indices = device.indices.clone() if fetch else None
            job = _CpuJob(host, device.fetched, None if token is None else token.clone(), slots, indices)
        if self.asynchronous:
            self._pending[layer_index] = self._executor().submit(job)
        else:
            done: Future[torch.cuda.Event | None] = Future()
            done.set_result(job())
            self._pending[layer_index] = done

    def wait(self, layer_index: int, device: torch.device) -> None:
        """Have the layer's rows in place for what this thread computes next; errors of the worker are raised here."""
        future = self._pending.pop(layer_index, None)
        if future is None:
            return
        start = time.perf_counter()
        event = future.result()
        self.statistics.wait_seconds += time.perf_counter() - start
        if event is None:
            return
        stream = torch.cuda.current_stream(device)
        if not self.measure:
            stream.wait_event(event)
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self.statistics.add_wait(before, after)

    def drain(self) -> None:
        """Wait until the host store is up to date and nothing is in flight."""
        for layer_index in list(self._pending):
            future = self._pending[layer_index]
            future.result()
        for stream in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Forget what is in flight and end the worker."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        for stream in self._streams.values():
            stream.synchronize()
        self._pending.clear()
        self._staging.clear()

    def _executor(self) -> ThreadPoolExecutor:
        if self._worker is None:
            # one thread: tokens are stored before rows are gathered, layer after layer
            self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="specache")
        return self._worker

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _issue_cuda(
        self,
        layer_index: int,
        host: HostRows,
        device: DeviceStore,
        token: torch.Tensor | None,
        slots: list[int],
        fetch: bool,
    ) -> "_CudaJob":
        stream = self._stream(device.fetched.device)
        staging = self._staging.get(layer_index)
        if staging is None or staging.indices.shape != device.indices.shape:
            batch, num_heads, _, _, head_dim = device.fetched.shape
            token_shape = (batch, num_heads, 2, head_dim)
            staging = self._staging[layer_index] = _Staging(
                torch.empty(token_shape, dtype=device.fetched.dtype, pin_memory=True),
                torch.empty(device.indices.shape, dtype=torch.int32, pin_memory=True),
                torch.empty(device.fetched.shape, dtype=device.fetched.dtype, pin_memory=True),
            )
        stream.wait_stream(torch.cuda.current_stream(device.fetched.device))
        with torch.cuda.stream(stream):
            if token is not None:
                staging.token.copy_(token, non_blocking=True)
                token.record_stream(stream)
            if fetch:
                staging.indices.copy_(device.indices, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        return _CudaJob(host, device.fetched, staging, arrived, stream, slots, token is not None, fetch)


@dataclass
class _CpuJob:
    host: HostRows
    fetched: torch.Tensor
    token: torch.Tensor | None
    slots: list[int]
    indices: torch.Tensor | None

    def __call__(self) -> None:
        if self.token is not None:
            self.host.append(self.token, self.slots)
        if self.indices is not None:
            self.host.gather(self.indices, self.fetched)


@dataclass
class _CudaJob:
    host: HostRows
    fetched: torch.Tensor
    staging: _Staging
    arrived: torch.cuda.Event
    stream: torch.cuda.Stream
    slots: list[int]
    has_token: bool
    fetch: bool

    def __call__(self) -> torch.cuda.Event:
        self.arrived.synchronize()
        if self.has_token:
            self.host.append(self.staging.token, self.slots)
        done = torch.cuda.Event()
        if self.fetch:
            self.host.gather(self.staging.indices, self.staging.rows)
            with torch.cuda.stream(self.stream):
                self.fetched.copy_(self.staging.rows, non_blocking=True)
        done.record(self.stream)
        return done
