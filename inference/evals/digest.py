"""Digests that say what was scored: the model, its tokenizer, the data."""

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# files of a model folder that do not change what the model computes
_IGNORED = (
    ".*",
    "*.md",
    "*.log",
    "*.csv",
    "*.html",
    "LICENSE*",
    "NOTICE*",
    "events.out.*",
    "optimizer*",
    "results.json",
    "rng_state*",
    "samples_*.jsonl",
    "scheduler*",
    "trainer_state.json",
    "training_args.bin",
)
# keys of a configuration that saving and loading write; the dtype is digested with each tensor
_PROVENANCE_KEYS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def model_digest(model: "str | os.PathLike[str] | PreTrainedModel") -> str:
    """Digest of a model: its configuration and every byte of its weights.

    A folder's digest covers all files that the model is loaded from (configuration, weights, tables beside them,
    tokenizer), by name and content, so a Tenfold form that keeps a table outside its safetensors is covered too.
    A model in memory is digested from its configuration and state dict: the two digests of one model differ, and
    anything the model keeps outside its state dict is not seen.

    Args:
        model: A model folder, or a loaded model.

    Returns:
        `sha256:` followed by 64 hexadecimal digits.

    Raises:
        FileNotFoundError: The folder does not exist or holds no files.
    """
    if isinstance(model, (str, os.PathLike)):
        return _folder_digest(Path(model))
    digest = hashlib.sha256(b"model\0")
    config = {key: value for key, value in model.config.to_dict().items() if key not in _PROVENANCE_KEYS}
    digest.update(_canonical(config))
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
        _update_with_tensor(digest, tensor)
    return f"sha256:{digest.hexdigest()}"


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Digest of what a tokenizer does: its backend (or vocabulary), special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    parts = [rules, tokenizer.special_tokens_map, tokenizer.chat_template]
    return f"sha256:{hashlib.sha256(_canonical(parts)).hexdigest()}"


def files_digest(files: Iterable[Path]) -> str:
    """Digest of files by name (without their folder) and content, independent of their order."""
    paths = sorted(files, key=lambda path: path.name)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        parts = list(zip((path.name for path in paths), pool.map(_file_sha256, paths), strict=True))
    return f"sha256:{hashlib.sha256(_canonical(parts)).hexdigest()}"


def samples_digest(samples: Iterable[Mapping[str, Any]]) -> str:
    """Digest of the documents, prompts and targets that a task really scored, independent of their order.

    Args:
        samples: lm-eval's sample rows of one task.
    """
    parts = sorted((row["doc_id"], row["doc_hash"], row["prompt_hash"], row["target_hash"]) for row in samples)
    return f"sha256:{hashlib.sha256(_canonical(parts)).hexdigest()}"


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, default=str).encode() + b"\0"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_digest(folder: Path) -> str:
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(fnmatch.fnmatch(part, pattern) for part in path.relative_to(folder).parts for pattern in _IGNORED)
    }
    if not files:
        raise FileNotFoundError(f"no model files in {folder}: give the folder that holds config.json and the weights")
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        sums = list(pool.map(_file_sha256, files.values()))
    return f"sha256:{hashlib.sha256(_canonical(list(zip(files, sums, strict=True)))).hexdigest()}"


def _update_with_tensor(digest: Any, tensor: Any) -> None:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    for chunk in flat.split(1 << 26):
        digest.update(chunk.numpy().data)
