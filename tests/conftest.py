"""What every test stands on: nothing is fetched, kernels run without a GPU, real assets are used where they are."""

# these come first: lightning and transformers import triton, which reads its variable then
import os

import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
for _name, _value in {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TENFOLD_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}.items():
    os.environ[_name] = _value
# one path whatever the machine's cache holds; tests/kernels/test_native_kernels.py builds the other and compares
os.environ.setdefault("TENFOLD_CPU_KERNELS", "off")
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    # the workers share the cores, and so do the processes that tests start
    _threads = max(1, (os.cpu_count() or 1) // _workers)
    torch.set_num_threads(_threads)
    os.environ["OMP_NUM_THREADS"] = str(_threads)

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import pytest  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU on a machine that has none."""
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def require_asset() -> Callable[[str], Path]:
    """The folder of a named asset; a test skips where it is missing, or fails if it is a default and `CI` is set."""

    def find(name: str) -> Path:
        from tenfold.datamodules.assets import DEFAULT_ASSETS, find_asset

        folder = find_asset(name)
        if folder is None:
            reason = f"asset {name} is missing; `tenfold assets get {name}` gets it"
            if os.environ.get("CI") and name in DEFAULT_ASSETS:
                pytest.fail(reason)
            pytest.skip(reason)
        return folder

    return find


class TinyTokenizer(NamedTuple):
    """A small byte-level BPE tokenizer as an object and as a saved folder."""

    tokenizer: Any
    folder: Path


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TinyTokenizer:
    """320 entries, trained on a few lines; knows every byte, has eos and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = [
        "The lookup table holds one row for each token of the vocabulary.",
        "A router weighs the rows, and the weighted sum is added to the hidden state.",
        "Reading a row costs bandwidth; multiplying two matrices costs arithmetic.",
        "What is read seldom may live on the disk, and what is read often in memory.",
    ]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|eos|>", "<|pad|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eos|>", pad_token="<|pad|>")
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    tokenizer.save_pretrained(folder)
    return TinyTokenizer(tokenizer, folder)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]
