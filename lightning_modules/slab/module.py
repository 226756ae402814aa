"""Lightning wiring of SLAB for language models: progressive norms in a preset or in a pretrained model."""

from collections.abc import Sequence
from typing import Any

from ..language_model import CausalLMModule
from .norms import ProgressiveNorm
from .replace import replace_norms


class SLABLightning(CausalLMModule):
    """`CausalLMModule` for models whose norms become batch norms under `PRepBNSchedule`.

    A preset or configuration says `norm: prepbn`. A pretrained model gets the norms here (`replace_norms`), unless its
    folder has them already.

    Args:
        model: a preset or the fields of a `DecoderConfig`, see `CausalLMModule`.
        pretrained: a model folder to start from, in place of `model`.
        exclude: names of norms of the pretrained model that stay as they are, see `replace_norms`.
        momentum: of the running statistics of the pretrained model's batch norms.
        **options: as for `CausalLMModule`.

    Raises:
        ValueError: a model without progressive norms; training without a schedule.
    """

    def __init__(
        self,
        model: str | dict[str, Any] = "slab-350m",
        *,
        pretrained: str | None = None,
        exclude: Sequence[str] = (),
        momentum: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(model, pretrained=pretrained, **options)

    def configure_model(self) -> None:
        """Build or load the network once, and see to its norms."""
        built = self.model is not None
        super().configure_model()
        if built or self._blends():
            return
        hparams: Any = self.hparams
        if not hparams.pretrained:
            raise ValueError(
                f"SLABLightning needs `norm: prepbn`, the configuration has {self.model.config.norm!r}; change it, "
                f"or use CausalLMModule"
            )
        replace_norms(self.model, exclude=hparams.exclude, momentum=hparams.momentum)

    def on_fit_start(self) -> None:
        """Refuse a training in which lambda would stay where it is."""
        waiting = [norm for norm in self._blends() if norm.old_norm is not None]
        if waiting and not any(hasattr(callback, "blend_at") for callback in self._trainer.callbacks):  # type: ignore
            raise ValueError(
                f"{len(waiting)} progressive norms and no schedule: evaluation would show norms that were never "
                f"trained; add the callback PRepBNSchedule"
            )

    def _blends(self) -> list[ProgressiveNorm]:
        return [part for part in self.modules() if isinstance(part, ProgressiveNorm)]
