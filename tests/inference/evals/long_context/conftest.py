"""Scripted models of lm-eval, made-up articles, and LongBench files of the published layout with made-up content."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM

NOUNS = ("river", "stone", "market", "bridge", "engine", "garden", "winter")
NOUNS += ("letter", "copper", "island", "signal", "harbour", "forest", "museum")


class ScriptedLM(LM):
    """Answers from the document at hand, and keeps the requests."""

    def __init__(self, tokenizer: Any, answer: Callable[[dict[str, Any]], str], *, max_length: int = 512) -> None:
        super().__init__()
        self.tokenizer, self.max_length, self._answer = tokenizer, max_length, answer
        self._device = torch.device("cpu")
        self.seen: list[Any] = []

    @property
    def tokenizer_name(self) -> str:
        return "scripted"

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        self.seen += requests
        return [self._answer(request.doc) for request in requests]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError("these tasks generate")

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise AssertionError("these tasks generate")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}</{turn['role']}>" for turn in chat_history) + "<assistant>"


def right(doc: dict[str, Any]) -> str:
    """The answer of one who knows."""
    if "answer" in doc:
        return f"The correct answer is ({doc['answer']})" if "choice_A" in doc else doc["answer"]
    return " ".join(doc["answers"])


@pytest.fixture(scope="session")
def letter_tokenizer() -> Any:
    """One token per character, so that lengths can be counted by eye; with BOS, which it adds, and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, **{letter: number for number, letter in enumerate(alphabet, 2)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def articles() -> list[dict[str, str]]:
    """Eighty made-up articles of several sentences, each with its own names and years."""
    rows = []
    for number in range(80):
        name = f"{NOUNS[number % 14].title()}{NOUNS[(number * 3 + 1) % 14]}{number}"
        words = [NOUNS[(number * 5 + step * 3 + step // 14) % 14] for step in range(24)]
        rows.append(
            {
                "title": name,
                "text": f"{name} is a small town of {number + 200} houses known for its {' '.join(words[:8])}. "
                f"The {number + 7} masons built a {' '.join(words[8:14])} in {1500 + number} beside the old road. "
                f"Many who come by see the {' '.join(words[14:20])} of number {number + 100} first.",
            }
        )
    return rows


def longbench_row(name: str, number: int = 0, *, words: int = 40, **changes: Any) -> dict[str, Any]:
    """A row of the published schema for a set."""
    answers = {
        "passage_retrieval_en": ["Paragraph 3"],
        "passage_retrieval_zh": ["\u6bb5\u843d3"],
        "passage_count": ["12"],
        "trec": ["City"],
        "lsht": ["\u519c\u4e1a"],
    }.get(name, [f"the {NOUNS[number % 14]} of {NOUNS[(number + 3) % 14]}"])
    classes = {"trec": ["City", "Food", "Food colour"], "lsht": ["\u519c\u4e1a", "\u4f53\u80b2"]}.get(name)
    row = {
        "input": f"Where is number {number}?",
        "context": " ".join(NOUNS[(number + step) % 14] for step in range(words)),
        "answers": answers,
        "length": words,
        "dataset": name,
        "language": "en",
        "all_classes": classes,
        "_id": f"{name}-{number}",
    }
    return row | changes


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """What test files share without a package to import it from."""
    return SimpleNamespace(lm=ScriptedLM, right=right, row=longbench_row)


@pytest.fixture
def write_longbench(tmp_path: Path) -> Callable[..., Path]:
    """Writes files of the published layout: rows by file name, and templates of our own."""
    from tenfold.inference.evals.long_context.longbench_sets import SETS

    def write(
        rows: dict[str, list[Any]], *, zipped: bool = False, config: bool = True, max_new_tokens: int = 16
    ) -> Path:
        folder = tmp_path / "longbench"
        folder.mkdir(exist_ok=True)
        texts = {
            f"data/{name}.jsonl": "".join(
                (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in found
            )
            for name, found in rows.items()
        }
        if zipped:
            with zipfile.ZipFile(folder / "data.zip", "w") as archive:
                for name, text in texts.items():
                    archive.writestr(name, text)
        else:
            (folder / "data").mkdir(exist_ok=True)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
        if config:
            (folder / "config").mkdir(exist_ok=True)
            prompts = {name: f"[{name}] {{context}} | {{input}} =>" for name in SETS}
            (folder / "config" / "dataset2prompt.json").write_text(json.dumps(prompts), encoding="utf-8")
            lengths = dict.fromkeys(SETS, max_new_tokens)
            (folder / "config" / "dataset2maxlen.json").write_text(json.dumps(lengths), encoding="utf-8")
        return folder

    return write
