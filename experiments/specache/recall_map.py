"""What the trained decoder looks up with each cache, by the length of the prompt and the depth of what is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...datamodules import recall_prompts
from ...inference.specache import decode_recorded, record_prompt
from .recall import TRAINED, Recall, caches

CELLS = ("full", "exact-fetch-2", "specache-2", "kivi-2", "window-2", "h2o-2",
         "exact-fetch-1", "specache-1", "kivi-1", "window-1", "h2o-1")  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One place of the map.

    Attributes:
        cache: Label of the cache.
        num_tokens: Of the prompt.
        depth: Where the chain lies that is asked for: 0 at the beginning, 100 at the end.
        tokens: Share of looked-up symbols that the model says, 0 to 1.
    """

    cache: str
    num_tokens: int
    depth: float
    tokens: float


def recall_map(
    model: Any,
    study: Recall = TRAINED,
    *,
    num_keys: tuple[int, ...] = (6, 11, 16, 22),
    num_depths: int = 5,
    labels: tuple[str, ...] = CELLS,
) -> list[Cell]:
    """Fill the map.

    Args:
        model: The trained decoder.
        study: Sizes and seeds of the prompts.
        num_keys: Chains per prompt: the lengths of the map.
        num_depths: Chains that are asked for, evenly from the first to the last.
        labels: Caches.
    """
    cells = []
    for keys in num_keys:
        for place in range(num_depths):
            asked = round(place * (keys - 1) / (num_depths - 1))
            shares: dict[str, list[float]] = {label: [] for label in labels}
            for seed in study.seeds:
                prompts = recall_prompts(
                    num_prompts=study.num_prompts, num_keys=keys, value_length=study.value_length,
                    vocab_size=study.vocab_size, seed=seed, asked=asked,
                )  # fmt: skip
                prompt, wanted = record_prompt(model, prompts.input_ids), prompts.answers[:, 1:]
                length = prompts.input_ids.shape[1]
                for label, build in caches(study, model, length + study.value_length - 1).items():
                    if label in labels:
                        _, logits = decode_recorded(model, prompt, build(), continuation=prompts.answers)
                        shares[label].append((logits[:, 1:].argmax(-1) == wanted).double().mean().item())
            depth = 100 * asked / (keys - 1)
            cells += [Cell(label, length, depth, sum(found) / len(found)) for label, found in shares.items()]
    return cells


def draw_map(cells: list[Cell], path: Path) -> None:
    """One panel per cache, lengths across, depths down.

    Args:
        cells: What `recall_map` gives.
        path: PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(cell.cache for cell in cells))
    lengths = sorted({cell.num_tokens for cell in cells})
    figure = Figure(figsize=(2.1 * (len(labels) + 1) / 2, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, -(-len(labels) // 2), sharey=True, squeeze=False).flat)
    for axis, label in zip(axes, labels, strict=False):
        own = [cell for cell in cells if cell.cache == label]
        columns = [[cell.tokens for cell in own if cell.num_tokens == length] for length in lengths]
        depths = [cell.depth for cell in own if cell.num_tokens == lengths[-1]]
        mesh = axis.pcolormesh(list(zip(*columns, strict=True)), cmap="RdYlGn", vmin=0, vmax=1,
                               edgecolors="#888888", linewidth=0.5)  # fmt: skip
        axis.set_title(label, fontsize="medium")
        axis.set_xticks([place + 0.5 for place in range(len(lengths))], [str(length) for length in lengths])
        axis.set_yticks([place + 0.5 for place in range(len(depths))], [f"{depth:.0f} %" for depth in depths])
    for axis in axes[len(labels) :]:
        axis.set_axis_off()
    figure.axes[0].invert_yaxis()
    figure.supxlabel("tokens of the prompt")
    figure.supylabel("depth of the chain that is asked for")
    figure.colorbar(mesh, ax=figure.axes, label="symbols looked up")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
