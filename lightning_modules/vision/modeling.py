"""DeiT, Swin, PVT and CSwin as transformers models: an image classifier, and a backbone that gives maps."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, initialization
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput

from .configuration import VisionConfig
from .layers import Block, ConvEmbedding, PatchMerging
from .slots import NORMS, AttentionPlace, Pattern, build_norm

PATTERNS: dict[str, Pattern] = {"deit": "global", "swin": "window", "pvt": "reduced", "cswin": "stripe"}
# learned parameters that no layer multiplies with
TABLES = ("positions", "relative_positions", "class_token")


class Stage(nn.Module):
    """An embedding that sets width and resolution, and blocks.

    Args:
        config: sizes.
        index: number of the stage, from 0.
    """

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        dim, grid, first = config.hidden_sizes[index], config.grid(index), index == 0
        in_channels = config.num_channels if first else config.hidden_sizes[index - 1]
        last = index == len(config.depths) - 1
        self.class_token = config.pooling == "class_token" and last
        self.embedding = self._embedding(config, in_channels, dim, first=first, grid=grid)
        size = {
            "deit": 1,
            "swin": config.window_size,
            "pvt": config.reduction_ratios[index],
            "cswin": max(grid) if last else config.stripe_widths[index],
        }[config.architecture]
        before, total = sum(config.depths[:index]), max(1, sum(config.depths) - 1)
        self.blocks = nn.ModuleList(
            Block(
                config,
                config.attention[index],
                AttentionPlace(
                    pattern=PATTERNS[config.architecture],
                    dim=dim,
                    num_heads=config.num_heads[index],
                    grid=grid,
                    size=size,
                    shifted=bool(number % 2),
                    class_token=self.class_token,
                ),
                mlp_ratio=config.mlp_ratios[index],
                drop_path=config.drop_path_rate * (before + number) / total,
            )
            for number in range(config.depths[index])
        )

    def _embedding(
        self, config: Any, in_channels: int, dim: int, *, first: bool, grid: tuple[int, int]
    ) -> ConvEmbedding | PatchMerging:
        patch = config.patch_size if first else 2
        if config.architecture == "swin" and not first:
            return PatchMerging(config, in_channels, dim)
        if config.architecture == "cswin":
            # overlapping patches: 7 with stride 4, then 3 with stride 2
            kernel, padding = (2 * patch - 1, patch // 2)
            return ConvEmbedding(config, in_channels, dim, kernel_size=kernel, stride=patch, padding=padding)
        return ConvEmbedding(
            config,
            in_channels,
            dim,
            kernel_size=patch,
            stride=patch,
            norm=config.architecture != "deit",
            class_token=self.class_token,
            grid=None if config.architecture == "swin" else grid,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Map (B, c, H, W) to tokens (B, N, C), and rows and columns of those that are no class token."""
        x, grid = self.embedding(x)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid

    def map_of(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, N, C) as a map (B, C, R, S), without the class token."""
        return x[:, int(self.class_token) :].transpose(1, 2).unflatten(-1, grid)


class VisionPreTrainedModel(PreTrainedModel):
    """Base of both models: how weights start.

    Args:
        config: sizes.
    """

    config_class = VisionConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    _no_split_modules = ("Block",)  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            initialization.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)
        elif hasattr(module, "initialise"):
            initialise: Any = module.initialise
            initialise()
        for name, table in module.named_parameters(recurse=False):
            if name in TABLES:
                # linear attention's table starts at 0
                scale = 0.0 if hasattr(module, "depthwise") else std
                initialization.trunc_normal_(table, std=scale) if scale else initialization.zeros_(table)


class VisionForImageClassification(VisionPreTrainedModel):
    """Stages, a norm, pooling and a linear classifier.

    Args:
        config: sizes; `num_labels` classes.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.stages = nn.ModuleList(Stage(config, index) for index in range(len(config.depths or ())))
        width = (config.hidden_sizes or [0])[-1]
        self.norm = build_norm(config, width)
        self.head = nn.Linear(width, config.num_labels or 0)
        self.post_init()

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the classifier reads, for images (B, c, H, W): (B, C)."""
        x, grid = pixel_values, (0, 0)
        for number, stage in enumerate(self.stages):
            x = x if number == 0 else self.stages[number - 1].map_of(x, grid)  # type: ignore[operator]
            x, grid = stage(x)
        x = self.norm(x)
        return x[:, 0] if self.config.pooling == "class_token" else x.mean(1)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Logits (B, classes) of images (B, c, H, W).

        Args:
            pixel_values: images.
            labels: (B,) classes, or (B, classes) shares of them; None for no loss.
            **kwargs: not used.
        """
        logits = self.head(self.features(pixel_values))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class VisionBackbone(BackboneMixin, VisionPreTrainedModel):
    """The stages as a transformers backbone: maps at one or more scales, for detectors and segmenters.

    Each map has a norm of its own, as in Swin's detectors; it reads nothing but the map, so that a fused model keeps it
    as a per-channel affine.

    Args:
        config: sizes, and `out_features`.
    """

    has_attentions = False

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        sizes = list(config.hidden_sizes or ())
        # the image itself stands for the stem
        self.num_features = [config.num_channels, *sizes]
        last = max(self.config.stage_names.index(name) for name in self.out_features)
        if "stem" in self.out_features:
            raise ValueError("out_features: the stem has no map; use stage1 and so on")
        self.stages = nn.ModuleList(Stage(config, index) for index in range(last))
        self.norms = nn.ModuleDict(
            {name: self._map_norm(config, sizes[int(name.removeprefix("stage")) - 1]) for name in self.out_features}
        )
        self.post_init()

    @staticmethod
    def _map_norm(config: Any, size: int) -> nn.Module:
        return build_norm(config, size) if config.map_norm is None else NORMS.build(config.map_norm, config, size)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Maps (B, C, R, S) of images (B, c, H, W), in the order of `out_features`.

        Args:
            pixel_values: images.
            output_hidden_states: not used.
            output_attentions: not used.
            return_dict: False for a tuple in place of a `BackboneOutput`.
            **kwargs: not used.
        """
        maps, x = [], pixel_values
        for number, stage in enumerate(self.stages, start=1):
            tokens, grid = stage(x)
            if f"stage{number}" in self.norms:
                maps.append(stage.map_of(self.norms[f"stage{number}"](tokens), grid))  # type: ignore[operator]
            x = stage.map_of(tokens, grid)  # type: ignore[operator]
        output = BackboneOutput(feature_maps=tuple(maps))
        return output.to_tuple() if return_dict is False else output
