import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tenfold.inference.evals.task_selection as selection
from tenfold.inference.evals import select_tasks, shipped_task_names

# rows in the columns of the published data sets, made up here
ARC_ROWS = [
    {
        "id": f"Q{number}",
        "question": f"What is {number} plus one?",
        "choices": {"text": [f"{number + 1}", f"{number + 2}", f"{number + 3}"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    for number in range(4)
]
PIQA_ROWS = [
    {"goal": f"open box {number}", "sol1": "lift the lid", "sol2": "eat the lid", "label": number % 2}
    for number in range(4)
]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def local(tmp_path: Path) -> Path:
    write_rows(tmp_path / "arc_easy" / "test.jsonl", ARC_ROWS)
    write_rows(tmp_path / "piqa" / "validation.jsonl", PIQA_ROWS)
    return tmp_path


def test_stock_tasks_keep_their_prompts_on_local_data(local: Path) -> None:
    with select_tasks(["arc_easy", "piqa"], data_dirs=[local]) as found:
        arc, piqa = found.tasks["arc_easy"], found.tasks["piqa"]
        assert [task.task_name for task in found.objects] == ["arc_easy", "piqa"]
        assert [doc["id"] for doc in arc.eval_docs] == ["Q0", "Q1", "Q2", "Q3"]
        # what arc_easy.yaml and piqa.yaml of lm-eval say, not the defaults of a bare configuration
        assert arc.doc_to_text(ARC_ROWS[2]) == "Question: What is 2 plus one?\nAnswer:"
        assert arc.doc_to_choice(ARC_ROWS[2]) == ["3", "4", "5"]
        assert arc.doc_to_target(ARC_ROWS[2]) == 0
        assert piqa.doc_to_text(PIQA_ROWS[3]) == "Question: open box 3\nAnswer:"
        assert piqa.doc_to_choice(PIQA_ROWS[3]) == ["lift the lid", "eat the lid"]
        assert piqa.doc_to_target(PIQA_ROWS[3]) == 1
        assert set(arc.aggregation()) == set(piqa.aggregation()) == {"acc", "acc_norm"}
        assert arc.config.output_type == "multiple_choice"
        assert arc.config.metadata["version"] == 1.0


def test_stock_functions_are_inherited(tmp_path: Path) -> None:
    """hellaswag cleans its rows in Python, which lies beside its YAML."""
    row = {
        "ind": 1,
        "activity_label": "Baking",
        "ctx_a": "A man bakes.",
        "ctx_b": "he",
        "ctx": "A man bakes. he",
        "endings": ["eats [title] it.", "b", "c", "d"],
        "label": "0",
        "split": "val",
        "split_type": "indomain",
        "source_id": "x",
    }
    write_rows(tmp_path / "hellaswag" / "validation.jsonl", [row])
    with select_tasks(["hellaswag"], data_dirs=[tmp_path]) as found:
        (doc,) = found.tasks["hellaswag"].eval_docs
        assert doc["query"].startswith("Baking: A man bakes.")
        assert found.tasks["hellaswag"].doc_to_target(doc) == 0
        assert "[title]" not in doc["choices"][0]


def test_tag_stands_for_its_tasks(local: Path) -> None:
    write_rows(local / "arc_challenge" / "test.jsonl", ARC_ROWS[:2])
    with select_tasks(["ai2_arc"], data_dirs=[local]) as found:
        assert sorted(found.tasks) == ["arc_challenge", "arc_easy"]
        assert len(found.tasks["arc_challenge"].eval_docs) == 2


def test_group_reaches_its_members(tmp_path: Path) -> None:
    row = {"question": "q", "subject": "s", "choices": ["a", "b", "c", "d"], "answer": 1}
    with pytest.raises(ValueError, match=r"no data for task 'mmlu_\w+'"):
        select_tasks(["mmlu_stem"], data_dirs=[tmp_path]).__enter__()
    for leaf in selection._leaves(["mmlu_stem"], selection._make_manager([], stock=True)):
        write_rows(tmp_path / leaf / "test.jsonl", [row])
        write_rows(tmp_path / leaf / "dev.jsonl", [row])
    with select_tasks(["mmlu_stem"], data_dirs=[tmp_path]) as found:
        assert [group.name for group in found.objects] == ["mmlu_stem"]
        assert len(found.tasks) > 10
        assert all(name in found.local_data for name in found.tasks)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet", "shards"])
def test_formats(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    if form == "jsonl":
        write_rows(folder / "validation.jsonl", PIQA_ROWS)
    elif form == "json":
        (folder / "validation.json").write_text(json.dumps(PIQA_ROWS))
    elif form == "csv":
        with (folder / "validation.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, PIQA_ROWS[0])
            writer.writeheader()
            writer.writerows(PIQA_ROWS)
    else:
        import pandas

        shards = [PIQA_ROWS] if form == "parquet" else [PIQA_ROWS[:1], PIQA_ROWS[1:]]
        for number, rows in enumerate(shards):
            name = "validation" if form == "parquet" else f"validation-{number:05}-of-{len(shards):05}"
            pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    with select_tasks(["piqa"], data_dirs=[tmp_path]) as found:
        docs = found.tasks["piqa"].eval_docs
        assert [dict(doc) for doc in docs] == PIQA_ROWS


def test_a_file_rewritten_in_place_is_read_anew(local: Path) -> None:
    for goal in ("first", "second"):
        write_rows(local / "piqa" / "validation.jsonl", [PIQA_ROWS[0] | {"goal": goal}])
        with select_tasks(["piqa"], data_dirs=[local]) as found:
            docs = found.tasks["piqa"].eval_docs
            assert docs[0]["goal"] == goal
            (converted,) = (Path(file["filename"]) for file in docs.cache_files)
            assert converted.exists()
        # and nothing is left in the user's cache
        assert not converted.exists()


def test_examples_come_from_their_split(local: Path) -> None:
    with pytest.raises(ValueError, match=r"puts 2 examples into the prompt and takes them from split 'train'"):
        select_tasks(["arc_easy"], data_dirs=[local], num_fewshot=2).__enter__()
    write_rows(local / "arc_easy" / "train.jsonl", [row | {"question": "shown"} for row in ARC_ROWS])
    with select_tasks(["arc_easy"], data_dirs=[local], num_fewshot=2) as found:
        assert {doc["question"] for doc in found.tasks["arc_easy"].fewshot_docs()} == {"shown"}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("arc_eazy", "arc_easy"), ("hellaswg", "hellaswag"), ("wikipedia_title_close", "wikipedia_title")],
)
def test_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown task '{name}'; nearest names: .*{nearest}"):
        select_tasks([name]).__enter__()


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'no_such_thing_\*'"):
        select_tasks(["no_such_thing_*"]).__enter__()


def test_no_task_at_all() -> None:
    with pytest.raises(ValueError, match="no task is asked for"):
        select_tasks([]).__enter__()


def test_task_without_local_data(local: Path) -> None:
    with pytest.raises(ValueError, match=r"no data for task 'winogrande' in .*: expected winogrande/validation\.jsonl"):
        select_tasks(["piqa", "winogrande"], data_dirs=[local]).__enter__()


def test_split_that_is_scored_is_missing(local: Path) -> None:
    (local / "arc_easy" / "test.jsonl").rename(local / "arc_easy" / "validation.jsonl")
    with pytest.raises(ValueError, match=r"no 'test' split.* found validation"):
        select_tasks(["arc_easy"], data_dirs=[local]).__enter__()


def test_mixed_formats(local: Path) -> None:
    (local / "piqa" / "train.csv").write_text("goal\nx\n")
    with pytest.raises(ValueError, match=r"mixes file formats \(csv, json\)"):
        select_tasks(["piqa"], data_dirs=[local]).__enter__()


@pytest.mark.parametrize("content", ['{"goal": "x"}\n', "\x00not json\n"], ids=["columns", "broken"])
def test_data_that_does_not_fit(local: Path, content: str) -> None:
    (local / "piqa" / "validation.jsonl").write_text(content)
    with pytest.raises(ValueError, match="the local data of task 'piqa' does not fit it"):
        select_tasks(["piqa"], data_dirs=[local]).__enter__()


def test_data_set_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"data of task 'openbookqa' cannot be loaded .* --data-dir"):
        select_tasks(["openbookqa"]).__enter__()


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data folder"):
        select_tasks(["piqa"], data_dirs=[tmp_path / "none"]).__enter__()
    with pytest.raises(FileNotFoundError, match="task folder"):
        select_tasks(["piqa"], include_paths=[tmp_path / "none"]).__enter__()


def test_shipped_tasks_leave_the_stock_index_alone(wikipedia_data: Path, monkeypatch: Any) -> None:
    def refuse() -> None:
        raise AssertionError("the stock index was built")

    monkeypatch.setattr(selection, "_stock_index", refuse)
    with select_tasks(shipped_task_names(), data_dirs=[wikipedia_data]) as found:
        assert sorted(found.tasks) == ["wikipedia_bits_per_byte", "wikipedia_title_cloze", "wikipedia_yes_no"]
    with select_tasks(["tenfold_wikipedia"], shipped_data_dir=wikipedia_data) as found:
        assert sorted(found.tasks) == ["wikipedia_bits_per_byte", "wikipedia_title_cloze", "wikipedia_yes_no"]
    with pytest.raises(AssertionError, match="index was built"):
        select_tasks(["piqa"]).__enter__()


def test_shipped_task_without_data() -> None:
    with pytest.raises(ValueError, match="needs its data"):
        select_tasks(["wikipedia_title_cloze"]).__enter__()


def test_own_task_folder(local: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "twins.yaml").write_text(
        "task: box_twins\ninclude: piqa_base.yaml\ndataset_kwargs: {data_files: {validation: "
        f"{local / 'piqa' / 'validation.jsonl'}}}}}\n"
    )
    (folder / "piqa_base.yaml").write_text(
        "dataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{goal}}"\ndoc_to_choice: "{{[sol1, sol2]}}"\ndoc_to_target: label\n'
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    # its own data stays its own, and stock tasks beside it take theirs from the data folder
    with select_tasks(["box_twins", "piqa"], data_dirs=[local], include_paths=[folder]) as found:
        assert found.tasks["box_twins"].doc_to_text(PIQA_ROWS[1]) == "open box 1"
        assert list(found.local_data) == ["piqa"]
