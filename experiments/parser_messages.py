"""One-line messages out of the parser's long ones."""

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable


def condense(message: str, *, class_names: Iterable[str] = (), options: Iterable[str] = ()) -> str:
    """Keeps the part of a parser's message that says what is wrong, and adds the nearest right names.

    For a value that may be one of several types jsonargparse reports what each type said about it, over many lines.

    Args:
        message: the parser's message.
        class_names: short names of the classes that a configuration may name.
        options: names of the parser's own options.

    Returns:
        One line.
    """
    flat = " ".join(message.split())
    where = re.match(r'Parser key "([^"]+)": ?', flat)
    prefix = f"{where[1]}: " if where else ""

    unknown = re.search(r"(?:Problem with given class_path '([^']+)': )?Option '([^']+)' is not accepted", flat)
    if unknown:
        owner = f" by {unknown[1]}" if unknown[1] else ""
        return f"{prefix}Option '{unknown[2]}' is not accepted{owner}" + _nearest(unknown[2], _arguments_of(unknown[1]))

    wrong_value = re.search(
        r"Problem with given class_path '([^']+)': Parser key \"([^\"]+)\": (.*?)(?: - |Given value type|$)", flat
    )
    if wrong_value:
        return f"{prefix}{wrong_value[2]} of {wrong_value[1]}: {wrong_value[3].strip()}"

    no_class = re.search(
        r"Expected a dot import path string: (\S+)"
        r"|Problem with given class_path '([^']+)': (?:No module named|module \S+ has no attribute)",
        flat,
    )
    if no_class:
        asked = no_class[1] or no_class[2]
        return f"{prefix}there is no class {asked!r}" + _nearest(asked.rpartition(".")[2], class_names, show_all=True)

    no_option = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([\w.+-]+)", flat)
    if no_option:
        asked = no_option[1] or no_option[2]
        return f"Option '{asked}' is not accepted" + _nearest(asked, options)

    if re.search(r"arguments are required: (?:\w+\.)?model$", flat):
        return "no model; give --config FILE or --model NAME"
    return flat


def said_by_a_constructor(message: str) -> str | None:
    r"""What a class that a configuration names said about its arguments, inside the parser's message about all types.

    >>> said_by_a_constructor("Errors:\n  - Expected a <class 'list'>\n  - sparsity is 2; use 0 to 1")
    'sparsity is 2; use 0 to 1'
    """
    noise = ("Import path ", "Expected a", "Does not validate", "Not a valid subclass", "Problem with given")
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip().startswith("- ")]
    useful = [line for line in lines if not line.startswith(noise)]
    return useful[0] if len(useful) == 1 else None


def _nearest(asked: str, names: Iterable[str], *, show_all: bool = False) -> str:
    known = sorted(set(names))
    near = difflib.get_close_matches(asked, known, n=3, cutoff=0.6)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; known short names: {', '.join(known)}" if show_all and known else ""


def _arguments_of(class_path: str | None) -> list[str]:
    module, _, name = (class_path or "").rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
