"""ExCP (arXiv 2406.11257): a checkpoint dictionary to coded parts, each save against the one before.

The residual is taken against the stored form of the previous save (closed loop), so errors do not add up along a chain.
A key frame stores weights bit for bit and needs no other save. Everything that is not a weight or one of Adam's moments
is exact: large tensors losslessly coded, the rest left as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .adam import AdamRule
from .adam_state import AdamStateEncoder, CodedAdamState
from .entropy import require_backend
from .exact import DTYPE_NAMES
from .host_memory import same_bits
from .lookup import squared_norm
from .options import ExCPOptions
from .payload import PayloadWriter
from .report import ParameterReport, SaveReport, StepSource
from .saves import EncodedSave, Reference, checksum, digest_of, follow, own_copy, run_all
from .second_moment import exact_tensor
from .tree import LOSSY_DTYPES, Parameter, Path, find_parameters, replace, state_dict_path, tensors_of
from .weights import CodedTensor, as_float32, encode_weight


@dataclass
class _Coded:
    """A tensor on its way into the header."""

    path: Path
    tensor: Tensor
    coded: CodedTensor
    # what it needs decoded first: places in the same parameter's list
    needs: dict[str, int] = field(default_factory=dict)
    checksum: int = 0

    def finish(self, *, keep: bool) -> None:
        """Takes the checksum; only weights are needed decoded after that."""
        self.checksum = checksum(self.coded.decoded)
        if not keep:
            self.coded.decoded = torch.empty(0)
            self.coded.indices = None
        # positions take eight bytes each
        self.coded.kept = None


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _lossy(tensor: Tensor, options: ExCPOptions) -> bool:
    return tensor.dtype in LOSSY_DTYPES and tensor.numel() >= options.min_numel


class _Encoder:
    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        reference: Reference | None,
        options: ExCPOptions,
        previous: Mapping[str, Tensor] | None,
    ) -> None:
        self.checkpoint, self.options, self.previous = checkpoint, options, previous
        self.reference = reference or Reference()
        self.key_frame = reference is None
        self.root = state_dict_path(checkpoint)

    def squared_step(self, parameter: Parameter, weight: Tensor) -> float:
        """Squared norm of the weight's change since the last save; 0 where it is the same."""
        values = as_float32(weight)
        last = None if self.previous is None else self.previous.get(parameter.name)
        if last is not None and last.shape == weight.shape:
            step = squared_norm(values - as_float32(last))
        else:
            change = squared_norm(values - as_float32(self.reference.weights[parameter.name]))
            error = self.reference.squared_errors.get(parameter.name, 0.0)
            if abs(change - error) <= 1e-5 * error:
                return 0.0
            # triangle inequality: the step is at least the distance to the stored weight less the stored error;
            # errors larger than steps come of fixed settings, where the step decides nothing
            step = max(change**0.5 - error**0.5, 0.1 * change**0.5) ** 2
        # a weight that is not finite is stored exactly in any case
        return step if np.isfinite(step) else 1.0

    def unchanged(self, weight: Tensor, stored: Tensor, error: float = 0.0) -> CodedTensor:
        return CodedTensor("unchanged", {}, stored, squared_error=error)

    def weight(self, parameter: Parameter, weight: Tensor, notes: list[str]) -> CodedTensor:
        stored = self.reference.weights.get(parameter.name)
        if stored is None or stored.shape != weight.shape or stored.dtype != weight.dtype:
            return exact_tensor(weight, self.options)
        if same_bits(weight, stored):
            return self.unchanged(weight, stored)
        squared_step = self.squared_step(parameter, weight)
        if squared_step == 0:
            # the same state once more: as far from the truth as the last save, and no smaller step to measure it by
            error = squared_norm(as_float32(weight) - as_float32(stored))
            notes.append("weight as in the last save")
            return self.unchanged(weight, stored, error)
        moment = None if parameter.exp_avg_sq is None else as_float32(_at(self.checkpoint, parameter.exp_avg_sq))
        classes = self.reference.classes.get(parameter.name)
        coded = encode_weight(
            weight,
            stored,
            second_moment=moment,
            squared_step=squared_step,
            previous_classes=classes if classes is not None and len(classes) == weight.numel() else None,
            options=self.options,
        )
        if isinstance(coded, str):
            notes.append(f"weight exact: {coded}")
            coded = exact_tensor(weight, self.options)
            coded.squared_step = squared_step
        return coded

    def parameter(self, parameter: Parameter) -> tuple[list[_Coded], ParameterReport]:
        coded: list[_Coded] = []
        notes: list[str] = []
        raw = 0
        weight: CodedTensor | None = None
        report: dict[str, Any] = {}
        if parameter.weight is not None:
            tensor = _at(self.checkpoint, parameter.weight)
            weight = self.weight(parameter, tensor, notes)
            coded.append(_Coded(parameter.weight, tensor, weight))
            raw += tensor.numel() * tensor.element_size()
            report |= {
                "numel": tensor.numel(),
                "weight_bytes": weight.num_bytes,
                "squared_error": weight.squared_error,
                "squared_step": weight.squared_step,
            }
            if weight.indices is not None:
                report["weight_zero_ratio"] = _zero_ratio(weight.indices)
        if parameter.exp_avg is not None and parameter.exp_avg_sq is not None:
            first, second = (_at(self.checkpoint, path) for path in (parameter.exp_avg, parameter.exp_avg_sq))
            masking = weight if weight is not None and weight.indices is not None else None
            rule = AdamRule(parameter.betas, parameter.eps, parameter.step)
            state = AdamStateEncoder(first, second, weight=masking, rule=rule, options=self.options).encode()
            notes += state.notes
            coded += _in_order(parameter, first, second, state, len(coded))
            raw += sum(tensor.numel() * tensor.element_size() for tensor in (first, second))
            report |= {
                "numel": first.numel(),
                "momentum_bytes": state.first.num_bytes,
                "second_moment_bytes": state.second.num_bytes,
                "momentum_zero_ratio": _zero_ratio(as_float32(state.first.decoded)),
                "update_max": state.update_max,
                "exact_update_max": state.exact_update_max,
            }
        for item in coded:
            item.finish(keep=item.path == parameter.weight)
        bound = sum(item.coded.bound_bits for item in coded) / 8
        kinds = [item.coded.kind for item in coded]
        return coded, ParameterReport(
            name=parameter.name, raw_bytes=raw, bound_bytes=bound, kinds=kinds, notes=notes, **report
        )

    def exact(self, path: Path, tensor: Tensor) -> _Coded:
        in_state = self.root is not None and path[:-1] == self.root
        stored = self.reference.weights.get(str(path[-1])) if in_state else None
        same = stored is not None and same_bits(tensor, stored)
        coded = self.unchanged(tensor, stored) if same and stored is not None else exact_tensor(tensor, self.options)
        item = _Coded(path, tensor, coded)
        item.finish(keep=in_state)
        return item


