"""Staging for a GPU: page-locked host buffers and device buffers in pairs, used in turn by one pass and the next.

The buffers keep their addresses as long as no pass needs larger ones, and copies run on a stream of their own, so a
step that was captured as a CUDA graph may read them. No GPU was at hand when this was written: it is covered on the CPU
by a test with stand-ins for streams and events, and has not run on a device.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .stream import RowStream


class StagingSlot:
    """One pair of buffers, (num_parts, U, part_bytes) each, and the events of their copies."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.uint8)
        self.device = torch.empty(0, dtype=torch.uint8)
        self.copied: list[Any] = []
        self.used: Any = None

    def view(self, num_parts: int, num_rows: int, part_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both buffers in the shape of a pass; larger ones are made where these are too small."""
        size = num_parts * num_rows * part_bytes
        if self.host.numel() < size or self.device.device != device:
            self.host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
            self.device = torch.empty(size, dtype=torch.uint8, device=device)
        shape = (num_parts, num_rows, part_bytes)
        return self.host[:size].view(shape), self.device[:size].view(shape)


class DeviceStaging:
    """Two slots, the stream of the copies, and the thread that issues them; one per model.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slots = (StagingSlot(), StagingSlot())
        self._turn = 0
        self.copies: Any = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tenfold-copies")

    def begin(self, stream: RowStream, *, num_parts: int, num_rows: int, part_bytes: int) -> "DeviceStream":
        """Start to copy all layers of a pass, in order, as they arrive."""
        current = torch.cuda.current_stream(self.device)
        # all that will ever read the other slot has been queued by now
        self._slots[1 - self._turn].used = current.record_event()
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        for event in slot.copied:
            event.synchronize()
        host, device = slot.view(num_parts, num_rows, part_bytes, self.device)
        slot.copied = []
        ready: list[Future[Any]] = [Future() for _ in range(num_parts)]
        self._thread.submit(self._copy, stream, slot, host, device, ready)
        return DeviceStream(ready, device, self.device)

    def _copy(
        self, stream: RowStream, slot: StagingSlot, host: Tensor, device: Tensor, ready: list[Future[Any]]
    ) -> None:
        for layer, future in enumerate(ready):
            try:
                host[layer].copy_(stream.part(layer))
                with torch.cuda.stream(self.copies):
                    if slot.used is not None:
                        self.copies.wait_event(slot.used)
                    device[layer].copy_(host[layer], non_blocking=True)
                    slot.copied.append(self.copies.record_event())
                future.set_result(slot.copied[-1])
            except Exception as error:
                for rest in ready[layer:]:
                    rest.set_exception(error)
                return


class DeviceStream:
    """The layers of one pass on the device.

    Args:
        ready: for every layer the event after its copy.
        values: (num_parts, U, part_bytes) on the device.
        device: whose current stream waits.
    """

    def __init__(self, ready: list[Future[Any]], values: Tensor, device: torch.device) -> None:
        self._ready, self._values, self._device = ready, values, device

    def part(self, layer: int) -> Tensor:
        """Bytes of a layer, (U, part_bytes); the current stream waits for them, this thread only for the disk.

        Raises:
            OSError: a read failed.
            ValueError: from the check.
        """
        torch.cuda.current_stream(self._device).wait_event(self._ready[layer].result())
        return self._values[layer]
