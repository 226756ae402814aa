"""LongBench v2 over files of the published layout."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tenfold.inference.evals import evaluate_model
from tenfold.inference.evals.long_context.longbench_v2 import fill
from tenfold.inference.evals.long_context.options import LongContextOptions

TEMPLATE = "Text: $DOC$\nQ: $Q$\nA $C_A$\nB $C_B$\nC $C_C$\nD $C_D$\nGo."


def question(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "_id": f"q{number}",
        "domain": "made up",
        "sub_domain": "test",
        "difficulty": "easy" if number % 2 else "hard",
        "length": ("short", "medium", "long")[number % 3],
        "question": f" Which number is it, {number}? ",
        **{f"choice_{letter}": f" {letter.lower()}{number} " for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": f" A text about number {number}. " * 3,
    }
    return row | changes


@pytest.fixture
def write_v2(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], *, lines: bool = False, template: str | None = TEMPLATE) -> Path:
        folder = tmp_path / "v2"
        (folder / "prompts").mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
        (folder / "data.json").write_text(text, encoding="utf-8")
        if template is not None:
            (folder / "prompts" / "0shot.txt").write_text(template, encoding="utf-8")
        return folder

    return write


def run(lm: Any, folder: Path | None, **options: Any) -> dict[str, Any]:
    found = evaluate_model(
        lm,
        tasks=["longbench_v2"],
        data_dir=folder,
        bootstrap_iters=0,
        long_context=LongContextOptions(**options),
    )
    assert found is not None
    return found


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_accuracy_by_difficulty_and_length(
    write_v2: Callable[..., Path], letter_tokenizer: Any, kit: SimpleNamespace, lines: bool
) -> None:
    # question 0 is answered wrongly, question 3 without a letter
    answers = {"q0": "The correct answer is (B)", "q3": "I do not know"}
    lm = kit.lm(letter_tokenizer, lambda doc: answers.get(doc["_id"], f"The correct answer is **{doc['answer']}**"))
    found = run(lm, write_v2([question(number) for number in range(6)], lines=lines))
    told = found["tenfold"]["long_context"]["longbench_v2"]
    assert (told["overall"], told["answered"]) == (66.7, 83.3)
    assert (told["easy"], told["hard"]) == (66.7, 66.7)
    assert (told["short"], told["medium"], told["long"]) == (0.0, 100.0, 100.0)
    assert told["overall_with_guesses"] == round(100 * 4.25 / 6, 1)
    assert lm.seen[0].args[1] == {"until": [], "max_gen_toks": 128, "do_sample": False}
    assert lm.seen[1].args[0] == (
        "Text: A text about number 1.  A text about number 1.  A text about number 1.\n"
        "Q: Which number is it, 1?\nA a1\nB b1\nC c1\nD d1\nGo."
    )


def test_long_prompts_lose_their_middle_as_one_piece(
    write_v2: Callable[..., Path], letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    row = question(1, context="".join(chr(ord("a") + n % 26) for n in range(900)))
    lm = kit.lm(letter_tokenizer, kit.right, max_length=429)
    found = run(lm, write_v2([row]))
    whole = fill(TEMPLATE, row)
    # 301 tokens: 150 from the start, BOS among them, and 151 from the end
    assert lm.seen[0].args[0] == whole[:149] + whole[-151:]
    assert found["tenfold"]["long_context"]["longbench_v2"]["num_cut"] == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([question(0), [1]], r"1 malformed questions in .*data.json: number 2: a JSON list, not an object"),
        ([question(0, answer="E")], r"number 1: field 'answer' is 'E', not one of A, B, C, D"),
        ([question(0, choice_B=None)], r"number 1: field 'choice_B' is missing"),
        ([question(0, difficulty="odd")], r"field 'difficulty' is 'odd', not one of easy, hard"),
        ([], "holds no questions"),
    ],
)
def test_malformed_questions_are_named(
    write_v2: Callable[..., Path], letter_tokenizer: Any, kit: SimpleNamespace, rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(kit.lm(letter_tokenizer, kit.right), write_v2(rows))


def test_malformed_questions_can_be_left_out(
    write_v2: Callable[..., Path], letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_v2([question(0), question(1, answer=None)])
    told = run(kit.lm(letter_tokenizer, kit.right), folder, skip_malformed=True)["tenfold"]["long_context"]
    assert (told["longbench_v2"]["num_malformed"], told["longbench_v2"]["num_documents"]) == (1, 1)


def test_missing_files_and_bad_templates_are_named(
    write_v2: Callable[..., Path], letter_tokenizer: Any, kit: SimpleNamespace, tmp_path: Path
) -> None:
    lm = kit.lm(letter_tokenizer, kit.right)
    with pytest.raises(ValueError, match=r"longbench_v2 needs its data: .* with --data-dir"):
        run(lm, None)
    with pytest.raises(FileNotFoundError, match=r"no data.json in .*"):
        run(lm, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no prompts/0shot.txt in .*v2"):
        run(lm, write_v2([question(0)], template=None))
    with pytest.raises(ValueError, match=r"0shot.txt lacks \$C_D\$"):
        run(lm, write_v2([question(0)], template=TEMPLATE.replace("$C_D$", "")))
    folder = write_v2([question(0)])
    (folder / "data.json").write_text("[{]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data.json is neither a JSON list nor JSON lines"):
        run(lm, folder)
    with pytest.raises(ValueError, match=r"longbench_v2: the template alone has \d+ tokens"):
        run(kit.lm(letter_tokenizer, kit.right, max_length=150), write_v2([question(0)]))
