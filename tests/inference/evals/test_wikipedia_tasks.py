import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tenfold.inference import build_wikipedia_tasks
from tenfold.inference.evals.wikipedia_tasks import BLANK, mask_title


def read(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task / "test.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("title", "text", "masked"),
    [
        ("Ada Lovelace", "Ada Lovelace wrote. Lovelace's notes, by ADA.", "____ wrote. ____ notes, by ____."),
        ("Mercury (planet)", "Mercury is a planet.", "____ is a planet."),
        ("War and Peace", "War and Peace is about war; peace and rest.", "____ is about ____; ____ and rest."),
        ("Go", "Go is a game. Gold goes on.", "____ is a game. Gold ____ on."),
        ("C++", "C++ is a language, not C.", "____ is a language, not C."),
        ("Zürich", "Zürich, Zürichs See", "____ See"),
        ("2008 Summer Games", "The 2008 Summer-Games began in 2008.", "The ____ began in ____."),
    ],
)
def test_titles_are_blanked_out(title: str, text: str, masked: str) -> None:
    assert mask_title(text, title) == masked


def test_only_the_documents_matter(documents: list[dict[str, str]], tmp_path: Path) -> None:
    shuffled = [dict(document) for document in documents]
    random.Random(0).shuffle(shuffled)
    digest = build_wikipedia_tasks(documents, tmp_path / "a")
    assert build_wikipedia_tasks(iter(shuffled + shuffled[:3]), tmp_path / "b") == digest
    for task in ("wikipedia_bits_per_byte", "wikipedia_title_cloze", "wikipedia_yes_no"):
        assert read(tmp_path / "a", task) == read(tmp_path / "b", task)
    assert build_wikipedia_tasks(documents, tmp_path / "c", seed=1) != digest
    assert build_wikipedia_tasks(documents[:-1], tmp_path / "d") != digest


def test_texts_are_whole(documents: list[dict[str, str]], tmp_path: Path) -> None:
    build_wikipedia_tasks(documents, tmp_path, max_characters=100)
    rows = {(row["title"], row["text"]) for row in read(tmp_path, "wikipedia_bits_per_byte")}
    assert rows == {(document["title"], document["text"]) for document in documents}
    assert max(len(text) for _, text in rows) > 1000


def test_questions_can_be_answered_and_give_nothing_away(documents: list[dict[str, str]], tmp_path: Path) -> None:
    build_wikipedia_tasks(documents, tmp_path, max_characters=150)
    rows = read(tmp_path, "wikipedia_title_cloze")
    titles = {document["title"] for document in documents}
    # one question for all documents of one name
    assert len(rows) == len({title.removesuffix(" (place)") for title in titles})
    for row in rows:
        assert len(row["extract"]) <= 150
        assert BLANK in row["extract"]
        assert row["choices"][row["answer"]] == row["title"]
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) <= titles
        for choice in row["choices"]:
            assert re.sub(r" \(.*", "", choice).lower() not in row["extract"].lower()
        for word in re.findall(r"\w{3,}", re.sub(r" \(.*", "", row["title"])):
            assert not re.search(rf"\b{word}\b", row["extract"], re.IGNORECASE)


def test_positions_are_balanced_in_every_prefix(documents: list[dict[str, str]], tmp_path: Path) -> None:
    build_wikipedia_tasks(documents, tmp_path)
    answers = [row["answer"] for row in read(tmp_path, "wikipedia_title_cloze")]
    for start in range(0, len(answers) - 3, 4):
        assert Counter(answers[start : start + 4]) == Counter(range(4))
    # a fixed cycle would let the position be guessed
    assert len({tuple(answers[start : start + 4]) for start in range(0, len(answers) - 3, 4)}) > 1


def test_five_of_eight_answers_are_yes_and_the_titles_fit_them(documents: list[dict[str, str]], tmp_path: Path) -> None:
    build_wikipedia_tasks(documents, tmp_path)
    rows, cloze = read(tmp_path, "wikipedia_yes_no"), read(tmp_path, "wikipedia_title_cloze")
    assert len(rows) == len(cloze) > 16
    for row, other in zip(rows, cloze, strict=True):
        assert row["extract"] == other["extract"]
        assert row["title"] in other["choices"]
        assert row["answer"] == int(row["title"] == other["title"])
    answers = [row["answer"] for row in rows]
    blocks = [tuple(answers[start : start + 8]) for start in range(0, len(answers) - 7, 8)]
    assert {sum(block) for block in blocks} == {5}
    assert len(set(blocks)) > 1


def test_wrong_titles_look_like_the_right_one(tmp_path: Path) -> None:
    body = " is a thing that many people have seen, described and drawn in several old books."
    names = [f"{chr(65 + i)}bc" for i in range(26)] + [
        f"The Long History of the {chr(65 + i)}bcd Empire" for i in range(26)
    ]
    build_wikipedia_tasks([{"title": name, "text": name + body} for name in names], tmp_path)
    for row in read(tmp_path, "wikipedia_title_cloze"):
        assert len({len(choice.split()) for choice in row["choices"]}) == 1


def test_a_smaller_set_is_the_start_of_a_larger_one(documents: list[dict[str, str]], tmp_path: Path) -> None:
    build_wikipedia_tasks(documents, tmp_path / "all")
    build_wikipedia_tasks(documents, tmp_path / "few", num_cloze=6)
    assert read(tmp_path / "few", "wikipedia_title_cloze") == read(tmp_path / "all", "wikipedia_title_cloze")[:6]


def test_refuses_what_gives_no_questions(documents: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 documents give 3 cloze questions"):
        build_wikipedia_tasks(documents[:3], tmp_path)
    untitled = [{"title": f"Name{i}", "text": "Words that never say what they are about. " * 3} for i in range(9)]
    with pytest.raises(ValueError, match="9 documents give 0 cloze questions"):
        build_wikipedia_tasks(untitled, tmp_path)
    with pytest.raises(ValueError, match="num_cloze is 99"):
        build_wikipedia_tasks(documents, tmp_path, num_cloze=99)
    with pytest.raises(ValueError, match="document 1 has no title or no text"):
        build_wikipedia_tasks([documents[0], {"title": "x", "text": " "}], tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        build_wikipedia_tasks(documents, tmp_path, max_characters=0)
    assert not any(tmp_path.iterdir())
