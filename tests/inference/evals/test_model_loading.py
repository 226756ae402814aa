import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold.inference.evals import load_model, load_tokenizer


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_loads_what_was_saved(model_folder: Path, llama: Any) -> None:
    loaded = load_model(model_folder)
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


def test_auto_dtype_is_float32_on_a_cpu(own_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    own_llama.bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == torch.float32
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model("./nothing")


def test_hub_name_out_of_reach() -> None:
    with pytest.raises(FileNotFoundError, match=r"'no-such/model' is neither a folder here nor a hub model"):
        load_model("no-such/model")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "model.ckpt").touch()
    with pytest.raises(ValueError, match="is a file"):
        load_model(tmp_path / "model.ckpt")


def test_unknown_model_type(copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(ValueError, match="not a model that transformers can load") as caught:
        load_model(copied)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(copied: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (copied / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (copied / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="never run"):
        load_model(copied)
    assert not marker.exists()


def test_truncated_weights(copied: Path) -> None:
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a model that transformers can load"):
        load_model(copied)


@pytest.mark.parametrize("kind", ["missing", "mismatched"])
def test_weights_that_would_be_random(copied: Path, kind: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(copied / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    if kind == "missing":
        del tensors[name]
    save_file(tensors, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}|size"):
        load_model(copied)


def test_folder_without_a_tokenizer(copied: Path) -> None:
    for path in copied.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .* --tokenizer"):
        load_tokenizer(copied)
