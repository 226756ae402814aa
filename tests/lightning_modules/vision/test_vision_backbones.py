"""Backbones against transformers' own models with the same weights, in float64, and published sizes."""

import math

import pytest
import torch
from tenfold.lightning_modules.vision import VisionBackbone, VisionConfig, VisionForImageClassification, vision_config
from tenfold.lightning_modules.vision.attention import StripeAttention, WindowAttention
from tenfold.lightning_modules.vision.slots import AttentionPlace
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoModelForImageClassification,
    PvtConfig,
    PvtForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

torch.set_num_threads(1)

# exact counts of the released DeiT and Swin; PVT and CSwin publish millions: 13.2, 24.5, 44.2 and 23
PARAMETERS = {
    "deit-t": 5_717_416,
    "deit-s": 22_050_664,
    "deit-b": 86_567_656,
    "swin-t": 28_288_354,
    "swin-s": 49_606_258,
    "swin-b": 87_768_224,
    "pvt-t": 13_229_288,
    "pvt-s": 24_485_864,
    "pvt-m": 44_208_104,
    "cswin-t": 22_320_552,
}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_published_sizes(preset: str) -> None:
    with torch.device("meta"):
        model = VisionForImageClassification(vision_config(preset))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]


def fill(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model.state_dict()


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor], names: list[tuple[str, list[str]]]) -> None:
    """Fill every parameter from one of theirs, or from several in a row; both sides must be used up."""
    unused, state = set(weights) - {name for name in weights if name.endswith("relative_position_index")}, {}
    for ours, theirs in names:
        for suffix in ("weight", "bias", ""):
            parts = [f"{name}.{suffix}".rstrip(".") for name in theirs]
            if parts[0] in weights:
                state[f"{ours}.{suffix}".rstrip(".")] = (
                    torch.cat([weights[name] for name in parts]) if parts[1:] else weights[parts[0]]
                )
                unused -= set(parts)
    model.load_state_dict(state)
    assert not unused


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, size: int) -> None:
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = [], []
    for model in (ours.eval(), theirs.eval()):
        image = x.clone().requires_grad_()
        logits = model(pixel_values=image).logits
        (logits * torch.arange(logits.shape[1])).sum().backward()
        outputs.append(logits.detach())
        gradients.append(image.grad)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)
    assert outputs[0].std() > 1e-3


def test_deit_is_transformers_vit() -> None:
    theirs = ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=96,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
            num_labels=5,
        )
    ).double()
    weights = fill(theirs)
    ours = VisionForImageClassification(
        VisionConfig(hidden_sizes=[24], depths=[3], num_heads=[3], image_size=32, patch_size=8, num_labels=5)
    ).double()
    embed = "vit.embeddings"
    names = [
        ("stages.0.embedding.projection", [f"{embed}.patch_embeddings.projection"]),
        ("stages.0.embedding.class_token", [f"{embed}.cls_token"]),
        ("stages.0.embedding.positions", [f"{embed}.position_embeddings"]),
        ("norm", ["vit.layernorm"]),
        ("head", ["classifier"]),
    ]
    for layer in range(3):
        a, b = f"stages.0.blocks.{layer}", next(k for k in weights if f".{layer}.layernorm_before" in k)
        b = b.rpartition(".layernorm_before")[0]
        names += block_names(
            a,
            b,
            norm1="layernorm_before",
            norm2="layernorm_after",
            qkv=["q", "k", "v"],
            weights=weights,
        )
    load(ours, weights, names)
    compare(ours, theirs, 32)


def block_names(
    a: str, b: str, *, norm1: str, norm2: str, qkv: list[str], weights: dict[str, torch.Tensor]
) -> list[tuple[str, list[str]]]:
    """Names of a block, whichever words this release of transformers has for its parts."""

    def find(*words: str) -> str:
        for word in words:
            if f"{b}.{word}.weight" in weights:
                return f"{b}.{word}"
        raise AssertionError((words, [k for k in weights if k.startswith(b)]))

    long = {"q": "query", "k": "key", "v": "value"}
    projections = [
        find(f"attention.{x}_proj", f"attention.attention.{long[x]}", f"attention.self.{long[x]}") for x in qkv
    ]
    return [
        (f"{a}.norm1", [find(norm1)]),
        (f"{a}.norm2", [find(norm2)]),
        (f"{a}.attention.qkv", projections),
        (f"{a}.attention.projection", [find("attention.o_proj", "attention.output.dense")]),
        (f"{a}.fc1", [find("mlp.fc1", "intermediate.dense", "mlp.dense1")]),
        (f"{a}.fc2", [find("mlp.fc2", "output.dense", "mlp.dense2")]),
    ]


