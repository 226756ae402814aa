import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tenfold.inference.evals import Page, WandbOptions, evaluate_model, plot, print_scores, scores_of, table
from tenfold.inference.evals.results import write_results
from tenfold.inference.evals.scores import baselines, ratio_standard_errors

TASKS = ["wikipedia_bits_per_byte", "wikipedia_title_cloze"]
VOID = {"meta", "br", "hr", "img", "link", "use", "path"}


class Outline(html.parser.HTMLParser):
    """Collects tags, ids and references, and fails on tags that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.collect(attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.collect(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def collect(self, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            elif key in ("href", "src"):
                self.references.append(str(value))


@pytest.fixture(scope="module")
def results_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results") / "run"


@pytest.fixture(scope="module")
def results(model_folder: Path, wikipedia_data: Path, results_folder: Path) -> dict[str, Any]:
    found = evaluate_model(
        model_folder,
        tasks=TASKS,
        data_dir=wikipedia_data,
        output_dir=results_folder,
        wandb=WandbOptions(project="tenfold-tests", offline=True, tags=("tiny",)),
    )
    assert found is not None
    return found


def test_standard_error_of_ratios_against_resampling(results: dict[str, Any]) -> None:
    rows = results["samples"]["wikipedia_bits_per_byte"]
    errors = ratio_standard_errors(rows)
    assert results["tenfold"]["standard_errors"]["wikipedia_bits_per_byte"] == errors
    pairs = np.array([row["bits_per_byte"] for row in rows])
    draws = np.random.default_rng(0).integers(len(pairs), size=(20_000, len(pairs)))
    sums = pairs[draws].sum(axis=1)
    resampled = (-sums[:, 0] / sums[:, 1] / math.log(2)).std()
    assert errors["bits_per_byte,none"] == pytest.approx(resampled, rel=0.1)
    # byte perplexity is 2 to the bits per byte
    bits = results["results"]["wikipedia_bits_per_byte"]["bits_per_byte,none"]
    expected = errors["bits_per_byte,none"] * math.log(2) * 2**bits
    assert errors["byte_perplexity,none"] == pytest.approx(expected)


def test_standard_error_needs_two_documents() -> None:
    assert ratio_standard_errors([{"filter": "none", "bits_per_byte": (-3.0, 2)}]) == {}
    # equal ratios leave nothing uncertain
    rows = [{"filter": "none", "bits_per_byte": (-1.5 * n, n)} for n in (1, 4, 9)]
    assert ratio_standard_errors(rows) == {"bits_per_byte,none": pytest.approx(0.0)}


def test_baselines() -> None:
    rows = [
        {"metrics": ["acc"], "arguments": [()] * number, "target": target}
        for number, target in ((2, 0), (4, 1), (4, 0))
    ]
    assert baselines(rows, "multiple_choice") == {
        "chance": pytest.approx((0.5 + 0.25 + 0.25) / 3),
        "majority": pytest.approx(2 / 3),
    }
    assert baselines(rows, "loglikelihood") == {}
    twice = [{"metrics": ["acc", "acc_mutual_info"], "arguments": [()] * 8, "target": "x"}]
    assert baselines(twice, "multiple_choice") == {"chance": 0.25}


def test_scores_carry_errors_and_baselines(results: dict[str, Any]) -> None:
    scores = {(score.task, score.metric): score for score in scores_of(results)}
    assert set(scores) == {
        *((TASKS[0], metric) for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")),
        *((TASKS[1], metric) for metric in ("acc", "acc_norm")),
    }
    assert all(score.standard_error is not None for score in scores.values())
    acc = scores[TASKS[1], "acc"]
    assert acc.value == results["results"][TASKS[1]]["acc,none"]
    assert acc.standard_error == results["results"][TASKS[1]]["acc_stderr,none"]
    assert (acc.chance, acc.higher_is_better, acc.num_fewshot) == (0.25, True, 0)
    assert scores[TASKS[0], "bits_per_byte"].higher_is_better is False


def test_results_folder(results: dict[str, Any], results_folder: Path) -> None:
    stored = json.loads((results_folder / "results.json").read_text())
    assert stored["results"] == json.loads(json.dumps(results["results"], default=float))
    assert stored["tenfold"] == json.loads(json.dumps(results["tenfold"]))
    assert {"configs", "versions", "n-shot", "n-samples", "higher_is_better", "config", "date"} <= set(stored)
    assert "samples" not in stored
    assert scores_of(stored) == scores_of(results)
    for task in TASKS:
        lines = (results_folder / f"samples_{task}.jsonl").read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in lines] == list(range(len(results["samples"][task])))
    assert not list(results_folder.glob("*.partial"))


def test_report_is_self_contained_and_tells_the_scores(results: dict[str, Any], results_folder: Path) -> None:
    page = (results_folder / "report.html").read_text()
    assert "http" not in page
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    outline = Outline(page)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(reference.startswith("#") and reference[1:] in outline.ids for reference in outline.references)
    for score in scores_of(results):
        assert f"{score.value:.4f}" in page or f"{score.value:.4g}" in page
        assert f"{score.standard_error:.4f}" in page or f"{score.standard_error:.4g}" in page
    assert results["tenfold"]["model_digest"] in page
    assert page.count("<svg") == 1
    # black on a dark page could not be read
    assert "#000000" not in page


def test_printed_table(results: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_scores(results, console=console)
    text = console.export_text()
    for score in scores_of(results):
        assert score.task in text
        assert score.metric in text
    assert f"{results['results'][TASKS[1]]['acc,none']:.4f}" in text
    assert max(map(len, text.splitlines())) <= 80


def test_numbers_that_json_lacks_become_null(results: dict[str, Any], tmp_path: Path) -> None:
    spoilt = dict(results) | {"results": {"task": {"acc,none": 0.5, "acc_stderr,none": math.nan, "alias": "task"}}}
    write_results(spoilt, tmp_path, log_samples=False)
    stored = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert stored["results"]["task"]["acc_stderr,none"] is None
    assert not list(tmp_path.glob("samples_*"))
    (score,) = scores_of(stored)
    assert score.standard_error is None


def test_earlier_results_stay(results: dict[str, Any], results_folder: Path, model_folder: Path) -> None:
    before = (results_folder / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds results\.json: choose another --output, or pass --over"):
        evaluate_model(model_folder, tasks=TASKS, output_dir=results_folder)
    assert (results_folder / "results.json").read_bytes() == before
    with pytest.raises(NotADirectoryError, match="--output names a folder"):
        evaluate_model(model_folder, tasks=TASKS, output_dir=results_folder / "results.json")


def test_offline_wandb_run_is_written(results: dict[str, Any], results_folder: Path) -> None:
    (run,) = (results_folder / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    content = log.read_bytes()
    for text in ("tenfold-tests", "tiny-llama", "wikipedia_title_cloze/acc", results["tenfold"]["model_digest"]):
        assert text.encode() in content
    tables = [path.name for path in (run / "files").rglob("*.table.json")]
    assert any(name.startswith("wikipedia_title_cloze") for name in tables)


def test_wandb_takes_groups_without_an_aggregate(model_folder: Path, wikipedia_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "both.yaml").write_text(f"group: both_tasks\ntask: [{', '.join(TASKS)}]\n")
    found = evaluate_model(
        model_folder,
        tasks=["both_tasks"],
        include_path=folder,
        shipped_data_dir=wikipedia_data,
        limit=3,
        output_dir=tmp_path / "out",
        wandb=WandbOptions(project="tenfold-tests", offline=True),
    )
    assert found is not None
    # the trap: a row among the results that is neither a task nor listed as a group
    assert "both_tasks" in found["results"]
    assert "both_tasks" not in found.get("groups", {})
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    assert any(path.name.startswith(TASKS[1]) for path in (run / "files").rglob("*.table.json"))


def test_page_escapes_and_formats() -> None:
    page = Page("<b>", subtitle="a & b")
    page.heading("<i>")
    page.paragraph("x < y")
    page.preformatted("<pre>")
    page.details("more", table([[1, 2.34567, None, "<script>", True, 12345.6]], ["a", "b", "c", "d", "e", "f"]))
    text = page.html()
    Outline(text)
    for forbidden in ("<b>", "<i>", "x < y", "<script>"):
        assert forbidden not in text
    cells = re.findall(r"<td[^>]*>(.*?)</td>", text)
    assert cells == ["1", "2.346", "\N{EN DASH}", "&lt;script&gt;", "yes", "12,346"]


def test_two_plots_of_one_page_share_no_ids(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    page = Page("plots")
    for shift in (0, 1):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([0, 1], [shift, 2], marker="o", color="black")
        axes.set_title("loss & <more>")
        page.plot(figure, caption="c < d")
    outline = Outline(page.write(tmp_path / "page.html").read_text())
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references
    assert set(outline.references) <= {f"#{identifier}" for identifier in outline.ids}
    figure = Figure()
    figure.subplots().plot([0, 1])
    assert plot(figure) == plot(figure)
