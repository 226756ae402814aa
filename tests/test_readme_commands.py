"""The commands that the READMEs tell people to type are there, and those of the first page work in a new folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tenfold.experiments.bench.registry import BENCHES
from tenfold.experiments.cli import available_commands

ROOT = Path(__file__).parents[1]
READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith(".") or part in ("build", "runs") for part in path.relative_to(ROOT).parts)
)
TENFOLD = Path(sys.executable).with_name("tenfold")


def commands(path: Path) -> list[list[str]]:
    """Lines of console blocks that call `tenfold`, comments and continuation lines resolved."""
    found = []
    for block in re.findall(r"```(?:console|bash|sh)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["tenfold"]:
                found.append(words[1:])
    return found


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_commands_and_files_exist(path: Path) -> None:
    for words in commands(path):
        assert words[0] in available_commands(), words
        if words[0] == "bench":
            # options come after the names
            names = words[1 : next((n for n, word in enumerate(words) if word.startswith("-")), None)]
            assert set(names) <= {"all", "NAME", *BENCHES}, words
        for word in words:
            # what is made by an earlier command is not there yet
            if word.startswith("experiments/") and word.endswith(".yaml"):
                assert (ROOT / word).is_file(), words


@pytest.mark.slow
def test_the_first_page_works_in_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    for words in commands(ROOT / "README.md"):
        if words[0] == "demo":
            continue
        done = subprocess.run(
            [TENFOLD, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (words, done.stdout[-1000:], done.stderr[-2000:])