def _zero_ratio(values: NDArray[Any]) -> float:
    return 1 - np.count_nonzero(values != 0) / max(len(values), 1)


def _in_order(
    parameter: Parameter, exp_avg: Tensor, exp_avg_sq: Tensor, state: CodedAdamState, place: int
) -> list[_Coded]:
    """Both moments, the one that the other needs to be decoded first; `place` is where the first of them goes."""
    assert parameter.exp_avg is not None
    assert parameter.exp_avg_sq is not None
    needs = {"weight": 0} if state.masked else {}
    first = _Coded(parameter.exp_avg, exp_avg, state.first, needs)
    second = _Coded(parameter.exp_avg_sq, exp_avg_sq, state.second)
    if state.scaled:
        first.needs["second_moment"] = place
        return [second, first]
    if state.second.kind == "masked":
        second.needs["first_moment"] = place
    return [first, second]


def _coded_parameters(
    checkpoint: Mapping[str, Any], tensors: dict[Path, Tensor], reference: Reference, options: ExCPOptions
) -> list[Parameter]:
    # what has not changed at all is frozen, and its place in the optimiser belongs to another weight
    frozen = {
        name
        for name, stored in reference.weights.items()
        for tensor in [tensors.get((*(state_dict_path(checkpoint) or ()), name))]
        if tensor is not None and same_bits(tensor, stored)
    }

    def fits(path: Path | None) -> bool:
        return path is not None and _lossy(_at(checkpoint, path), options)

    chosen = []
    for parameter in find_parameters(checkpoint, frozen=frozen):
        weight = parameter.weight if fits(parameter.weight) else None
        moments = fits(parameter.exp_avg) and fits(parameter.exp_avg_sq)
        if weight is not None or moments:
            changes = {"weight": weight} | ({} if moments else {"exp_avg": None, "exp_avg_sq": None})
            chosen.append(Parameter(**(parameter.__dict__ | changes)))
    return chosen


def _ties(tensors: dict[Path, Tensor], first: set[Path]) -> dict[Path, Path]:
    """Tensors that hold the same bits as an earlier one of the state dict (`first` count as earliest)."""
    ties: dict[Path, Path] = {}
    groups: dict[Any, list[Path]] = {}
    for path in sorted(tensors, key=lambda item: item not in first):
        tensor = tensors[path]
        for other in groups.setdefault((tensor.dtype, tensor.shape), []):
            twin = tensors[other]
            # few tensors get past the first elements, so that comparing all of them costs little
            near = same_bits(tensor.reshape(-1)[:64], twin.reshape(-1)[:64])
            if tensor.data_ptr() == twin.data_ptr() or (near and same_bits(tensor, twin)):
                ties[path] = other
                break
        else:
            groups[tensor.dtype, tensor.shape].append(path)
    return ties


