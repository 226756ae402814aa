"""LongBench v2 as a task: four-choice questions, answered in words from which the letter is read.

Protocol (THUDM/LongBench, `pred.py` and `result.py`; Bai et al. 2025, arXiv 2412.15204): fill the template, cut the
middle of the prompt by tokens, chat template, up to 128 new tokens, `extract_choice`; no letter is wrong. deviation:
greedy decoding where the official code samples at temperature 0.1, so that a run can be repeated; the variant with
chain of thought, which asks twice, is not there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import metrics
from .longbench_files import Malformed, SetRows
from .prompts import FittedPrompt, PromptFitter

if TYPE_CHECKING:
    from .task import LongContextTask

MAX_NEW_TOKENS = 128
# the official length for models with a window of 128k; shorter windows keep all that fits
PROMPT_TOKENS = 120_000
DATA_FILE, TEMPLATE_FILE = "data.json", "prompts/0shot.txt"
DIFFICULTIES, LENGTHS = ("easy", "hard"), ("short", "medium", "long")
_TEXT_FIELDS = ("question", "choice_A", "choice_B", "choice_C", "choice_D", "context")
_PLACES = {
    "$DOC$": "context",
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}


def read_v2(folder: Path, *, skip_malformed: bool = False) -> SetRows:
    """Read `data.json`, a JSON list of questions, or the same as JSON lines.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is not JSON, questions are malformed, or there are none.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {DATA_FILE} in {folder}: get LongBench v2's and name its folder with --data-dir")
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            entries = list(enumerate(json.loads(text), 1))
        else:
            entries = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is neither a JSON list nor JSON lines: {error}") from error
    rows, malformed = [], []
    for number, entry in entries:
        if reason := _wrong_with(entry):
            malformed.append(Malformed(str(path), number, reason))
            continue
        names = (*_TEXT_FIELDS, "answer", "difficulty", "length")
        rows.append(
            {"_id": str(entry.get("_id", number)), "domain": str(entry.get("domain", ""))}
            | {n: entry[n] for n in names}
        )
    if malformed and not skip_malformed:
        raise ValueError(
            f"{len(malformed)} malformed questions in {path}: "
            f"{'; '.join(f'number {item.line}: {item.reason}' for item in malformed[:3])}; "
            "mend the file, or leave them out with --skip-malformed"
        )
    if not rows:
        raise ValueError(f"{path} holds no questions")
    return SetRows(rows=rows, path=path, malformed=malformed)


def read_v2_template(folder: Path) -> str:
    """The official template, which lies beside the data or a level above it.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It lacks a place.
    """
    found = next((path for base in (folder, folder.parent) if (path := base / TEMPLATE_FILE).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"no {TEMPLATE_FILE} in {folder}: copy the folder prompts of the official LongBench repository there"
        )
    template = found.read_text(encoding="utf-8")
    if missing := [place for place in _PLACES if place not in template]:
        raise ValueError(f"{found} lacks {', '.join(missing)}")
    return template


def longbench_v2_task(source: SetRows, template: str, *, name: str, fitter: PromptFitter) -> "LongContextTask":
    """The questions as a task; `score` is the accuracy, `answered` the share with a letter."""
    from .task import LongContextTask

    empty = fill(template, dict.fromkeys(_TEXT_FIELDS, ""))
    v2_fitter = PromptFitter(
        fitter.tokenizer,
        window=fitter.window,
        prompt_tokens=min(PROMPT_TOKENS, fitter.window - MAX_NEW_TOKENS)
        if fitter.window > MAX_NEW_TOKENS + 2
        else None,
        wrap=fitter.wrap,
    )
    v2_fitter.check_template(v2_fitter.wrapped(empty), max_new_tokens=MAX_NEW_TOKENS, name=name)

    def prompt_of(doc: Mapping[str, Any]) -> FittedPrompt:
        return v2_fitter.fit(fill(template, doc), max_new_tokens=MAX_NEW_TOKENS, join=True)

    def score_of(doc: Mapping[str, Any], answer: str) -> dict[str, float]:
        choice = metrics.extract_choice(answer.strip())
        return {"score": float(choice == doc["answer"]), "answered": float(choice is not None)}

    return LongContextTask(
        name=name,
        rows=source.rows,
        prompt_of=prompt_of,
        answers_of=lambda doc: [doc["answer"]],
        score_of=score_of,
        metrics=["score", "answered"],
        max_new_tokens=MAX_NEW_TOKENS,
        metadata={
            "version": 1.0,
            "suite": "longbench_v2",
            "set": "longbench_v2",
            "malformed": [str(line) for line in source.malformed],
        },
        path=source.path,
    )


def fill(template: str, row: Mapping[str, Any]) -> str:
    """The template with a question's texts, each stripped, one after the other as the official code does."""
    for place, name in _PLACES.items():
        template = template.replace(place, row[name].strip())
    return template


def _wrong_with(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"a JSON {type(entry).__name__}, not an object"
    for name in _TEXT_FIELDS:
        if not isinstance(entry.get(name), str):
            return f"field {name!r} is {'missing' if entry.get(name) is None else 'not a string'}"
    for name, known in (("answer", tuple("ABCD")), ("difficulty", DIFFICULTIES), ("length", LENGTHS)):
        if entry.get(name) not in known:
            return f"field {name!r} is {entry.get(name)!r}, not one of {', '.join(known)}"
    return None
