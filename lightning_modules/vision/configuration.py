"""`VisionConfig`: sizes of an image backbone and what fills its slots."""

from typing import Any, Literal

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from .slots import ATTENTIONS, NORMS

Architecture = Literal["deit", "swin", "pvt", "cswin"]
Pooling = Literal["class_token", "mean"]
Positions = Literal["fixed", "interpolated"]
ARCHITECTURES = ("deit", "swin", "pvt", "cswin")


class VisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of DeiT, Swin, PVT and CSwin. Lists have one entry per stage; DeiT is one stage.

    Args:
        architecture: which of the four.
        image_size: side of the images that tables of positions are made for, in pixels.
        num_channels: channels of an image.
        patch_size: side of a patch of the first stage, in pixels.
        hidden_sizes: channels.
        depths: blocks.
        num_heads: heads.
        mlp_ratios: width of the feed-forward layer over the channels.
        window_size: side of Swin's windows, in tokens.
        reduction_ratios: side of the patches that PVT's keys and values are made from, in tokens.
        stripe_widths: of CSwin's stripes, in tokens.
        norm: name of a norm slot: layernorm, prepbn, repbn, batchnorm; identity in the fused form.
        norm_options: options of the slot's builder.
        norm_eps: of LayerNorm.
        map_norm: name of another norm slot for the maps of a backbone; `affine` in the fused form.
        attention: name of an attention slot, softmax or simplified_linear; a list names one per stage.
        attention_options: options of the builders other than `softmax`'s.
        positions: `fixed` takes images of `image_size` only where there are absolute tables; `interpolated` resizes
            the tables (bicubic) to each input.
        pooling: what the classifier reads; by default the class token for DeiT and PVT, the mean of tokens otherwise.
            DeiT and PVT have a class token only for the former.
        drop_path_rate: probability of leaving out a residual branch in the last block; linear from 0 in the first.
        initializer_range: standard deviation of linear layers and tables.
        out_features: stages whose maps a backbone gives, `stage1` and so on; the last one by default.
        out_indices: the same by number, 1 for `stage1`.
        **options: as for transformers' `PreTrainedConfig`, `num_labels` among them.

    Raises:
        ValueError: an unknown word; lists of different lengths; heads that do not divide the channels.
    """

    model_type = "tenfold-vision"

    architecture: str = "deit"
    image_size: int = 224
    num_channels: int = 3
    patch_size: int = 16
    hidden_sizes: list[int] | None = None
    depths: list[int] | None = None
    num_heads: list[int] | None = None
    mlp_ratios: list[float] | None = None
    window_size: int = 7
    reduction_ratios: list[int] | None = None
    stripe_widths: list[int] | None = None
    norm: str = "layernorm"
    norm_options: dict[str, Any] | None = None
    norm_eps: float = 1e-6
    map_norm: str | None = None
    attention: str | list[str] = "softmax"
    attention_options: dict[str, Any] | None = None
    positions: str = "fixed"
    pooling: str | None = None
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in what follows from other fields, and check."""
        self.hidden_sizes = list(self.hidden_sizes or [192])
        stages = len(self.hidden_sizes)
        self.depths = list(self.depths or [12])
        self.num_heads = list(self.num_heads or [3])
        self.mlp_ratios = list(self.mlp_ratios or [4.0] * stages)
        self.reduction_ratios = list(self.reduction_ratios or [1] * stages)
        self.stripe_widths = list(self.stripe_widths or [1] * stages)
        if isinstance(self.attention, str):
            self.attention = [self.attention] * stages
        if self.pooling is None:
            self.pooling = "class_token" if self.architecture in ("deit", "pvt") else "mean"
        self._check(stages)
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, stages + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    def _check(self, stages: int) -> None:
        words = {"architecture": ARCHITECTURES, "positions": ("fixed", "interpolated")}
        words["pooling"] = ("class_token", "mean") if self.architecture in ("deit", "pvt") else ("mean",)
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(known)} for {self.architecture}"
                )
        for name in ("depths", "num_heads", "mlp_ratios", "reduction_ratios", "stripe_widths", "attention"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, hidden_sizes {stages}; give one per stage"
                )
        if self.architecture == "deit" and stages != 1:
            raise ValueError(f"deit has one stage, hidden_sizes has {stages} entries; give one")
        for size, heads in zip(self.hidden_sizes or (), self.num_heads or (), strict=True):
            if size % heads:
                raise ValueError(f"hidden size {size} is not a multiple of its {heads} heads; change one of them")
        NORMS.check(self.norm)
        if self.map_norm is not None:
            NORMS.check(self.map_norm)
        for name in self.attention:
            ATTENTIONS.check(name)

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of tokens of a stage, counted from 0, at `image_size`."""
        side = self.image_size // self.patch_size
        for _ in range(stage):
            # Swin pads an odd side, CSwin's padded convolution rounds up as well
            side = side // 2 if self.architecture == "pvt" else -(-side // 2)
        return side, side
