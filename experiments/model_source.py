"""Models by name: a checkpoint of a run, a model folder, a hub id, or `asset:NAME`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from .. import lightning_modules as _lightning_modules  # noqa: F401 (registers the model types)
from ..callbacks.excp.container import is_save
from ..callbacks.excp.restore import load_checkpoint
from ..datamodules import resolve
from ..inference.evals.loading import (
    Dtype,
    check_tokenizer,
    is_image_classifier,
    load_model,
    load_tokenizer,
    pick_dtype,
)


class Source(NamedTuple):
    """A loaded network, and the folder or name that its tokenizer loads from, if any is known."""

    model: Any
    tokenizer: str | None

    @property
    def is_image_classifier(self) -> bool:
        """Whether the network reads pictures; then there is no tokenizer."""
        return is_image_classifier(self.model.config)


def read_checkpoint(path: Path) -> Source:
    """The network of a Lightning checkpoint of a language model or an image classifier, in its stored precision.

    Args:
        path: what `CausalLMModule` or `ImageClassificationModule` wrote, plain or coded.

    Raises:
        ValueError: another kind of file, or a state dict that does not fit.
    """
    if is_save(path):
        checkpoint = load_checkpoint(path)
    else:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} cannot be read as a checkpoint of plain data: {reason}") from error
    if not isinstance(checkpoint, dict) or "model_config" not in checkpoint:
        raise ValueError(
            f"{path} has no model_config: only checkpoints of CausalLMModule and "
            f"ImageClassificationModule can be exported"
        )
    fields = dict(checkpoint["model_config"])
    fields.pop("dtype", None)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    auto_class: Any = AutoModelForImageClassification if is_image_classifier(config) else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto_class.from_config(config)
    state = {
        key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")
    }
    model = type(model)(model.config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [key for key in missing if key not in getattr(model, "all_tied_weights_keys", {})]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit its own configuration: missing {missing[:3]}, unexpected {unexpected[:3]}"
        )
    return Source(model.eval(), checkpoint.get("tokenizer_folder"))


def load_source(
    name: str, *, dtype: Dtype = "auto", device: torch.device | str = "cpu", images: bool = False
) -> Source:
    """Load a checkpoint, or a model by folder, hub id or `asset:NAME`, in evaluation mode.

    Args:
        name: which.
        dtype: of the weights; `auto` is float32 on a CPU, else as stored.
        device: where the model goes.
        images: take image classifiers as well as language models.

    Raises:
        ValueError: a file that is not a checkpoint of ours, a folder that is not a model, or one of another kind.
        FileNotFoundError: nothing there.
    """
    path = Path(name)
    if not path.is_file():
        if path.suffix == ".ckpt":
            raise FileNotFoundError(f"{name} does not exist; a run keeps its newest in checkpoints/last.ckpt")
        folder = resolve(name)
        model = load_model(folder, dtype=dtype, device=device, images=images)
        return Source(model, None if is_image_classifier(model.config) else folder)
    source = read_checkpoint(path)
    if source.is_image_classifier and not images:
        raise ValueError(f"{name} holds an image classifier; a language model is needed here")
    wanted = pick_dtype(dtype, torch.device(device))
    model = source.model.to(device=device, dtype=None if wanted == "auto" else wanted)
    return Source(model, source.tokenizer)


def source_tokenizer(source: Source, override: str | None = None) -> Any:
    """The tokenizer of a model, or another one, checked against the model's embedding.

    Raises:
        ValueError: none is known, none can be loaded, or it does not belong to the model.
    """
    name = override or source.tokenizer
    if name is None:
        raise ValueError("no tokenizer is known for this model; pass --tokenizer FOLDER")
    tokenizer = load_tokenizer(resolve(name))
    check_tokenizer(source.model, tokenizer)
    return tokenizer
