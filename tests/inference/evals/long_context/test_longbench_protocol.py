"""LongBench v1 over files of the published layout: the whole flow, the cut, the exceptions, and bad input."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tenfold.inference.evals import evaluate_model
from tenfold.inference.evals.long_context.catalogue import long_context_task_names, plan_long_context
from tenfold.inference.evals.long_context.longbench_files import lm_eval_templates
from tenfold.inference.evals.long_context.longbench_sets import SETS, sets_of_e
from tenfold.inference.evals.long_context.options import LongContextOptions
from tenfold.inference.evals.long_context.prompts import PromptFitter, cut_middle, default_prompt_tokens

WriteLongBench = Callable[..., Path]


def run(lm: Any, folder: Path | None, tasks: list[str], **options: Any) -> dict[str, Any]:
    settings = {name: options.pop(name) for name in ("prompt_tokens", "skip_malformed") if name in options}
    found = evaluate_model(
        lm,
        tasks=tasks,
        data_dir=folder,
        bootstrap_iters=0,
        long_context=LongContextOptions(**settings),
        **options,
    )
    assert found is not None
    return found


def test_all_sets_score_100_for_the_right_answers_and_0_for_none(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace, tmp_path: Path
) -> None:
    folder = write_longbench({name: [kit.row(name, n) for n in range(2)] for name in SETS})
    lm = kit.lm(letter_tokenizer, kit.right)
    found = run(lm, folder, ["longbench"], output_dir=tmp_path / "out")
    summary = found["tenfold"]["long_context"]["longbench_official"]
    assert summary["sets"] == dict.fromkeys(SETS, 100.0)
    assert summary["mean_of_sets"] == summary["mean_of_categories"] == 100.0
    assert summary["languages"] == {"en": 100.0, "zh": 100.0}
    assert summary["num_documents"] == 42
    assert summary["num_cut"] == 0
    assert "difflib" in summary["backend"] or "Levenshtein" in summary["backend"]
    assert found["groups"]["longbench_official"]["score,none"] == pytest.approx(1.0)
    # lm-eval's layout, and nothing in it but scores
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    keys = set(written["results"]["longbench_official_hotpotqa"])
    assert {key for key in keys if "," in key} == {"score,none", "score_stderr,none"}
    assert written["configs"]["longbench_official_hotpotqa"]["metadata"]["metric"] == "qa_f1"
    assert found["tenfold"]["data"]["longbench_official_hotpotqa"]["files_digest"]
    rows = (tmp_path / "out" / "samples_longbench_official_hotpotqa.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    assert json.loads(rows[0])["prompt_tokens"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("LongBench (official protocol)", "single-document QA", "8k+", "passage_count"))

    empty = run(kit.lm(letter_tokenizer, lambda doc: ""), folder, ["longbench_official"])
    assert empty["tenfold"]["long_context"]["longbench_official"]["sets"] == dict.fromkeys(SETS, 0.0)


def test_longbench_e_averages_by_bucket(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    # three short rows, one of them wrong; one middle row, right; two long rows, one wrong
    lengths, good = [3999, 10, 0, 4000, 8000, 20000], [True, False, True, True, False, True]
    rows = [
        kit.row("qasper", n, length=length, _id=str(ok))
        for n, (length, ok) in enumerate(zip(lengths, good, strict=True))
    ]
    others = {f"{item.name}_e": [kit.row(item.name)] for item in sets_of_e() if item.name != "qasper"}
    folder = write_longbench({"qasper_e": rows, **others})
    lm = kit.lm(letter_tokenizer, lambda doc: kit.right(doc) if doc["_id"] != "False" else "")
    summary = run(lm, folder, ["longbench_e"])["tenfold"]["long_context"]["longbench_official_e"]
    assert summary["lengths"]["qasper"] == {"0-4k": 66.67, "4-8k": 100.0, "8k+": 50.0}
    assert summary["sets"]["qasper"] == round((66.67 + 100 + 50) / 3, 2)
    assert len(summary["sets"]) == 13
    assert summary["lengths"]["trec"] == {"0-4k": 100.0, "4-8k": None, "8k+": None}


def test_prompts_are_the_templates_and_the_chat_template_knows_its_exceptions(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    names = ["hotpotqa", "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p", "passage_count"]
    rows = {name: kit.row(name) for name in names}
    folder = write_longbench({name: [row] for name, row in rows.items()})
    # the flag is asked of the tokenizer
    letter_tokenizer.chat_template = "{{ messages }}"
    lm = kit.lm(letter_tokenizer, kit.right)
    try:
        run(
            lm,
            folder,
            [f"longbench_{name}" for name in names],
            apply_chat_template=True,
            system_instruction="Be brief.",
        )
    finally:
        letter_tokenizer.chat_template = None
    prompts = {request.doc["_id"].removesuffix("-0"): request.args[0] for request in lm.seen}
    for name, row in rows.items():
        plain = f"[{name}] {row['context']} | {row['input']} =>"
        if name in ("hotpotqa", "passage_count"):
            assert prompts[name] == f"<system>Be brief.</system><user>{plain}</user><assistant>"
        else:
            assert prompts[name] == f"Be brief.\n\n{plain}"


def test_generation_settings_follow_the_protocol(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_longbench({name: [kit.row(name)] for name in ("hotpotqa", "samsum")}, max_new_tokens=23)
    lm = kit.lm(letter_tokenizer, kit.right)
    run(lm, folder, ["longbench_hotpotqa", "longbench_samsum"])
    settings = {request.doc["_id"]: request.args[1] for request in lm.seen}
    assert settings["hotpotqa-0"] == {"until": [], "max_gen_toks": 23, "do_sample": False}
    assert settings["samsum-0"] == {"until": ["\n"], "max_gen_toks": 23, "do_sample": False}


def test_samsum_ends_at_a_line_end_that_is_not_its_first_token(tiny_tokenizer: Any) -> None:
    from tenfold.inference.evals.long_context.longbench import newline_settings

    found = newline_settings(tiny_tokenizer.tokenizer, transformers_lm=True)
    newline = tiny_tokenizer.tokenizer.encode("\n", add_special_tokens=False)
    assert found == {"eos_token_id": [tiny_tokenizer.tokenizer.eos_token_id, newline[-1]], "min_new_tokens": 1}


def test_first_lines_count_for_few_shot_sets_only(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    names = ["trec", "triviaqa", "samsum", "lsht", "hotpotqa"]
    folder = write_longbench({name: [kit.row(name)] for name in names})
    lm = kit.lm(letter_tokenizer, lambda doc: f"\n\n{kit.right(doc)}\nFood City \u4f53\u80b2 and more words here")
    found = run(lm, folder, [f"longbench_{name}" for name in names])["tenfold"]["long_context"]["longbench_official"]
    assert {name for name, score in found["sets"].items() if score == 100.0} == {"trec", "triviaqa", "samsum", "lsht"}
    assert 0 < found["sets"]["hotpotqa"] < 100


def test_classes_of_the_last_row_hold_for_all(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    rows = [kit.row("trec", 0, all_classes=["City"]), kit.row("trec", 1, all_classes=["City", "Food"])]
    lm = kit.lm(letter_tokenizer, lambda doc: "City Food")
    found = run(lm, write_longbench({"trec": rows}), ["longbench_trec"])
    assert [row["score"] for row in found["samples"]["longbench_official_trec"]] == [0.5, 0.5]


@pytest.mark.parametrize("limit", [10, 11, 64], ids=lambda limit: f"limit-{limit}")
def test_the_cut_keeps_exactly_the_first_and_last_tokens(letter_tokenizer: Any, limit: int) -> None:
    text = "".join(chr(ord("a") + n % 26) for n in range(200))
    fitter = PromptFitter(letter_tokenizer, window=1000, prompt_tokens=limit)
    fitted = fitter.fit(text, max_new_tokens=5)
    ids = letter_tokenizer(text)["input_ids"]
    half = limit // 2
    # one token per letter; BOS is among the first and is not written out
    assert fitted.text == text[: half - 1] + text[-half:]
    assert fitted.num_removed == len(ids) - 2 * half
    assert fitted.num_tokens == 2 * half
    joined = cut_middle(letter_tokenizer, ids, limit, join=True)
    kept = ids[: limit // 2] + ids[-limit // 2 :]
    assert len(kept) == limit
    assert joined == letter_tokenizer.decode(kept, skip_special_tokens=True)


def test_the_cut_is_the_official_one_on_a_real_tokenizer(tiny_tokenizer: Any) -> None:
    tokenizer = tiny_tokenizer.tokenizer
    text = "The lookup table holds one row for each token, and a router weighs the rows. " * 30
    limit = 101
    ids = tokenizer(text)["input_ids"]
    expected = tokenizer.decode(ids[:50], skip_special_tokens=True) + tokenizer.decode(
        ids[-50:], skip_special_tokens=True
    )
    assert PromptFitter(tokenizer, window=2000, prompt_tokens=limit).fit(text, max_new_tokens=8).text == expected


def test_a_prompt_that_the_template_would_push_out_of_the_window_is_cut_further(letter_tokenizer: Any) -> None:
    fitter = PromptFitter(
        letter_tokenizer, window=120, prompt_tokens=110, wrap=lambda text, chat: f"<<{text}>>" * chat or text
    )
    fitted = fitter.fit("x" * 300, max_new_tokens=20)
    assert fitted.num_tokens <= 100
    assert fitted.num_tokens >= 98
    assert fitted.text.startswith("<<")
    assert fitted.text.endswith(">>")
    # a set without the template keeps more of its prompt
    assert len(fitter.fit("x" * 300, max_new_tokens=20, chat=False).text) == 99


def test_lengths_of_prompts_follow_the_official_table() -> None:
    windows = {4096: 3500, 8192: 7500, 16384: 15500, 32768: 31500, 1024: 500, 512: None}
    assert {window: default_prompt_tokens(window) for window in windows} == windows


def test_long_rows_are_cut_and_counted(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    rows = [kit.row("hotpotqa", 0, words=20), kit.row("hotpotqa", 1, words=400)]
    lm = kit.lm(letter_tokenizer, kit.right, max_length=400)
    found = run(lm, write_longbench({"hotpotqa": rows}), ["longbench_hotpotqa"], prompt_tokens=300)
    summary = found["tenfold"]["long_context"]["longbench_official"]
    assert summary["num_cut"] == 1
    assert summary["longest_prompt_tokens"] == 300
    longest = max((request.args[0] for request in lm.seen), key=len)
    whole = f"[hotpotqa] {rows[1]['context']} | {rows[1]['input']} =>"
    assert longest == whole[:149] + whole[-150:]


def test_a_mirrors_question_is_the_input(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    row = kit.row("hotpotqa")
    row["question"] = row.pop("input")
    lm = kit.lm(letter_tokenizer, kit.right)
    run(lm, write_longbench({"hotpotqa": [row]}), ["longbench_hotpotqa"])
    assert f"| {row['question']} =>" in lm.seen[0].args[0]


def test_templates_come_from_lm_eval_where_the_folder_has_none(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_longbench({name: [kit.row(name)] for name in SETS}, config=False)
    lm = kit.lm(letter_tokenizer, kit.right, max_length=4096)
    found = run(lm, folder, ["longbench"])
    assert found["tenfold"]["long_context"]["longbench_official"]["templates"].startswith("lm_eval 0.4")
    limits = {request.doc["_id"].removesuffix("-0"): request.args[1]["max_gen_toks"] for request in lm.seen}
    # the official table
    assert limits == {
        **dict.fromkeys(("narrativeqa", "qasper", "dureader", "samsum"), 128),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news", "vcsum"), 512),
        **dict.fromkeys(("multifieldqa_en", "multifieldqa_zh", "trec", "lsht", "lcc", "repobench-p"), 64),
        **dict.fromkeys(("hotpotqa", "2wikimqa", "musique", "triviaqa"), 32),
        **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), 32),
    }
    for request in lm.seen:
        assert "{" not in request.args[0]
        assert request.doc["context"] in request.args[0]


def test_templates_of_lm_eval_are_the_official_ones_to_the_letter() -> None:
    # digests only: the templates themselves are no part of this repository
    golden = json.loads(Path(__file__).with_name("template_digests.json").read_text(encoding="utf-8"))["sha256"]
    prompts = lm_eval_templates().prompts
    assert {name: hashlib.sha256(text.encode()).hexdigest() for name, text in prompts.items()} == golden


BAD_LINES = {
    "not JSON": '{"input": ',
    "a JSON list, not an object": "[1, 2]",
    "field 'context' is missing": {"context": None},
    "field 'input' is not a string": {"input": 3},
    "field 'answers' is not a list of strings with at least one": {"answers": []},
    "field 'length' is not a number": {"length": "long"},
    "field 'all_classes' is neither null nor a list of strings": {"all_classes": "City"},
}


@pytest.mark.parametrize("reason", BAD_LINES)
def test_malformed_lines_are_counted_and_named(
    write_longbench: WriteLongBench, kit: SimpleNamespace, reason: str
) -> None:
    bad = BAD_LINES[reason]
    bad = bad if isinstance(bad, str) else kit.row("hotpotqa", 9, **bad)
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa"), bad, "", kit.row("hotpotqa", 1), bad]})
    with pytest.raises(ValueError, match=r"2 malformed lines in .*hotpotqa.jsonl: line 2: ") as error:
        plan_long_context(["longbench_hotpotqa"], data_dirs=[folder])
    assert reason in str(error.value)
    assert "line 5: " in str(error.value)
    assert "\n" not in str(error.value)


def test_malformed_lines_can_be_left_out_and_are_told(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace, tmp_path: Path
) -> None:
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa"), "{", kit.row("hotpotqa", 1), "[]"]}, zipped=True)
    lm = kit.lm(letter_tokenizer, kit.right)
    found = run(lm, folder, ["longbench_hotpotqa"], skip_malformed=True, output_dir=tmp_path / "out")
    summary = found["tenfold"]["long_context"]["longbench_official"]
    assert (summary["num_malformed"], summary["num_documents"]) == (2, 2)
    assert [line.rpartition("hotpotqa.jsonl")[2].split(": ")[0] for line in summary["malformed"]] == [":2", ":4"]
    assert "2 malformed lines left out, first" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_bytes_that_are_no_text_are_named(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")]})
    path = folder / "data" / "hotpotqa.jsonl"
    path.write_bytes(path.read_bytes() + b'{"input": "\xff"}\n')
    with pytest.raises(ValueError, match=r"1 malformed line in .*: line 2: not UTF-8"):
        run(kit.lm(letter_tokenizer, kit.right), folder, ["longbench_hotpotqa"])


def test_missing_files_are_named(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace, tmp_path: Path
) -> None:
    lm = kit.lm(letter_tokenizer, kit.right)
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")]})
    with pytest.raises(FileNotFoundError, match=r"no qasper.jsonl in .*longbench"):
        run(lm, folder, ["longbench_qasper"])
    (folder / "config" / "dataset2maxlen.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset2maxlen.json is missing beside .*dataset2prompt.json"):
        run(lm, folder, ["longbench_hotpotqa"])
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no LongBench files in .*other: expected data.zip"):
        run(lm, tmp_path / "other", ["longbench_official_hotpotqa"])
    with pytest.raises(FileNotFoundError, match=r"'hotpotqa' is not within reach on the hub .* --data-dir"):
        run(lm, None, ["longbench_official_hotpotqa"])


def test_bad_configuration_is_named(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    lm = kit.lm(letter_tokenizer, kit.right)
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")], "passage_retrieval_en": [kit.row("hotpotqa")]})
    prompts = folder / "config" / "dataset2prompt.json"
    with pytest.raises(ValueError, match=r"row hotpotqa-0 of set 'passage_retrieval_en': .* names no paragraph"):
        run(lm, folder, ["longbench_passage_retrieval_en"])
    prompts.write_text('{"hotpotqa": "{contxt}"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"template of set 'hotpotqa' cannot be filled: KeyError\('contxt'\)"):
        run(lm, folder, ["longbench_hotpotqa"])
    prompts.write_text('{"qasper": "{context}"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no prompt template for set 'hotpotqa': it has qasper"):
        run(lm, folder, ["longbench_hotpotqa"])
    prompts.write_text('{"hotpotqa": 3}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"dataset2prompt.json is not a JSON object with strings by set"):
        run(lm, folder, ["longbench_hotpotqa"])


def test_unknown_sets_and_small_windows_are_refused(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")], "trec": [kit.row("trec", all_classes=None)]})
    with pytest.raises(ValueError, match=r"unknown set 'longbench_official_hotpot'; nearest names: .*hotpotqa"):
        run(kit.lm(letter_tokenizer, kit.right), folder, ["longbench_hotpot"])
    with pytest.raises(
        ValueError, match=r"longbench_official_hotpotqa: the template alone has \d+ tokens and a prompt"
    ):
        run(kit.lm(letter_tokenizer, kit.right, max_length=32), folder, ["longbench_hotpotqa"])
    with pytest.raises(ValueError, match=r"prompt_tokens is 1000: it must be 2 to 512"):
        run(kit.lm(letter_tokenizer, kit.right), folder, ["longbench_hotpotqa"], prompt_tokens=1000)
    with pytest.raises(ValueError, match=r"set 'trec' is scored by its classes, and the last row has none"):
        run(kit.lm(letter_tokenizer, kit.right), folder, ["longbench_trec"])


def test_a_chat_template_that_is_not_there_is_told(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace
) -> None:
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")]})
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        run(kit.lm(letter_tokenizer, kit.right), folder, ["longbench_hotpotqa"], apply_chat_template=True)


def test_a_model_without_tokenizer_is_told(write_longbench: WriteLongBench, kit: SimpleNamespace) -> None:
    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")]})
    with pytest.raises(ValueError, match="prompts are sized in tokens, and ScriptedLM has no tokenizer"):
        run(kit.lm(None, kit.right), folder, ["longbench_hotpotqa"])


def test_hub_rows_are_read_from_the_published_archive(
    write_longbench: WriteLongBench, letter_tokenizer: Any, kit: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    folder = write_longbench({"hotpotqa": [kit.row("hotpotqa")]}, zipped=True, config=False)
    asked = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = run(kit.lm(letter_tokenizer, kit.right, max_length=2000), None, ["longbench_official_hotpotqa"])
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]
    assert found["tenfold"]["long_context"]["longbench_official"]["sets"] == {"hotpotqa": 100.0}


def test_names_of_tasks_and_what_short_forms_mean(write_longbench: WriteLongBench, kit: SimpleNamespace) -> None:
    names = long_context_task_names()
    assert sum(name.endswith("_e") for name in names) == 1 + 13
    assert {"longbench_official", "longbench_official_code", "longbench_v2", "needle", "ruler_local_vt"} < set(names)
    # without files of the published layout or lengths, these are lm-eval's own
    plan = plan_long_context(["longbench", "longbench_trec", "ruler", "needle", "mmlu_*"])
    assert (list(plan.groups), plan.others) == (["needle"], ["longbench", "longbench_trec", "ruler", "mmlu_*"])
    plan = plan_long_context(["ruler"], options=LongContextOptions(lengths=[1000]))
    assert [leaf.name for leaf in plan.groups["ruler_local"]][-3:] == [
        "ruler_local_vt",
        "ruler_local_cwe",
        "ruler_local_fwe",
    ]
    folder = write_longbench({name: [kit.row(name)] for name in ("lcc", "repobench-p", "trec")})
    plan = plan_long_context(["longbench_code", "longbench_trec", "ruler_local_niah_*"], data_dirs=[folder])
    assert [len(leaves) for leaves in plan.groups.values()] == [2, 1, *[1] * 8]
    assert plan.others == []