# 64: all maps are whole windows, and the last stage is one window; 24: a side of 3, merged with padding (windows of one
# token, as transformers lets padding be seen)
@pytest.mark.parametrize(("image", "window"), [(64, 4), (24, 1)])
def test_swin_is_transformers_swin(image: int, window: int) -> None:
    theirs = SwinForImageClassification(
        SwinConfig(
            image_size=image,
            embed_dim=12,
            depths=[2, 2, 2],
            num_heads=[2, 3, 4],
            window_size=window,
            num_labels=5,
        )
    ).double()
    weights = fill(theirs)
    ours = VisionForImageClassification(
        VisionConfig(
            architecture="swin",
            image_size=image,
            patch_size=4,
            hidden_sizes=[12, 24, 48],
            depths=[2, 2, 2],
            num_heads=[2, 3, 4],
            window_size=window,
            norm_eps=1e-5,
            num_labels=5,
        )
    ).double()
    names = [
        ("stages.0.embedding.projection", ["swin.embeddings.patch_embeddings.projection"]),
        ("stages.0.embedding.norm", ["swin.embeddings.norm"]),
        ("norm", ["swin.layernorm"]),
        ("head", ["classifier"]),
    ]
    for stage, depth in enumerate([2, 2, 2]):
        root = f"swin.encoder.layers.{stage}"
        if stage:
            before = f"swin.encoder.layers.{stage - 1}.downsample"
            names += [(f"stages.{stage}.embedding.{part}", [f"{before}.{part}"]) for part in ("norm", "reduction")]
        for layer in range(depth):
            a, b = f"stages.{stage}.blocks.{layer}", f"{root}.blocks.{layer}"
            table = next(k for k in weights if k.startswith(f"{b}.") and k.endswith("relative_position_bias_table"))
            names += block_names(
                a, b, norm1="layernorm_before", norm2="layernorm_after", qkv=["q", "k", "v"], weights=weights
            )
            names.append((f"{a}.attention.relative_positions", [table]))
    load(ours, weights, names)
    compare(ours, theirs, image)


def test_pvt_is_transformers_pvt() -> None:
    heads, sizes, ratios, depths = [1, 2, 3], [8, 12, 24], [4, 2, 1], [2, 1, 2]
    theirs = PvtForImageClassification(
        PvtConfig(
            image_size=64,
            num_encoder_blocks=3,
            depths=depths,
            hidden_sizes=sizes,
            num_attention_heads=heads,
            sequence_reduction_ratios=ratios,
            patch_sizes=[4, 2, 2],
            strides=[4, 2, 2],
            mlp_ratios=[2, 4, 4],
            num_labels=5,
        )
    ).double()
    weights = fill(theirs)
    ours = VisionForImageClassification(
        VisionConfig(
            architecture="pvt",
            image_size=64,
            patch_size=4,
            hidden_sizes=sizes,
            depths=depths,
            num_heads=heads,
            mlp_ratios=[2, 4, 4],
            reduction_ratios=ratios,
            num_labels=5,
        )
    ).double()
    names = [("norm", ["pvt.encoder.layer_norm"]), ("head", ["classifier"])]
    for stage, depth in enumerate(depths):
        b = f"pvt.encoder.patch_embeddings.{stage}"
        for part, other in (
            ("projection", "projection"),
            ("norm", "layer_norm"),
            ("positions", "position_embeddings"),
            ("class_token", "cls_token"),
        ):
            names.append((f"stages.{stage}.embedding.{part}", [f"{b}.{other}"]))
        for layer in range(depth):
            a, b = f"stages.{stage}.blocks.{layer}", f"pvt.encoder.block.{stage}.{layer}"
            names += [
                (f"{a}.norm1", [f"{b}.layer_norm_1"]),
                (f"{a}.norm2", [f"{b}.layer_norm_2"]),
                (f"{a}.attention.query", [f"{b}.attention.self.query"]),
                (f"{a}.attention.key_value", [f"{b}.attention.self.key", f"{b}.attention.self.value"]),
                (f"{a}.attention.reduction", [f"{b}.attention.self.sequence_reduction"]),
                (f"{a}.attention.norm", [f"{b}.attention.self.layer_norm"]),
                (f"{a}.attention.projection", [f"{b}.attention.output.dense"]),
                (f"{a}.fc1", [f"{b}.mlp.dense1"]),
                (f"{a}.fc2", [f"{b}.mlp.dense2"]),
            ]
    load(ours, weights, names)
    compare(ours, theirs, 64)


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, heads: int
) -> torch.Tensor:
    """(N, C) each; (N, N) bool of who may see whom."""
    out = []
    for q, k, v in zip(*(x.chunk(heads, dim=-1) for x in (query, key, value)), strict=True):
        logits = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        out.append(logits.softmax(-1) @ v)
    return torch.cat(out, -1)