def encode(
    checkpoint: Mapping[str, Any],
    reference: Reference | None = None,
    options: ExCPOptions | None = None,
    *,
    previous_weights: Mapping[str, Tensor] | None = None,
    workers: int = 1,
) -> EncodedSave:
    """Codes a checkpoint. The result depends on the arguments alone, not on the number of threads.

    Tensors with NaN or infinity are stored exactly, and the report says so. Nothing of the arguments is changed.

    Args:
        checkpoint: as Lightning writes it: `state_dict`, `optimizer_states` and whatever else; or a bare state dict.
        reference: of the last save, from its `EncodedSave` or from `decode`; None makes a key frame.
        options: settings.
        previous_weights: the state dict of the last save before it was coded, against which steps are measured. None
            takes the smallest steps that fit the errors which the last save reported: that saves the memory of one
            set of weights, keeps `error_target` all the same, and makes saves larger.
        workers: threads that code tensors side by side.

    Returns:
        the coded save, with its report and the reference for the next save.

    Raises:
        ValueError: the reference is of another model; a package that the back end needs is not installed.
    """
    options = options or ExCPOptions()
    require_backend(options.backend)
    encoder = _Encoder(checkpoint, reference, options, previous_weights)
    tensors = {path: tensor for path, tensor in tensors_of(checkpoint) if tensor.numel() >= options.min_numel}
    parameters = _coded_parameters(checkpoint, tensors, encoder.reference, options)
    claimed = {path for item in parameters for path in (item.weight, item.exp_avg, item.exp_avg_sq) if path}
    root = encoder.root
    ties = _ties({path: tensors[path] for path in tensors if root is not None and path[:-1] == root}, claimed)
    parameters = [item for item in parameters if item.weight not in ties]
    claimed = {path for item in parameters for path in (item.weight, item.exp_avg, item.exp_avg_sq) if path}
    _check_model(encoder, tensors, root)

    results = run_all(encoder.parameter, parameters, workers)
    loose = [path for path in tensors if path not in claimed and path not in ties]
    exact = run_all(lambda path: encoder.exact(path, tensors[path]), loose, workers)

    writer = PayloadWriter()
    records: list[dict[str, Any]] = []
    places: dict[Path, int] = {}
    following = Reference()
    entries: list[tuple[str, str, list[int], int]] = []
    for number, group in enumerate([coded for coded, _ in results] + [[item] for item in exact]):
        start = len(records)
        for item in group:
            record: dict[str, Any] = {
                "path": list(item.path),
                "dtype": DTYPE_NAMES[item.tensor.dtype],
                "shape": list(item.tensor.shape),
                "kind": item.coded.kind,
                "group": number,
                "crc32": item.checksum,
                "streams": writer.add_all(item.coded.streams),
            }
            if item.coded.meta:
                record["meta"] = item.coded.meta
            if item.needs:
                record["needs"] = {role: start + place for role, place in item.needs.items()}
            places[item.path] = len(records)
            records.append(record)
            if root is not None and item.path[:-1] == root:
                name = str(item.path[-1])
                follow(following, name, item.coded)
                record["squared_error"] = following.squared_errors[name]
                entries.append((name, record["dtype"], record["shape"], record["crc32"]))
    for path, other in ties.items():
        shared = tensors[path].data_ptr() == tensors[other].data_ptr()
        records.append({"path": list(path), "kind": "tied", "to": places[other], "shared": shared})
    following.digest = digest_of(entries)
    payload = writer.join()
    raw_bytes = sum(tensor.numel() * tensor.element_size() for path, tensor in tensors.items() if path not in ties)
    report = _report(encoder, [part for _, part in results], tensors, raw_bytes, len(payload))
    header = {
        "options": options.__dict__,
        "base_digest": None if reference is None else reference.digest,
        "digest": following.digest,
        "records": records,
        "report": report.to_dict(),
    }
    rest = replace(own_copy(checkpoint, {*places, *ties}), dict.fromkeys([*places, *ties]))
    return EncodedSave(header, payload, rest, following)


def _check_model(encoder: _Encoder, tensors: dict[Path, Tensor], root: Path | None) -> None:
    known = encoder.reference.weights
    if encoder.key_frame or not known:
        return
    same = sum(
        str(path[-1]) in known and known[str(path[-1])].shape == tensor.shape
        for path, tensor in tensors.items()
        if root is not None and path[:-1] == root
    )
    if same < len(known) / 2:
        raise ValueError(
            f"ExCP: only {same} of the {len(known)} weights of the last save are in this checkpoint, so it is of "
            "another model; start a new chain with a key frame"
        )


def _report(
    encoder: _Encoder, parts: list[ParameterReport], tensors: dict[Path, Tensor], raw_bytes: int, payload_bytes: int
) -> SaveReport:
    source: StepSource = "none" if encoder.key_frame else "bound" if encoder.previous is None else "exact"
    names = {part.name for part in parts}
    old = set(encoder.reference.weights)
    in_state = {str(path[-1]) for path in tensors if encoder.root is not None and path[:-1] == encoder.root}
    weights = [part for part in parts if part.numel and part.kinds]
    exact = sum(part.numel for part in weights if part.kinds[0] == "exact")
    return SaveReport(
        key_frame=encoder.key_frame,
        parameters=parts,
        raw_bytes=raw_bytes,
        payload_bytes=payload_bytes,
        step_source=source,
        key_frame_advised=not encoder.key_frame and exact > 0.5 * sum(part.numel for part in weights),
        added=[] if encoder.key_frame else sorted(names & in_state - old),
        removed=sorted(old - in_state),
    )
