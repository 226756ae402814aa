"""Examples in docstrings are run."""

import doctest
import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules_with_examples() -> list[str]:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = []
    for package in packages:
        for file in sorted(ROOT.joinpath(*package.split(".")[1:]).glob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                found.append(package if file.stem == "__init__" else f"{package}.{file.stem}")
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