@pytest.mark.parametrize("grid", [(6, 4), (5, 7)], ids=["whole", "padded"])
def test_cswin_stripes(grid: tuple[int, int]) -> None:
    """Token by token over the whole map, with the stripes as a mask and the convolution written out."""
    torch.manual_seed(0)
    place = AttentionPlace(pattern="stripe", dim=8, num_heads=4, grid=(6, 6), size=2)
    layer = StripeAttention(place).double()
    x = torch.randn(1, grid[0] * grid[1], 8, dtype=torch.float64)
    query, key, value = layer.qkv(x)[0].chunk(3, dim=-1)
    row, column = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).unbind(1)
    parts = []
    # first half of the channels: stripes of two columns; second half: of two rows
    for branch, stripe in enumerate((column // 2, row // 2)):
        same = stripe[:, None] == stripe[None, :]
        half = slice(4 * branch, 4 * branch + 4)
        mixed = plain_attention(query[:, half], key[:, half], value[:, half], same, 2)
        kernel, local = layer.local[branch].weight[:, 0], layer.local[branch].bias.expand(len(row), -1).clone()
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                near = (row[None, :] == row[:, None] + down) & (column[None, :] == column[:, None] + right) & same
                local = local + near.double() @ value[:, half] * kernel[:, down + 1, right + 1]
        parts.append(mixed + local)
    expected = layer.projection(torch.cat(parts, -1))
    torch.testing.assert_close(layer(x, grid)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shifted", [False, True])
def test_swin_windows_of_a_padded_map(shifted: bool) -> None:
    """A 7 x 10 map and windows of 4: token by token, padding is seen by nobody."""
    torch.manual_seed(0)
    place = AttentionPlace(pattern="window", dim=6, num_heads=2, grid=(8, 8), size=4, shifted=shifted)
    layer = WindowAttention(place).double()
    torch.nn.init.normal_(layer.relative_positions)
    row, column = torch.cartesian_prod(torch.arange(7), torch.arange(10)).unbind(1)
    moved = 2 if shifted else 0
    # moved windows start at 2, and what lies before is a window of its own
    window = (row - moved).div(4, rounding_mode="floor") * 100 + (column - moved).div(4, rounding_mode="floor")
    x = torch.randn(1, 70, 6, dtype=torch.float64)
    query, key, value = layer.qkv(x)[0].chunk(3, dim=-1)
    same = window[:, None] == window[None, :]
    offset = (row[:, None] - row[None, :] + 3) * 7 + column[:, None] - column[None, :] + 3
    out = []
    for head, (q, k, v) in enumerate(zip(*(t.chunk(2, dim=-1) for t in (query, key, value)), strict=True)):
        bias = layer.relative_positions[offset.clamp(0, 48), head]
        logits = (q @ k.T / 3**0.5 + bias).masked_fill(~same, -torch.inf)
        out.append(logits.softmax(-1) @ v)
    expected = layer.projection(torch.cat(out, -1))
    torch.testing.assert_close(layer(x, (7, 10))[0], expected, rtol=1e-12, atol=1e-12)


SMALL: dict[str, dict[str, object]] = {
    "deit": {"hidden_sizes": [12], "depths": [2], "num_heads": [3], "image_size": 32, "patch_size": 8},
    **{
        name: {
            "architecture": name,
            "image_size": 32,
            "patch_size": 4,
            "hidden_sizes": [8, 16],
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
            "reduction_ratios": [2, 1],
            "stripe_widths": [2, 2],
        }
        for name in ("swin", "pvt", "cswin")
    },
}


@pytest.mark.parametrize("name", SMALL)
def test_classifier_goes_through_a_folder(name: str, tmp_path: object) -> None:
    model = VisionForImageClassification(VisionConfig(**SMALL[name], num_labels=3, norm="prepbn")).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert type(again) is VisionForImageClassification
    assert torch.equal(again(x).logits, model(x).logits)


@pytest.mark.parametrize("name", ["swin", "pvt", "cswin"])
def test_backbone_maps_are_the_classifiers(name: str) -> None:
    """Strides and channels of each map, and the last map is what the classifier's norm gives."""
    config = VisionConfig(**SMALL[name], out_features=["stage1", "stage2"])
    backbone = AutoBackbone.from_config(config).eval()
    assert isinstance(backbone, VisionBackbone)
    fill(backbone)
    classifier = VisionForImageClassification(config).eval()
    weights = backbone.state_dict()
    stages = {key: value for key, value in weights.items() if key.startswith("stages.")}
    last = {f"norm.{key.rpartition('.')[2]}": v for key, v in weights.items() if key.startswith("norms.stage2")}
    missing = classifier.load_state_dict(stages | last, strict=False).missing_keys
    assert set(missing) == {"head.weight", "head.bias"}
    x = torch.randn(2, 3, 32, 32)
    maps = backbone(x).feature_maps
    assert [m.shape[1:] for m in maps] == [(8, 8, 8), (16, 4, 4)]
    assert backbone.channels == [8, 16]
    if name != "pvt":  # PVT's classifier reads its class token
        torch.testing.assert_close(maps[1].mean((2, 3)), classifier.features(x))


def test_backbone_feeds_a_detector() -> None:
    """DETR builds it from its configuration, and gradients reach the first convolution."""
    from transformers import DetrConfig, DetrForObjectDetection

    config = VisionConfig(**SMALL["swin"], out_features=["stage2"])
    detector = DetrForObjectDetection(
        DetrConfig(
            backbone_config=config,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            num_queries=4,
        )
    )
    found = [m for m in detector.modules() if isinstance(m, VisionBackbone)]
    assert len(found) == 1
    detector(pixel_values=torch.randn(1, 3, 48, 40)).logits.sum().backward()
    gradient = found[0].stages[0].embedding.projection.weight.grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["deit", "pvt"])
def test_fixed_tables_refuse_other_sizes(name: str) -> None:
    model = VisionForImageClassification(VisionConfig(**SMALL[name])).eval()
    with pytest.raises(ValueError, match=r"fixed table of positions.*positions: interpolated"):
        model(torch.randn(1, 3, 64, 32))


@pytest.mark.parametrize("name", SMALL)
def test_interpolated_tables_take_any_size(name: str) -> None:
    """The trained size is untouched."""
    fixed = VisionForImageClassification(VisionConfig(**SMALL[name])).eval()
    free = VisionForImageClassification(VisionConfig(**SMALL[name], positions="interpolated")).eval()
    free.load_state_dict(fill(fixed))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fixed(x).logits, free(x).logits)
    wide = free(torch.randn(1, 3, 64, 48)).logits
    assert wide.isfinite().all()


def cubic(old: int, new: int) -> torch.Tensor:
    """(new, old) weights of cubic convolution with a = -0.75 between centres of cells, edges repeated."""
    weights = torch.zeros(new, old, dtype=torch.float64)
    for place in range(new):
        at = (place + 0.5) * old / new - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - tap)
            inner = 1.25 * t**3 - 2.25 * t**2 + 1
            weights[place, min(max(tap, 0), old - 1)] += inner if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
    return weights


