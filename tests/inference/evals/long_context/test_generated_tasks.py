"""Needle, RULER's families and longbench-local: what is in the prompts, found again by brute force."""

import collections
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tenfold.inference.evals import evaluate_model
from tenfold.inference.evals.long_context import plan_long_context
from tenfold.inference.evals.long_context.code_lines import CodeLines, standard_library
from tenfold.inference.evals.long_context.haystack import word_pool
from tenfold.inference.evals.long_context.local_sets import WikipediaRows
from tenfold.inference.evals.long_context.needle import insert_at_depth, needle_task
from tenfold.inference.evals.long_context.options import LongContextOptions
from tenfold.inference.evals.long_context.prompts import PromptFitter
from tenfold.inference.evals.long_context.ruler import family_names, ruler_task
from tenfold.inference.evals.long_context.ruler_needles import NEEDLE_FAMILIES

LENGTHS = (1500, 3000)


@pytest.fixture(scope="module")
def fitter(tiny_tokenizer: Any) -> PromptFitter:
    return PromptFitter(tiny_tokenizer.tokenizer, window=8192)


@pytest.fixture(scope="module")
def options(articles: list[dict[str, str]]) -> LongContextOptions:
    return LongContextOptions(lengths=LENGTHS, num_samples=2, documents=articles)


def prompts_of(task: Any) -> list[tuple[dict[str, Any], str]]:
    return [(doc, task.fewshot_context(doc)) for doc in task.eval_docs]


def read_needles(doc: dict[str, Any]) -> set[str]:
    """Every value that the text gives for a key of the question."""
    question = doc["prompt"].rpartition("Question:")[2]
    found = re.findall(r"The secret \w+ of (\S+) is (\S+)\.", doc["prompt"])
    return {value for key, value in found if key in re.split(r"[\s,?]+", question)}


def read_variables(doc: dict[str, Any]) -> set[str]:
    """Every variable with the value asked for, the last text's assignments carried out one by one."""
    text = doc["prompt"].rpartition("Follow the assignments")[2]
    values: dict[str, str] = {}
    for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
        values[name] = values.get(source, source)
    wanted = re.search(r"hold the value (\d+)", text)
    assert wanted
    return {name for name, value in values.items() if value == wanted.group(1)}


def read_common(doc: dict[str, Any]) -> set[str]:
    text = doc["prompt"].rpartition("The numbered list below")[2].partition("Question:")[0]
    counts = collections.Counter(re.findall(r"\d+\. (\S+)", text))
    ranked = counts.most_common()
    assert ranked[9][1] > ranked[10][1]
    return {word for word, _ in ranked[:10]}


def read_frequent(doc: dict[str, Any]) -> set[str]:
    text = doc["prompt"].partition("\n\n")[2].partition("\n\n")[0]
    counts = collections.Counter(word for word in text.split() if word != "...")
    ranked = counts.most_common()
    assert ranked[2][1] > ranked[3][1]
    return {word for word, _ in ranked[:3]}


READERS = {
    **dict.fromkeys(NEEDLE_FAMILIES, read_needles),
    "vt": read_variables,
    "cwe": read_common,
    "fwe": read_frequent,
}


