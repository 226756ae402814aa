"""A coded save back to the checkpoint, or only to the reference that later saves need."""

from typing import Any

import torch
from torch import Tensor

from .exact import DTYPES, decode_exact
from .first_moment import decode_first_moment
from .payload import read_part
from .saves import EncodedSave, Reference, checksum, digest_of, follow, own_copy, run_all
from .second_moment import decode_second_moment
from .tree import Path, replace, state_dict_path
from .weights import CodedTensor, decode_weight


def decode(
    encoded: EncodedSave, reference: Reference | None = None, *, verify: bool = True, workers: int = 1
) -> tuple[dict[str, Any], Reference]:
    """The checkpoint of a coded save, and the reference for the save after it.

    Args:
        encoded: from `encode` or a file.
        reference: of the save before it; not needed for a key frame.
        verify: compare each decoded tensor with the checksum of what the writer had.
        workers: threads that decode tensors side by side.

    Raises:
        ValueError: the reference is missing or of another save, the coded parts are damaged or a decoded tensor is not
            bit for bit what the writer had, or a package that was used to write is not installed.
    """
    _check_base(encoded, reference)
    records = encoded.header["records"]
    decoded = _decoded(encoded, reference, _groups(records), verify=verify, workers=workers)
    following = _following(encoded, decoded)
    root = state_dict_path(encoded.rest)
    if root is None and all(len(record["path"]) == 1 for record in records):
        root = ()
    values: dict[Path, Tensor] = {}
    for number, record in enumerate(records):
        path = tuple(record["path"])
        if record["kind"] == "tied":
            original = values[tuple(records[record["to"]]["path"])]
            values[path] = original if record["shared"] else original.clone()
            continue
        tensor = decoded[number].decoded
        # whoever trains on must not change the reference
        values[path] = tensor.clone() if "squared_error" in record else tensor
    return replace(own_copy(encoded.rest, set()), values), following


def advance(
    encoded: EncodedSave, reference: Reference | None = None, *, verify: bool = True, workers: int = 1
) -> Reference:
    """The reference that a save leads to, without its moments: what the saves after it need of it.

    Arguments and errors are those of `decode`.
    """
    _check_base(encoded, reference)
    records = encoded.header["records"]
    weights = [[number] for number, record in enumerate(records) if "squared_error" in record]
    return _following(encoded, _decoded(encoded, reference, weights, verify=verify, workers=workers))


def _check_base(encoded: EncodedSave, reference: Reference | None) -> None:
    base = encoded.base_digest
    if base is not None and (reference is None or reference.digest != base):
        have = "none is given" if reference is None else f"the one given is {reference.digest[:12]}"
        raise ValueError(
            f"ExCP: this save needs the save {base[:12]} before it, and {have}; decode the chain from its key frame"
        )


def _decoded(
    encoded: EncodedSave, reference: Reference | None, groups: list[list[int]], *, verify: bool, workers: int
) -> dict[int, CodedTensor]:
    known = reference if not encoded.key_frame and reference is not None else Reference()
    decoder = _Decoder(encoded, known, verify)
    decoded: dict[int, CodedTensor] = {}
    for part in run_all(decoder.group, groups, workers):
        decoded |= part
    return decoded


def _following(encoded: EncodedSave, decoded: dict[int, CodedTensor]) -> Reference:
    following = Reference(digest=encoded.digest)
    entries: list[tuple[str, str, list[int], int]] = []
    for number, record in enumerate(encoded.header["records"]):
        if "squared_error" in record:
            name = str(record["path"][-1])
            decoded[number].squared_error = record["squared_error"]
            follow(following, name, decoded[number])
            entries.append((name, record["dtype"], record["shape"], record["crc32"]))
    if digest_of(entries) != encoded.digest:
        raise ValueError("ExCP: the save's digest does not fit its tensors; restore the file from a copy")
    return following


def _groups(records: list[dict[str, Any]]) -> list[list[int]]:
    """Records of one parameter together, as the later ones may need the earlier ones."""
    groups: dict[int, list[int]] = {}
    for number, record in enumerate(records):
        if record["kind"] != "tied":
            groups.setdefault(record["group"], []).append(number)
    return list(groups.values())


class _Decoder:
    def __init__(self, encoded: EncodedSave, reference: Reference, verify: bool) -> None:
        self.records, self.payload = encoded.header["records"], memoryview(encoded.payload)
        self.reference, self.verify = reference, verify

    def group(self, numbers: list[int]) -> dict[int, CodedTensor]:
        done: dict[int, CodedTensor] = {}
        for number in numbers:
            record = self.records[number]
            label = "/".join(map(str, record["path"]))
            try:
                done[number] = self.record(record, label, done)
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(f"ExCP: {label} is damaged ({error}); restore the file from a copy") from error
            if self.verify and checksum(done[number].decoded) != record["crc32"]:
                raise ValueError(
                    f"ExCP: {label} decodes to other values than were saved; the chain before it or the file is damaged"
                )
        return done

    def record(self, record: dict[str, Any], label: str, done: dict[int, CodedTensor]) -> CodedTensor:
        dtype, shape = DTYPES[record["dtype"]], tuple(record["shape"])
        streams = {
            name: read_part(self.payload, place, what=f"{label} ({name})") for name, place in record["streams"].items()
        }
        needs = {role: done[place] for role, place in record.get("needs", {}).items()}
        kind, meta = record["kind"], record.get("meta", {})
        like = torch.empty(shape, dtype=dtype, device="meta")
        name = str(record["path"][-1])
        if kind == "exact":
            return CodedTensor(kind, {}, decode_exact(streams["exact"], dtype, shape))
        if kind == "unchanged":
            return CodedTensor(kind, {}, self.reference.weights[name])
        if kind == "residual":
            return decode_weight(streams, meta, self.reference.weights[name], self.reference.classes.get(name))
        if kind == "first_moment":
            return decode_first_moment(
                streams, meta, like, weight=needs.get("weight"), second_moment=needs.get("second_moment")
            )
        if kind in ("rank1", "log_kmeans", "masked"):
            return decode_second_moment(kind, streams, meta, like, needs.get("first_moment"))
        raise ValueError(f"ExCP: {label} is stored as {kind!r}, which this version does not know; upgrade tenfold")
