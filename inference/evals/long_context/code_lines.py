"""Modules of Python's standard library as code to continue."""

import io
import sysconfig
import tokenize
from collections.abc import Mapping
from pathlib import Path
from random import Random

# a line with one of these would score nothing: see metrics.code_similarity
_UNUSABLE = ("`", "#", "//")
_SHORTEST_LINE = 12
_FEWEST_LINES_BEFORE = 8
_LONGEST_LINE = 120


def standard_library(*, max_modules: int = 160) -> dict[str, str]:
    """Source texts of top-level modules of this Python's standard library, by file name.

    Which text a module has depends on the Python version; results tell the digest of the data.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = {}
    for path in sorted(folder.glob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 60 <= text.count("\n") <= 3000 and not path.name.startswith("_"):
            modules[path.name] = text
        if len(modules) == max_modules:
            break
    return modules


class CodeLines:
    """Lines of modules that can be asked for.

    Args:
        modules: Source texts by name.

    Raises:
        ValueError: No module has such a line.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._lines = {name: modules[name].split("\n") for name in sorted(modules)}
        self._targets = [
            (name, number)
            for name, lines in self._lines.items()
            for number in _code_lines(modules[name])
            if number >= _FEWEST_LINES_BEFORE and _is_usable(lines[number])
        ]
        if not self._targets:
            raise ValueError("no module has a line of code that could be asked for: give Python sources")
        self.num_lines = sum(map(len, self._lines.values()))

    def draw(self, num_lines: int, draw: Random) -> tuple[str, str]:
        """So many lines before a line, which ends the first string's module, and that line.

        The module's own lines come last; where it has too few, other modules stand before it, each under its name.
        """
        name, number = draw.choice(self._targets)
        names = [other for other in self._lines if other != name]
        draw.shuffle(names)
        before = self._lines[name][max(number - num_lines, 0) : number]
        missing = num_lines - len(before)
        parts = [f"# file: {name}", *before]
        for other in names:
            if missing <= 0:
                break
            lines = self._lines[other][:missing]
            missing -= len(lines)
            parts = [f"# file: {other}", *lines, *parts]
        return "\n".join(parts) + "\n", self._lines[name][number]


def _is_usable(line: str) -> bool:
    return (
        len(line.strip()) >= _SHORTEST_LINE
        and len(line) <= _LONGEST_LINE
        and line == line.rstrip()
        and not any(mark in line for mark in _UNUSABLE)
    )


def _code_lines(text: str) -> list[int]:
    """Numbers, from 0, of lines that begin a statement: no comments, nothing inside a string or a bracket."""
    found = []
    fresh = True
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT):
                fresh = fresh or token.type == tokenize.NEWLINE
            elif token.type == tokenize.STRING:
                fresh = False
            elif fresh:
                found.append(token.start[0] - 1)
                fresh = False
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return []
    return found
