"""The sort behind the deterministic backward: which terms use which row, in a fixed order, shareable between calls."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch

from ..native_build import cpu_kernels
from . import native_weighted_gather

_MIN_SPLIT_TERMS = 64
_MAX_SPLIT_TERMS = 512


class SplitPlan(NamedTuple):
    """How segments longer than `split_terms` are cut into pieces that separate programs can sum.

    The first piece of a segment is summed by the program that stores the segment's result. Every further piece has a
    slot for its partial sum. The number of slots is an upper bound known without a device synchronisation; unused slots
    hold empty ranges.

    Attributes:
        split_terms: largest number of terms in a piece.
        slot_begins: (num_slots,) first position of each further piece in `Segments.order`.
        slot_ends: (num_slots,) position after its last.
        slot_offsets: (num_groups + 1,) the slots of group g are `slot_offsets[g]` up to `slot_offsets[g + 1]`.
    """

    split_terms: int
    slot_begins: torch.Tensor
    slot_ends: torch.Tensor
    slot_offsets: torch.Tensor


@dataclass(frozen=True)
class Segments:
    """Terms sorted by the group they use.

    Attributes:
        order: (num_terms,) int64, positions in the flattened ids, sorted by id, ties in their original order.
        offsets: (num_groups + 1,) int64, the terms of group g are `order[offsets[g]:offsets[g + 1]]`.
    """

    order: torch.Tensor
    offsets: torch.Tensor
    _by_row: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def num_groups(self) -> int:
        """Number of groups, empty ones included."""
        return self.offsets.numel() - 1

    def by_row(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in flattened (T, N) weights sorted by table row, for groups of N rows, and where every row begins.

        Row n of group g owns the terms `position = t * N + n` of the group's tokens t. Kept for the next call, since
        layers that share the segments ask for the same.
        """
        if num_rows == 1:
            return self.order, self.offsets
        if num_rows not in self._by_row:
            begins, lengths = self.offsets[:-1], self.offsets.diff()
            rows = torch.arange(num_rows, device=self.order.device)
            starts = torch.addcmul((begins * num_rows).unsqueeze(1), lengths.unsqueeze(1), rows)
            # index_select and scatter, not [...] or repeat_interleave: those start threads for a few thousand numbers,
            # which costs more than the sums where other work keeps the cores busy.
            # the group of every sorted term: count the groups that have begun
            begun = torch.zeros(self.order.numel() + 1, dtype=torch.int64, device=self.order.device)
            group = begun.index_add_(0, self.offsets[1:-1], torch.ones_like(begins[1:])).cumsum(0)[:-1]
            within = torch.arange(self.order.numel(), device=self.order.device) - begins.index_select(0, group)
            places = starts.index_select(0, group) + within.unsqueeze(1)
            positions = torch.empty(places.numel(), dtype=torch.int64, device=self.order.device)
            terms = torch.add(rows, self.order.unsqueeze(1), alpha=num_rows)
            positions.scatter_(0, places.view(-1), terms.view(-1))
            self._by_row[num_rows] = positions, torch.cat([starts.view(-1), self.offsets[-1:] * num_rows])
        return self._by_row[num_rows]

    @cached_property
    def split_plan(self) -> SplitPlan:
        """Pieces of the long segments, computed once and then shared by all calls that use these segments."""
        num_terms, num_groups = self.order.numel(), self.num_groups
        # four times the mean length: with even use of the rows nothing is split and no partial sums are stored
        mean_terms = -(-num_terms // max(num_groups, 1))
        split_terms = min(max(_MIN_SPLIT_TERMS, 1 << (4 * mean_terms - 1).bit_length()), _MAX_SPLIT_TERMS)
        lengths = self.offsets.diff()
        extra = ((lengths - 1).clamp_min(0)).div(split_terms, rounding_mode="floor")
        slot_offsets = torch.zeros_like(self.offsets)
        torch.cumsum(extra, 0, out=slot_offsets[1:])
        slots = torch.arange(num_terms // split_terms, device=self.offsets.device)
        group = torch.searchsorted(slot_offsets[1:].contiguous(), slots, right=True)
        used = group < num_groups
        group = group.clamp_max(max(num_groups - 1, 0))
        begins = self.offsets[group] + (slots - slot_offsets[group] + 1) * split_terms
        ends = torch.minimum(begins + split_terms, self.offsets[group + 1])
        nothing = torch.zeros_like(begins)
        return SplitPlan(
            split_terms, torch.where(used, begins, nothing), torch.where(used, ends, nothing), slot_offsets
        )


def sort_segments(ids: torch.Tensor, num_groups: int) -> Segments:
    """Sort ids once, for any number of backward passes over them (MoLE: all layers share the token ids).

    Args:
        ids: integer ids in [0, num_groups), any shape: the `indices` or `ids` of a later call.
        num_groups: rows R of the table, or groups U.

    Returns:
        The segments. No device synchronisation takes place on CUDA.

    Raises:
        ValueError: `ids` are not integers, or on the CPU one of them is out of range.
    """
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers, got {ids.dtype}; convert them with .long()")
    if ids.device.type == "cpu" and (library := cpu_kernels()) is not None:
        found = native_weighted_gather.sort(library, ids.long(), num_groups)
        if found is not None:
            return Segments(*found)
    check_range(ids, num_groups, "ids")
    values, order = ids.reshape(-1).long().sort(stable=True)
    groups = torch.arange(num_groups + 1, device=ids.device)
    if ids.device.type == "cpu":
        offsets = torch.zeros_like(groups)
        torch.cumsum(torch.bincount(values, minlength=num_groups), 0, out=offsets[1:])
    else:
        # bincount would wait for the device
        offsets = torch.searchsorted(values, groups)
    return Segments(order, offsets)


def check_range(ids: torch.Tensor, limit: int, name: str) -> None:
    """Raise a ValueError that names an id outside [0, limit); on other devices than the CPU nothing is read."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(ids))
    if low < 0 or high >= limit:
        raise ValueError(f"{name} holds {low if low < 0 else high}, the table's rows go from 0 to {limit - 1}")
