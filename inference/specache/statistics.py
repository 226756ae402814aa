"""What a cache counted while it decoded."""

from dataclasses import dataclass, field

import torch


@dataclass
class SpeCacheStatistics:
    """Counters of one cache since it was made or reset.

    Attributes:
        prefills: Forward passes over prompts or parts of prompts.
        pre_decodes: Forward passes that only chose rows and a speculative token: one per request.
        steps: Decoding steps; each commits one token per sequence.
        bytes_to_device: Bytes of exact rows copied from the host.
        bytes_to_host: Bytes of committed tokens and of row indices copied to the host.
        wait_seconds: Time the calling thread waited for rows.
        speculated: Speculative tokens that were compared with the token that came.
        wanted_rows: Rows that tokens would have chosen for themselves (with `measure`).
    """

    prefills: int = 0
    pre_decodes: int = 0
    steps: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    wait_seconds: float = 0.0
    speculated: int = 0
    wanted_rows: int = 0
    _hits: list[torch.Tensor] = field(default_factory=list, repr=False)
    _covered: list[torch.Tensor] = field(default_factory=list, repr=False)
    _waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @property
    def forwards(self) -> int:
        """All forward passes."""
        return self.prefills + self.pre_decodes + self.steps

    @property
    def speculation_hit_ratio(self) -> float | None:
        """Share of speculative tokens that were the token that came; None before there is one."""
        return _total(self._hits) / self.speculated if self.speculated else None

    @property
    def coverage_ratio(self) -> float | None:
        """Share of each token's own top-k rows that were prefetched; None where it was not measured."""
        return _total(self._covered) / self.wanted_rows if self.wanted_rows else None

    @property
    def exposed_wait_seconds(self) -> float:
        """Time that computation stood still for rows: of the stream on CUDA (with `measure`), else of the thread."""
        if not self._waits:
            return self.wait_seconds
        torch.cuda.synchronize()
        return sum(before.elapsed_time(after) for before, after in self._waits) / 1000

    def add_hits(self, hits: torch.Tensor) -> None:
        """Count a (B,) comparison without waiting for the device."""
        self.speculated += hits.numel()
        _accumulate(self._hits, hits.sum())

    def add_coverage(self, covered: torch.Tensor, wanted: int) -> None:
        """Count rows that were there, as a scalar tensor, among those wanted."""
        self.wanted_rows += wanted
        _accumulate(self._covered, covered)

    def add_wait(self, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        """Keep a pair of timing events around a wait of the stream."""
        self._waits.append((before, after))


def _accumulate(totals: list[torch.Tensor], count: torch.Tensor) -> None:
    # one running sum per device
    for index, total in enumerate(totals):
        if total.device == count.device:
            totals[index] = total + count
            return
    totals.append(count)


def _total(totals: list[torch.Tensor]) -> int:
    return sum(int(total) for total in totals)
