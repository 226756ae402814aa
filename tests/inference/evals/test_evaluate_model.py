import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tenfold.inference import evaluate_model

TASKS = ["wikipedia_bits_per_byte", "wikipedia_title_cloze"]
GENERATE_YAML = """
task: continue_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{title}}}}"
generation_kwargs: {{max_gen_toks: {max_gen_toks}, do_sample: false, until: ["\\n\\n"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def results(model_folder: Path, wikipedia_data: Path) -> dict[str, Any]:
    found = evaluate_model(model_folder, tasks=TASKS, data_dir=wikipedia_data, batch_size=4)
    assert found is not None
    return found


@pytest.fixture
def generate_task(wikipedia_data: Path, tmp_path: Path) -> Path:
    data = wikipedia_data / "wikipedia_bits_per_byte" / "test.jsonl"
    short = tmp_path / "short.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()[:4]]
    short.write_text("".join(json.dumps(row | {"text": row["text"][:60]}) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "continue_text.yaml").write_text(GENERATE_YAML.format(path=short, max_gen_toks=8))
    return folder


def rows_of(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / task / "test.jsonl").read_text().splitlines()]


def shipped_manager(folder: Path, wikipedia_data: Path) -> TaskManager:
    """The shipped task files with absolute data files, as a user of bare lm-eval would write them."""
    import tenfold.inference.evals.task_selection as selection
    import yaml

    for name in TASKS:
        config = yaml.safe_load((selection.SHIPPED_FOLDER / f"{name}.yaml").read_text())
        config["dataset_kwargs"] = {"data_files": {"test": str(wikipedia_data / name / "test.jsonl")}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_equals_lm_eval_called_directly(
    results: dict[str, Any], llama: Any, tiny_tokenizer: Any, wikipedia_data: Path, tmp_path: Path
) -> None:
    direct = simple_evaluate(
        model=HFLM(pretrained=llama, tokenizer=tiny_tokenizer.tokenizer, batch_size=4),
        tasks=list(TASKS),
        task_manager=shipped_manager(tmp_path, wikipedia_data),
    )
    assert direct is not None
    assert results["results"] == direct["results"]
    for task in TASKS:
        for ours, theirs in zip(results["samples"][task], direct["samples"][task], strict=True):
            assert ours == theirs


def test_bits_per_byte_equals_float64_arithmetic(
    results: dict[str, Any], llama: Any, tiny_tokenizer: Any, wikipedia_data: Path
) -> None:
    tokenizer, model, limit = tiny_tokenizer.tokenizer, llama.double(), 128
    log_likelihood, num_bytes, num_windows = 0.0, 0, []
    for row in rows_of(wikipedia_data, "wikipedia_bits_per_byte"):
        ids = [tokenizer.eos_token_id, *tokenizer(row["text"]).input_ids]
        num_bytes += len(row["text"].encode())
        num_windows.append(0)
        # every token once, the last window with as much context as fits
        for start in range(1, len(ids), limit):
            end = min(start + limit, len(ids))
            with torch.no_grad():
                logits = model(torch.tensor([ids[max(0, end - limit - 1) : end - 1]])).logits[0]
            scored = torch.tensor(ids[start:end])
            rows = logits.log_softmax(-1)[-len(scored) :]
            log_likelihood += rows.gather(1, scored[:, None]).sum().item()
            num_windows[-1] += 1
    llama.float()
    assert max(num_windows) > 1
    values = results["results"]["wikipedia_bits_per_byte"]
    assert values["bits_per_byte,none"] == pytest.approx(-log_likelihood / num_bytes / math.log(2), rel=1e-5)
    assert values["byte_perplexity,none"] == pytest.approx(math.exp(-log_likelihood / num_bytes), rel=1e-4)


def test_cloze_equals_float64_arithmetic(
    results: dict[str, Any], llama: Any, tiny_tokenizer: Any, wikipedia_data: Path
) -> None:
    tokenizer, model = tiny_tokenizer.tokenizer, llama.double()
    right, right_by_length = [], []
    for row in rows_of(wikipedia_data, "wikipedia_title_cloze"):
        context = tokenizer(f"{row['extract']}\n\nTitle:").input_ids
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['extract']}\n\nTitle: {choice}").input_ids
            number = len(ids) - len(context)
            with torch.no_grad():
                logits = model(torch.tensor([ids[-129:-1]])).logits[0]
            wanted = torch.tensor(ids[-number:])
            sums.append(logits.log_softmax(-1)[-number:].gather(1, wanted[:, None]).sum().item())
        right.append(int(np.argmax(sums)) == row["answer"])
        by_length = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        right_by_length.append(int(np.argmax(by_length)) == row["answer"])
    llama.float()
    values = results["results"]["wikipedia_title_cloze"]
    assert values["acc,none"] == pytest.approx(np.mean(right))
    assert values["acc_norm,none"] == pytest.approx(np.mean(right_by_length))
    assert values["acc_stderr,none"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    # a random model that is right or wrong throughout would hide a wrong answer key
    assert 0 < np.mean(right) < 1


def test_records_what_was_scored(results: dict[str, Any], model_folder: Path) -> None:
    from tenfold.inference import model_digest

    extra = results["tenfold"]
    assert extra["model"] == results["model_name"] == "tiny-llama"
    assert extra["model_digest"] == model_digest(model_folder)
    assert extra["dtype"] == "float32"
    assert extra["max_length"] == 128
    assert extra["seeds"] == {"random": 0, "numpy_random": 1234, "torch_random": 1234, "fewshot_random": 1234}
    assert extra["versions"]["lm_eval"].startswith("0.4.13")
    assert extra["baselines"]["wikipedia_title_cloze"]["chance"] == 0.25
    for task in TASKS:
        assert extra["data"][task]["num_documents"] == results["n-samples"][task]["effective"]
        source = results["configs"][task]["metadata"]["config_source"]
        assert Path(source).is_file()
        assert "cache_dir" not in results["configs"][task]["dataset_kwargs"]


def test_cache_is_keyed_by_the_model(
    model_folder: Path, make_llama: Any, tiny_tokenizer: Any, wikipedia_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    options: dict[str, Any] = {"tasks": TASKS, "data_dir": wikipedia_data, "limit": 6}
    other = make_llama(seed=1)
    fresh = evaluate_model(other, tokenizer=tiny_tokenizer.tokenizer, **options)
    first = evaluate_model(model_folder, use_cache=tmp_path / "answers", **options)
    second = evaluate_model(other, tokenizer=tiny_tokenizer.tokenizer, use_cache=tmp_path / "answers", **options)
    assert fresh is not None
    assert first is not None
    assert second is not None
    assert second["results"] == fresh["results"]
    assert second["results"] != first["results"]

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the model ran although its answers are cached")

    monkeypatch.setattr(HFLM, "_model_call", refuse)
    again = evaluate_model(model_folder, use_cache=tmp_path / "answers", **options)
    assert again is not None
    assert again["results"] == first["results"]
    with pytest.raises(AssertionError, match="model ran"):
        evaluate_model(model_folder, use_cache=tmp_path / "answers", max_length=64, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_logits_that_are_not_numbers(
    own_llama: Any, tiny_tokenizer: Any, wikipedia_data: Path, value: float, tmp_path: Path
) -> None:
    with torch.no_grad():
        own_llama.lm_head.weight[7, 3] = value
    for _ in range(2):
        # the second run finds nothing in the cache that would let it pass
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate_model(
                own_llama,
                tokenizer=tiny_tokenizer.tokenizer,
                tasks=TASKS[:1],
                data_dir=wikipedia_data,
                use_cache=tmp_path / "answers",
                output_dir=tmp_path / "results",
            )
    assert not (tmp_path / "results").exists()


def test_stops_at_the_first_answer_that_is_no_number(
    own_llama: Any, tiny_tokenizer: Any, wikipedia_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = type(own_llama).forward
    monkeypatch.setattr(type(own_llama), "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    with torch.no_grad():
        own_llama.lm_head.weight[7, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_model(
            own_llama, tokenizer=tiny_tokenizer.tokenizer, tasks=TASKS[1:], data_dir=wikipedia_data, batch_size=1
        )
    assert len(calls) == 1


def test_refuses_impossible_tokens(
    own_llama: Any, tiny_tokenizer: Any, wikipedia_data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Logits of -inf are fine for rows that no text uses, but not where a token is scored."""
    forward = type(own_llama).forward
    forbidden = tiny_tokenizer.tokenizer.pad_token_id

    def masked(self: Any, *arguments: Any, **keywords: Any) -> Any:
        output = forward(self, *arguments, **keywords)
        output.logits[..., forbidden] = -math.inf
        return output

    monkeypatch.setattr(type(own_llama), "forward", masked)
    options: dict[str, Any] = {
        "tokenizer": tiny_tokenizer.tokenizer,
        "data_dir": wikipedia_data,
        "use_cache": tmp_path / "answers",
        "limit": 4,
    }
    assert evaluate_model(own_llama, tasks=TASKS, **options) is not None
    forbidden = tiny_tokenizer.tokenizer(" ").input_ids[-1]
    options["use_cache"] = tmp_path / "others"
    for _ in range(2):
        with pytest.raises(ValueError, match="NaN or infinite"):
            evaluate_model(own_llama, tasks=TASKS[1:], **options)