@pytest.mark.parametrize("name", READERS)
def test_a_brute_force_reader_finds_the_answers(name: str, fitter: PromptFitter, options: LongContextOptions) -> None:
    task = ruler_task(f"ruler_local_{name}", name, fitter, options)
    rows = prompts_of(task)
    assert [doc["length"] for doc, _ in rows] == [1500, 1500, 3000, 3000]
    for doc, prompt in rows:
        assert READERS[name](doc) == set(doc["answers"])
        assert len(doc["answers"]) == len(set(doc["answers"]))
        assert prompt == doc["prompt"] + doc["prefix"]
        # nothing of the answer is given away by the start of it
        assert not any(answer in doc["prefix"] for answer in doc["answers"])
        assert task.process_results(doc, [" ".join(doc["answers"])])["score"] == 1.0
        assert task.process_results(doc, [""])["score"] == 0.0
    num_answers = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}.get(name, 1)
    assert all(len(doc["answers"]) == num_answers for doc, _ in rows)
    half = [" ".join(doc["answers"][: num_answers // 2]) for doc, _ in rows]
    if num_answers > 1:
        expected = (num_answers // 2) / num_answers
        assert [task.process_results(doc, [text])["score"] for (doc, _), text in zip(rows, half, strict=True)] == (
            pytest.approx([expected] * 4)
        )


def test_every_family_has_a_reader() -> None:
    assert set(READERS) == set(family_names())


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_prompts_fill_their_length_and_never_pass_it(
    name: str, fitter: PromptFitter, options: LongContextOptions
) -> None:
    task = ruler_task(f"ruler_local_{name}", name, fitter, options)
    new_tokens = task.config.generation_kwargs["max_gen_toks"]
    for doc, prompt in prompts_of(task):
        total = len(fitter.tokenizer(prompt)["input_ids"]) + new_tokens
        # one more piece would not have fitted; the largest piece is a common word thirty times over
        assert doc["length"] - 350 < total <= doc["length"]


def test_answer_lengths_are_rulers(fitter: PromptFitter, options: LongContextOptions) -> None:
    found = {name: ruler_task(name, name, fitter, options).config.generation_kwargs for name in ("vt", "cwe", "fwe")}
    assert {name: settings["max_gen_toks"] for name, settings in found.items()} == {"vt": 30, "cwe": 120, "fwe": 50}
    needles = ruler_task("n", "niah_single_1", fitter, options)
    assert needles.config.generation_kwargs["max_gen_toks"] == 128


def test_samples_depend_on_seed_and_set_of_documents_only(
    fitter: PromptFitter, options: LongContextOptions, articles: list[dict[str, str]]
) -> None:
    from dataclasses import replace

    def made(options: LongContextOptions) -> list[str]:
        tasks = [ruler_task("r", name, fitter, options) for name in ("niah_multikey_1", "fwe")]
        return [prompt for task in [*tasks, needle_task(fitter, options)] for _, prompt in prompts_of(task)]

    options = replace(options, lengths=(1500,), depths=(50.0,))
    assert made(options) == made(replace(options, documents=articles[::-1]))
    assert not set(made(options)) & set(made(replace(options, seed=1)))


def test_words_come_from_the_documents_where_they_have_enough(articles: list[dict[str, str]]) -> None:
    words, origin = word_pool(articles)
    assert origin == "syllables"
    assert len(set(words)) == len(words) >= 4000
    letters = "abcdefghijklmnopqrstuvwxyz"
    many = [f"{a}{b}{c}{a}" for a in letters for b in letters for c in "aeiou"][:700]
    words, origin = word_pool([{"text": " ".join(many)}, {"text": " ".join(many)}])
    assert origin == "documents"
    assert set(words) < set(many)


def test_the_needle_lies_at_its_depth_after_a_full_stop(fitter: PromptFitter, options: LongContextOptions) -> None:
    task = needle_task(fitter, options)
    tokenizer = fitter.tokenizer
    rows = prompts_of(task)
    assert len(rows) == 2 * 11 * 2
    for doc, prompt in rows:
        total = len(tokenizer(prompt)["input_ids"]) + task.config.generation_kwargs["max_gen_toks"]
        assert doc["length"] - 4 <= total <= doc["length"]
        before, after = doc["context"].split(doc["needle"])
        assert doc["context"].count(doc["answer"]) == 1
        # at the very end it may follow a cut sentence, as in the original
        assert before == "" or before.endswith(". ") or doc["depth"] == 100
        num_before, num_after = (len(tokenizer(part)["input_ids"]) for part in (before, after))
        depth = 100 * num_before / (num_before + num_after)
        if doc["depth"] in (0.0, 100.0):
            assert depth == pytest.approx(doc["depth"], abs=0.1)
        else:
            # moved back to the end of a sentence: at most one sentence
            assert doc["depth"] - 100 * 120 / doc["length"] < depth <= doc["depth"] + 0.5
        assert task.process_results(doc, [f" It is {doc['answer']}."])["score"] == 1.0
        assert task.process_results(doc, [doc["needle"]])["rouge_1_recall"] == pytest.approx(1.0)


def test_a_needle_goes_in_by_tokens(letter_tokenizer: Any) -> None:
    fitter = PromptFitter(letter_tokenizer, window=512)
    ids = letter_tokenizer("One two. Three four. Five six.", add_special_tokens=False)["input_ids"]
    # one token per letter, 30 in all
    assert insert_at_depth(fitter, ids, "NEEDLE.", 0) == "NEEDLE. One two. Three four. Five six."
    assert insert_at_depth(fitter, ids, "NEEDLE.", 20) == "NEEDLE. One two. Three four. Five six."
    assert insert_at_depth(fitter, ids, "NEEDLE.", 27) == "One two. NEEDLE. Three four. Five six."
    assert insert_at_depth(fitter, ids, "NEEDLE.", 60) == "One two. NEEDLE. Three four. Five six."
    assert insert_at_depth(fitter, ids, "NEEDLE.", 99) == "One two. Three four. NEEDLE. Five six."
    assert insert_at_depth(fitter, ids, "NEEDLE.", 100) == "One two. Three four. Five six. NEEDLE."


def read_longbench_local(name: str, doc: dict[str, Any]) -> list[str]:
    """The answer, looked up in the context."""
    if name == "wikipedia_count":
        return [str(len(set(re.findall(r"Paragraph \d+: (.*)", doc["context"]))))]
    if name == "wikipedia_retrieval":
        numbered = re.findall(r"(Paragraph \d+): (.*)", doc["context"])
        return [number for number, text in numbered if doc["input"] in text]
    pattern = re.search(r'"(.*)"', doc["input"])
    assert pattern
    blank = re.escape(pattern.group(1)).replace("____", "(.+?)")
    return sorted({match if isinstance(match, str) else match[0] for match in re.findall(blank, doc["context"])})


@pytest.mark.parametrize("name", ["wikipedia_qa", "wikipedia_retrieval", "wikipedia_count"])
def test_local_answers_stand_in_their_contexts(name: str, articles: list[dict[str, str]]) -> None:
    rows = WikipediaRows(articles)
    make = {"wikipedia_qa": rows.qa, "wikipedia_retrieval": rows.retrieval, "wikipedia_count": rows.count}[name]
    numbers = collections.Counter()
    for sample in range(40):
        row = make(9, f"seed {sample}")
        assert read_longbench_local(name, row) == row["answers"]
        assert row["length"] == len(f"{row['context']} {row['input']}".split())
        numbers[row["answers"][0]] += 1
    # the answer is no constant
    assert len(numbers) > 4


def test_code_lines_follow_what_stands_before_them() -> None:
    modules = standard_library(max_modules=12)
    code = CodeLines(modules)
    from random import Random

    for sample in range(30):
        before, line = code.draw(40, Random(sample))
        name = re.findall(r"# file: (.*)", before)[-1]
        tail = before.rpartition(f"# file: {name}\n")[2]
        assert tail + line + "\n" in modules[name]
        assert len(line.strip()) >= 12
        assert not any(mark in line for mark in ("`", "#", "//"))
        # a statement starts there: no line of a docstring, comment or call in brackets
        assert not line.lstrip().startswith(('"""', "'''", ")"))


def test_code_lines_skip_strings_and_continued_lines() -> None:
    docstring = '"""A text that is no code\nreturn value here\n"""\n'
    call = "answer = compute(\n    first_argument,\n    second_argument)\n"
    text = "\n" * 10 + docstring + call + "return_value = answer\n"
    code = CodeLines({"m.py": text})
    from random import Random

    assert {code.draw(5, Random(n))[1] for n in range(40)} == {"answer = compute(", "return_value = answer"}


def test_everything_through_evaluate_model(
    tiny_tokenizer: Any, articles: list[dict[str, str]], kit: SimpleNamespace, tmp_path: Path
) -> None:
    settings = LongContextOptions(lengths=[1600, 2400], num_samples=1, depths=[0, 50, 100], documents=articles)
    tasks = ["longbench_local", "needle", "ruler"]
    lm = kit.lm(tiny_tokenizer.tokenizer, kit.right, max_length=4096)
    found = evaluate_model(lm, tasks=tasks, long_context=settings, bootstrap_iters=0, output_dir=tmp_path)
    assert found is not None
    told = found["tenfold"]["long_context"]
    for suite in ("longbench_local", "needle", "ruler_local"):
        assert set(told[suite]["sets"].values()) == {100.0}
        assert {key for row in told[suite]["lengths"].values() for key in row} == {"1600", "2400"}
        assert told[suite]["num_cut"] == 0
        assert told[suite]["longest_prompt_tokens"] < 2400
    assert told["ruler_local"]["mean_by_length"] == {"1600": 100.0, "2400": 100.0}
    assert [(cell["length"], cell["depth"], cell["score"]) for cell in told["needle"]["cells"]] == [
        (length, depth, 100.0) for length in (1600, 2400) for depth in (0.0, 50.0, 100.0)
    ]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 2
    assert "length (tokens)" in page
    assert "Needle in a haystack" in page
    rows = [json.loads(line) for line in (tmp_path / "samples_needle.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6
    assert all(row["score"] == 1.0 and row["prompt_tokens"] > 0 for row in rows)

    empty = kit.lm(tiny_tokenizer.tokenizer, lambda doc: "", max_length=4096)
    found = evaluate_model(empty, tasks=tasks, long_context=settings, bootstrap_iters=0)
    assert found is not None
    assert {score for told in found["tenfold"]["long_context"].values() for score in told["sets"].values()} == {0.0}


def test_a_real_model_answers_and_resumes(
    make_llama: Any, tiny_tokenizer: Any, articles: list[dict[str, str]], tmp_path: Path
) -> None:
    model = make_llama(max_position_embeddings=700)
    settings = LongContextOptions(lengths=[600], num_samples=1, depths=[50], documents=articles)

    def run() -> dict[str, Any]:
        found = evaluate_model(
            model,
            tokenizer=tiny_tokenizer.tokenizer,
            tasks=["needle", "ruler_local_niah_single_2"],
            long_context=settings,
            use_cache=tmp_path / "answers",
            bootstrap_iters=0,
        )
        assert found is not None
        return found

    first = run()
    assert first["tenfold"]["num_truncated"] == 0
    [answers] = [path for path in tmp_path.iterdir() if path.suffix == ".db"]
    model.generate = None
    # every answer comes from the file
    second = run()
    assert answers.is_file()
    for name, rows in first["samples"].items():
        assert [row["resps"] for row in rows] == [row["resps"] for row in second["samples"][name]]


def test_tasks_serve_lm_eval_alone(tiny_tokenizer: Any, articles: list[dict[str, str]], kit: SimpleNamespace) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    settings = LongContextOptions(lengths=[1400], num_samples=1, depths=[50], documents=articles)
    plan = plan_long_context(["needle", "longbench_local"], options=settings)
    built = plan.build(tiny_tokenizer.tokenizer, window=2000, transformers_lm=False)
    lm = kit.lm(tiny_tokenizer.tokenizer, kit.right, max_length=2000)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=built.objects, task_manager=manager, bootstrap_iters=0)
    assert found["results"]["needle"]["score,none"] == 1.0
    assert found["groups"]["longbench_local"]["score,none"] == 1.0


@pytest.mark.parametrize("cache", ["full", "specache"])
def test_a_model_behind_a_cache_is_scored(
    cache: str, make_llama: Any, tiny_tokenizer: Any, articles: list[dict[str, str]]
) -> None:
    from tenfold.inference.specache.lm import SpeCacheLM

    lm = SpeCacheLM(make_llama(max_position_embeddings=700), tiny_tokenizer.tokenizer, cache=cache)
    settings = LongContextOptions(lengths=[500], num_samples=1, depths=[0, 100], documents=articles)
    found = evaluate_model(lm, tasks=["needle"], long_context=settings, bootstrap_iters=0)
    assert found is not None
    assert found["tenfold"]["long_context"]["needle"]["num_documents"] == 2
    assert found["tenfold"]["max_length"] == 700
    assert found["tenfold"]["model_digest"].startswith("sha256:")
    assert all(isinstance(row["resps"][0][0], str) for row in found["samples"]["needle"])


def test_the_window_bounds_the_lengths() -> None:
    assert LongContextOptions().lengths_for(8192) == [1024, 2048, 4096, 8192]
    assert LongContextOptions().lengths_for(700) == [700]
    assert LongContextOptions(lengths=[500, 300, 500]).lengths_for(700) == [300, 500]
    with pytest.raises(ValueError, match=r"length 4096 passes the model's window of 2048 tokens"):
        LongContextOptions(lengths=[1024, 4096]).lengths_for(2048)
    with pytest.raises(ValueError, match="window of 32 tokens holds no long context"):
        LongContextOptions().lengths_for(32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [10]}, "length 10 is too short: give at least 64"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"depths": [50, 101]}, r"depths are \[50, 101\]"),
        ({"depths": []}, r"depths are \[\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LongContextOptions(**changes).check()


@pytest.mark.parametrize("name", ["needle", "niah_single_1", "vt", "cwe", "fwe", "longbench_local_wikipedia_qa"])
def test_a_length_below_the_template_is_refused(
    name: str, fitter: PromptFitter, articles: list[dict[str, str]], kit: SimpleNamespace
) -> None:
    settings = LongContextOptions(lengths=[64], num_samples=1, documents=articles)
    task = name if name in ("needle", "longbench_local_wikipedia_qa") else f"ruler_local_{name}"
    with pytest.raises(ValueError, match=rf"{task}: length 64 is smaller than the template, which needs \d+ tokens"):
        evaluate_model(kit.lm(fitter.tokenizer, kit.right, max_length=4096), tasks=[task], long_context=settings)


@pytest.mark.parametrize("task", ["needle", "ruler_local_niah_single_2", "longbench_local"])
def test_documents_that_are_missing_are_told(task: str, fitter: PromptFitter, kit: SimpleNamespace) -> None:
    lm = kit.lm(fitter.tokenizer, kit.right, max_length=4096)
    with pytest.raises(ValueError, match=r"in documents, and there are none|needs at least 32 documents"):
        evaluate_model(lm, tasks=[task])
    with pytest.raises(ValueError, match="document 0 has no title or no text"):
        evaluate_model(lm, tasks=[task], long_context=LongContextOptions(documents=[{"text": "One."}]))
