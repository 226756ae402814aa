import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tenfold.inference.evals import model_digest, samples_digest, tokenizer_digest
from tenfold.inference.evals.digest import files_digest


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_folder_digest_is_of_the_content(model_folder: Path, copied: Path) -> None:
    original = model_digest(model_folder)
    assert original == model_digest(str(copied))
    assert original.startswith("sha256:")
    assert len(original) == 71
    # what a model computes does not depend on these
    (copied / "README.md").write_text("about")
    (copied / ".cache").mkdir()
    (copied / ".cache" / "x.json").write_text("{}")
    (copied / "optimizer.pt").write_bytes(b"x")
    assert model_digest(copied) == original


@pytest.mark.parametrize("change", ["weight", "config", "table", "name"])
def test_folder_digest_sees_each_change(copied: Path, change: str) -> None:
    original = model_digest(copied)
    weights = copied / "model.safetensors"
    if change == "weight":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif change == "config":
        config = json.loads((copied / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    elif change == "table":
        (copied / "lookup.bin").write_bytes(b"rows")
    else:
        weights.rename(copied / "other.safetensors")
    assert model_digest(copied) != original


def test_digest_of_a_model_in_memory(llama: Any, make_llama: Any) -> None:
    original = model_digest(llama)
    assert model_digest(make_llama()) == original
    assert model_digest(make_llama(seed=1)) != original
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-6
    assert model_digest(changed) != original
    assert model_digest(copy.deepcopy(llama).bfloat16()) != original
    renamed = copy.deepcopy(llama)
    renamed.config._name_or_path = "elsewhere"
    assert model_digest(renamed) == original


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model files"):
        model_digest(tmp_path)


def test_tokenizer_digest(tiny_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    original = tokenizer_digest(tiny_tokenizer.tokenizer)
    loaded = AutoTokenizer.from_pretrained(tiny_tokenizer.folder)
    assert tokenizer_digest(loaded) == original
    loaded.chat_template = "{{ messages }}"
    assert tokenizer_digest(loaded) != original


def test_samples_digest_is_of_what_was_asked() -> None:
    rows = [{"doc_id": i, "doc_hash": f"d{i}", "prompt_hash": "p", "target_hash": "t", "acc": i} for i in range(3)]
    original = samples_digest(rows)
    assert samples_digest(rows[::-1]) == original
    assert samples_digest([row | {"acc": 0.0} for row in rows]) == original
    assert samples_digest(rows[:2]) != original
    assert samples_digest([*rows[:2], rows[2] | {"prompt_hash": "q"}]) != original


def test_files_digest_is_of_names_and_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("1")
    second.write_text("2")
    original = files_digest([first, second])
    assert files_digest([second, first]) == original
    second.write_text("3")
    assert files_digest([first, second]) != original