def test_refuses_generation_from_nan(own_llama: Any, tiny_tokenizer: Any, generate_task: Path) -> None:
    options: dict[str, Any] = {"tokenizer": tiny_tokenizer.tokenizer, "tasks": ["continue_text"]}
    found = evaluate_model(own_llama, include_path=generate_task, **options)
    assert found is not None
    assert found["results"]["continue_text"]["exact_match,none"] == 0
    assert len(found["samples"]["continue_text"]) == 4
    with torch.no_grad():
        own_llama.lm_head.weight[7, 3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_model(own_llama, include_path=generate_task, **options)


def test_counts_prompts_that_are_cut(model_folder: Path, wikipedia_data: Path) -> None:
    whole = evaluate_model(model_folder, tasks=TASKS[1:], data_dir=wikipedia_data, limit=3, max_length=4096)
    cut = evaluate_model(model_folder, tasks=TASKS[1:], data_dir=wikipedia_data, limit=3, max_length=40)
    assert whole is not None
    assert cut is not None
    assert whole["tenfold"]["num_truncated"] == 0
    assert cut["tenfold"]["num_truncated"] == 12


@pytest.mark.parametrize(("max_length", "message"), [(1, "need at least 2"), (3, "too small")])
def test_refuses_a_length_that_nothing_fits(
    model_folder: Path, wikipedia_data: Path, max_length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_model(model_folder, tasks=TASKS[1:], data_dir=wikipedia_data, max_length=max_length)


def test_refuses_to_generate_more_than_fits(model_folder: Path, generate_task: Path) -> None:
    path = generate_task / "continue_text.yaml"
    path.write_text(path.read_text().replace("max_gen_toks: 8", "max_gen_toks: 128"))
    with pytest.raises(ValueError, match=r"generates up to 128 tokens.*--max-length"):
        evaluate_model(model_folder, tasks=["continue_text"], include_path=generate_task)


def test_refuses_a_tokenizer_of_another_model(make_llama: Any, tiny_tokenizer: Any, wikipedia_data: Path) -> None:
    small = make_llama(vocab_size=300)
    with pytest.raises(ValueError, match=r"largest token id is 319, the model's embedding has 300 rows"):
        evaluate_model(small, tokenizer=tiny_tokenizer.tokenizer, tasks=TASKS, data_dir=wikipedia_data)
    # rows that no token uses are common padding
    large = make_llama(vocab_size=384)
    assert evaluate_model(large, tokenizer=tiny_tokenizer.folder, tasks=TASKS, data_dir=wikipedia_data, limit=2)


def test_refuses_a_tokenizer_without_a_first_token(llama: Any, tiny_tokenizer: Any, wikipedia_data: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="neither a BOS nor an EOS token"):
        evaluate_model(llama, tokenizer=bare, tasks=TASKS, data_dir=wikipedia_data)


def test_refuses_a_chat_template_that_is_not_there(model_folder: Path, wikipedia_data: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        evaluate_model(model_folder, tasks=TASKS, data_dir=wikipedia_data, apply_chat_template=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"limit": 1.5}, "limit is 1.5"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"device": "gpu9"}, "unknown device 'gpu9'"),
    ],
)
def test_refuses_wrong_numbers(model_folder: Path, wikipedia_data: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_model(model_folder, tasks=TASKS, data_dir=wikipedia_data, **options)
