"""Loads a transformers model and its tokenizer for scoring, and refuses what would be scored wrongly."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype = Literal["auto", "stored", "float32", "bfloat16", "float16"]


def pick_device(device: str | None, *, local_rank: int = 0) -> torch.device:
    """The device asked for; without one, this process's GPU, or the CPU where there is none."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        picked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:0, mps, …") from None
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no GPU: use --device cpu")
    return torch.device("cuda", local_rank) if picked.type == "cuda" and picked.index is None else picked


def pick_dtype(dtype: Dtype, device: torch.device) -> "torch.dtype | Literal['auto']":
    """The dtype to load weights in; `stored` is the one in the files, `auto` the same, but float32 on a CPU.

    Half precision is slow on most CPUs and its rounding moves scores in the third digit; float32 holds a stored
    bfloat16 or float16 weight exactly.
    """
    if dtype == "stored" or (dtype == "auto" and device.type != "cpu"):
        return "auto"
    if dtype == "auto":
        return torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def is_image_classifier(config: Any) -> bool:
    """Whether transformers knows an image classifier, and no language model, for a configuration."""
    kind = type(config)
    return (
        kind in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        and kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    )


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: Dtype = "auto",
    device: torch.device | str = "cpu",
    images: bool = False,
) -> "PreTrainedModel":
    """Load a causal (or encoder-decoder) language model through transformers' Auto classes.

    Code that lies in the folder or in the hub repository is never run. Model types of our own must be registered by
    the caller (importing `tenfold.lightning_modules` does it).

    Args:
        source: A model folder or a hub id.
        dtype: dtype of the weights; see `pick_dtype`.
        device: Where the model goes.
        images: Take image classifiers as well.

    Raises:
        FileNotFoundError: There is no such folder, or no such hub model within reach.
        ValueError: The folder is not a model that can be loaded whole, needs code of its own, or is of another kind.
    """
    name, local = _locate(source)
    if local and not Path(name, "config.json").is_file():
        raise ValueError(
            f"{name} is not a model folder: it has no config.json (`tenfold export` makes one from a checkpoint)"
        )
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
    except Exception as error:
        raise _load_error(name, local, error) from error
    device = torch.device(device)
    if config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        auto_class: Any = transformers.AutoModelForSeq2SeqLM
    elif is_image_classifier(config):
        if not images:
            raise ValueError(f"{name} is an image classifier; a language model is needed here")
        auto_class = transformers.AutoModelForImageClassification
    else:
        auto_class = transformers.AutoModelForCausalLM
    try:
        loaded = auto_class.from_pretrained(
            name, config=config, dtype=pick_dtype(dtype, device), output_loading_info=True, **options
        )
    except Exception as error:
        raise _load_error(name, local, error) from error
    # a class that loads itself, as the lookup form does, gives the model alone and checks its files on its own
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})
    # transformers fills such weights with random numbers and goes on
    for kind in ("missing", "mismatched"):
        if keys := sorted(str(key) for key in info.get(f"{kind}_keys", ())):
            raise ValueError(f"{name} cannot be scored: {len(keys)} weights are {kind} in its files, first {keys[0]}")
    return model.to(device).eval()


def load_tokenizer(source: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies with a model.

    Args:
        source: A folder or a hub id.

    Raises:
        FileNotFoundError: There is no such folder, or no such hub model within reach.
        ValueError: No tokenizer is there.
    """
    name, local = _locate(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:
        raise ValueError(f"no tokenizer in {name} ({_one_line(error)}): name another one with --tokenizer") from error


def check_tokenizer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot belong to the model.

    Raises:
        ValueError: The tokenizer makes ids that the embedding has no row for, or names no token to start a text with.
    """
    rows = _embedding_rows(model)
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer does not match the model: its largest token id is {largest}, "
            f"the model's embedding has {rows} rows; give the tokenizer the model was trained with"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer names neither a BOS nor an EOS token, one of which must stand before the first token of a "
            "text: set eos_token in tokenizer_config.json"
        )


def _embedding_rows(model: "PreTrainedModel") -> int:
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return int(weight.shape[0] if weight is not None else model.config.get_text_config().vocab_size)


def _locate(source: str | os.PathLike[str]) -> tuple[str, bool]:
    """The name to load from, and whether it is a folder."""
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path), True
    if path.exists():
        raise ValueError(f"{path} is a file, not a model folder (`tenfold export` makes one from a checkpoint)")
    # a hub id is `name` or `owner/name`; anything else can only have meant a folder
    if isinstance(source, os.PathLike) or name.startswith((".", "/", "~")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"model folder {name!r} does not exist")
    return name, False


def _load_error(name: str, local: bool, error: Exception) -> Exception:
    text = _one_line(error)
    # transformers asks for permission in an exception without a type of its own
    if "trust_remote_code" in str(error):
        return ValueError(f"{name} needs Python code from its own files, which is never run: use a supported type")
    if local:
        return ValueError(f"{name} is not a model that transformers can load: {text}")
    return FileNotFoundError(f"{name!r} is neither a folder here nor a hub model within reach: {text}")


def _one_line(error: BaseException, limit: int = 240) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
