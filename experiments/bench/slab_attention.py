"""An attention layer of Swin-T's first stage over more and more tokens: softmax against linear attention.

The whole layer on both sides: query, key and value projection, attention, and for the linear form the depthwise
convolution of the values, output projection. Softmax is torch's `scaled_dot_product_attention`, which holds no N x N
matrix. The two compute different things; linear attention is compared with its own N x N form first.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ...lightning_modules.slab import SimplifiedLinearAttention
from ...lightning_modules.vision.attention import GlobalAttention
from ...lightning_modules.vision.slots import AttentionPlace
from .registry import Settings
from .rows import Row, compare
from .slab_forms import LIMITS, dtype_of, matmul, matmul_bound, operations
from .timing import Timing, measure, require_same

# 14 x 14 to 112 x 112: 3136 are the patches of 4 x 4 pixels of an image of 224 x 224
TOKENS = (196, 784, 3136, 12544)
DIM, HEADS = 96, 3
# the N x N form of more tokens is not written out
_MOST_EXPLICIT = 3136


def attention_rows(settings: Settings, picture: Path) -> Iterator[Row]:
    """A row per number of tokens, and the picture of their growth."""
    tokens = TOKENS[:3] if settings.quick else TOKENS
    linear, softmax = {}, {}
    for count in tokens:
        row, linear[count], softmax[count] = _measure(count, settings)
        yield row
    draw_growth(linear, softmax, picture, title=f"Attention layer of {DIM} channels, {HEADS} heads, {settings.device}")
    yield growth_row(linear, softmax)


@torch.no_grad()
def _measure(count: int, settings: Settings) -> tuple[Row, Timing, Timing]:
    case, side, dtype = f"tokens={count}", math.isqrt(count), dtype_of(settings)
    torch.manual_seed(settings.seed)
    linear = SimplifiedLinearAttention(DIM, num_heads=HEADS, grid=(side, side)).to(settings.device, dtype).eval()
    place = AttentionPlace(pattern="global", dim=DIM, num_heads=HEADS, grid=(side, side))
    softmax = GlobalAttention(place).to(settings.device, dtype).eval()
    softmax.qkv, softmax.projection = linear.qkv, linear.projection
    generator = torch.Generator().manual_seed(settings.seed)
    x = torch.randn(1, count, DIM, generator=generator).to(settings.device, dtype)
    if count <= _MOST_EXPLICIT:
        explicit = copy.deepcopy(linear)
        explicit.backend = "reference"
        require_same(case, "the N x N form", [explicit(x)], [linear(x)], LIMITS[dtype])
    num_operations = operations(lambda: linear(x))
    timings = measure(
        {
            "linear": lambda: linear(x),
            "softmax": lambda: softmax(x, (side, side)),
            "matmul": matmul(settings),
        },
        device=settings.device,
        # softmax over the most takes a second
        repeats=settings.repeats if count < TOKENS[-1] else min(settings.repeats, 9),
        warmup=1,
        seed=settings.seed,
    )
    row = compare(
        case, "attention_ms", timings["linear"], peer="softmax", theirs=timings["softmax"],
        **matmul_bound(num_operations, timings["matmul"]),
    )  # fmt: skip
    return row, timings["linear"], timings["softmax"]


def growth(timings: dict[int, Timing]) -> float:
    """Exponent p of `time ~ tokens^p` between the two largest numbers of tokens."""
    (few, before), (many, after) = sorted(timings.items())[-2:]
    return math.log(after.median_ms / before.median_ms) / math.log(many / few)


def growth_row(linear: dict[int, Timing], softmax: dict[int, Timing]) -> Row:
    """The exponents as a row: 1 is linear, 2 quadratic."""
    few, many = sorted(linear)[-2:]
    ours, theirs = growth(linear), growth(softmax)
    return Row(f"tokens={few}..{many}", "growth_exponent", ours, "", peer="softmax", peer_value=theirs, bound="linear",
               bound_value=1.0)  # fmt: skip


def draw_growth(linear: dict[int, Timing], softmax: dict[int, Timing], path: Path, *, title: str) -> None:
    """Times over tokens on logarithmic axes, with lines of slope 1 and 2 to compare with.

    Args:
        linear: timings by number of tokens.
        softmax: timings by number of tokens.
        path: PNG file.
        title: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for timings, name, colour, power in ((softmax, "softmax", "tab:red", 2), (linear, "linear", "tab:blue", 1)):
        tokens = sorted(timings)
        times = [timings[count].median_ms for count in tokens]
        axis.plot(tokens, times, "o-", color=colour, label=f"{name}, exponent {growth(timings):.2f} at the end")
        slope = [times[-1] * (count / tokens[-1]) ** power for count in tokens]
        axis.plot(tokens, slope, ":", color=colour, linewidth=1, label="quadratic" if power == 2 else "linear growth")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sorted(linear), [str(count) for count in sorted(linear)])
    axis.minorticks_off()
    axis.set_xlabel("tokens")
    axis.set_ylabel("milliseconds")
    axis.set_title(title, fontsize="medium")
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