def test_tables_are_resized_by_cubic_convolution_and_the_class_token_kept() -> None:
    model = VisionForImageClassification(VisionConfig(**SMALL["deit"], positions="interpolated")).double()
    embedding = model.stages[0].embedding
    torch.nn.init.normal_(embedding.positions)
    resized = embedding._positions_for((6, 3))[0]
    table = embedding.positions[0, 1:].unflatten(0, (4, 4))
    expected = torch.einsum("ai,bj,ijc->abc", cubic(4, 6), cubic(4, 3), table).flatten(0, 1)
    torch.testing.assert_close(resized[1:], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(resized[0], embedding.positions[0, 0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "vgg"}, "architecture 'vgg' is not one of deit"),
        ({"norm": "layernrom"}, "unknown norm 'layernrom'; nearest: layernorm"),
        ({"attention": "simple_linear"}, "unknown attention 'simple_linear'; nearest: simplified_linear"),
        ({"hidden_sizes": [10], "num_heads": [3]}, "hidden size 10 is not a multiple of its 3 heads"),
        ({"depths": [1, 2]}, "depths has 2 entries, hidden_sizes 1"),
        ({"architecture": "swin", "pooling": "class_token"}, "pooling 'class_token' is not one of mean for swin"),
    ],
)
def test_bad_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionConfig(**fields)


def test_unknown_preset_and_field() -> None:
    with pytest.raises(ValueError, match="unknown vision preset 'swin-xl'; nearest: swin"):
        vision_config("swin-xl")
    with pytest.raises(ValueError, match="no field 'drop_path'; nearest: drop_path_rate"):
        vision_config("swin-t", drop_path=0.1)


def test_drop_path_keeps_the_mean_and_drops_whole_images() -> None:
    from tenfold.lightning_modules.vision.layers import DropPath

    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = DropPath(0.25).train()(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))
    assert abs(float(y.mean()) - 1) < 0.03
    assert torch.equal(DropPath(0.25).eval()(x), x)


def test_drop_path_rises_over_all_blocks() -> None:
    model = VisionForImageClassification(VisionConfig(**SMALL["swin"], drop_path_rate=0.3))
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


@pytest.mark.parametrize("norm", ["layernorm", "identity"])
@pytest.mark.parametrize("name", ["deit-t", "swin-t"])
def test_tokens_lie_row_by_row_in_memory(name: str, norm: str) -> None:
    config = vision_config(name, image_size=32, norm=norm, pooling="mean", depths=[1] * len(vision_config(name).depths))
    model = VisionForImageClassification(config)
    tokens = []
    for block in (block for stage in model.stages for block in stage.blocks):
        block.register_forward_hook(lambda module, inputs, output: tokens.append((inputs[0], output)))
    model(torch.randn(2, 3, 32, 32))
    assert len(tokens) == len(config.depths)
    assert all(x.is_contiguous() for pair in tokens for x in pair)


@pytest.mark.parametrize("grid", [(8, 8), (6, 7)], ids=["divided", "padded"])
@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_can_take_the_fast_path(
    shifted: bool, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = F.scaled_dot_product_attention, []

    def attend(query: torch.Tensor, *rest: torch.Tensor, attn_mask: torch.Tensor) -> torch.Tensor:
        calls.append((query.shape, attn_mask.shape))
        return real(query, *rest, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    place = AttentionPlace(pattern="window", dim=6, num_heads=2, grid=(8, 8), size=4, shifted=shifted)
    WindowAttention(place)(torch.randn(3, grid[0] * grid[1], 6), grid)
    ((query, mask),) = calls
    # torch's flash kernel for CPUs takes masks of 2 or 4 dimensions
    assert query == (12, 2, 16, 3)
    assert mask == ((12 if shifted or grid == (6, 7) else 1), 2, 16, 16)


def test_activation_in_place_is_seen_by_nobody() -> None:
    torch.manual_seed(0)
    config = VisionConfig(hidden_sizes=[12], depths=[1], num_heads=[3], image_size=16, patch_size=8)
    model = VisionForImageClassification(config).eval()
    x = torch.randn(2, 3, 16, 16)
    expected, seen = model(x).logits, []
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, expected)
        block = model.stages[0].blocks[0]
        block.norm2.register_forward_hook(lambda module, inputs, output: seen.append(output))
        block.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(x)
        torch.testing.assert_close(seen[1], F.linear(seen[0], block.fc1.weight, block.fc1.bias))
