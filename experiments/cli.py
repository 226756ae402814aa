"""The one entry point, `tenfold COMMAND …`.

Light on purpose: a command's module, and with it torch, is imported when that command is asked for.
"""

import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

OK, FAILURE, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


class Command(NamedTuple):
    """One row of the command table.

    Attributes:
        module: module under `tenfold.experiments` with `main(argv: list[str]) -> int`.
        help: what the command does, one line.
        takes_name: whether `main` wants its own name first, for a module that serves several commands.
    """

    module: str
    help: str
    takes_name: bool = False


COMMANDS: dict[str, Command] = {
    "fit": Command("lightning_cli", "train a model from a YAML file and flags", takes_name=True),
    "validate": Command("lightning_cli", "score a checkpoint on the validation split", takes_name=True),
    "test": Command("lightning_cli", "score a checkpoint on the test split", takes_name=True),
    "predict": Command("lightning_cli", "run a checkpoint over the prediction data", takes_name=True),
    "demo": Command("commands.demo", "train, re-parameterise, score and report on real text, in minutes on a CPU"),
    "assets": Command("commands.assets", "list or get the named models and data sets"),
    "export": Command("commands.export", "turn a checkpoint into a model folder, or into its deployed form"),
    "generate": Command("commands.generate", "continue a prompt with a trained model"),
    "evaluate": Command("commands.evaluate", "score a model through lm-eval"),
    "checkpoint": Command("commands.checkpoint", "inspect, verify, expand or compress checkpoints"),
    "kernels": Command("commands.kernels", "build the C++ CPU kernels, or say which path runs"),
    "bench": Command("commands.bench", "measure speed and memory against peers"),
    "report": Command("commands.report", "turn results into one self-contained page"),
    "plan": Command("commands.plan", "estimate memory, time and bytes of a configuration on given hardware"),
}


def available_commands() -> dict[str, Command]:
    """The rows of the table whose module is installed."""
    return {
        name: row
        for name, row in COMMANDS.items()
        if importlib.util.find_spec(f"tenfold.experiments.{row.module}") is not None
    }


def redact(text: str) -> str:
    """Replaces the values of environment variables that hold secrets (keys, tokens, passwords) by `***`."""
    secret = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
    # the longest first, so that one secret inside another leaves nothing behind
    values = sorted((v for k, v in os.environ.items() if secret.search(k) and len(v) >= 8), key=len, reverse=True)
    for value in values:
        text = text.replace(value, "***")
    return text


def _help() -> str:
    rows = available_commands()
    width = max(map(len, rows))
    lines = ["usage: tenfold [--help] [--version] COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}  {row.help}" for name, row in rows.items()]
    lines += [
        "",
        "`tenfold COMMAND --help` lists a command's options.",
        "Exit status: 0 success, 2 wrong input, 1 failure, 130 interrupted, 143 terminated.",
        "TENFOLD_TRACEBACK=1 shows the traceback of wrong input too.",
    ]
    return "\n".join(lines)


def _usage_error() -> int:
    print(f"{_help()}\n\ntenfold: error: no command given", file=sys.stderr)
    return WRONG_INPUT


def is_our_complaint(error: BaseException) -> bool:
    """Whether our own code raised this on purpose: the innermost frame tells."""
    if not isinstance(error, (ValueError, OSError)):
        return False
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return tb is not None and str(tb.tb_frame.f_globals.get("__name__", "")).startswith("tenfold.")


def _exit_status(stop: SystemExit) -> int:
    # Lightning turns Ctrl+C into sys.exit(1)
    if isinstance(stop.__context__, KeyboardInterrupt):
        return INTERRUPTED
    if stop.code is None:
        return OK
    if isinstance(stop.code, int):
        return stop.code
    print(redact(str(stop.code)), file=sys.stderr)
    return FAILURE


def run_command(prog: str, function: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs one command and turns whatever it raises into an exit status and a message.

    Args:
        prog: how the command was called, for messages.
        function: the command.
        argv: its arguments.

    Returns:
        0 on success, 2 for wrong input, 1 for a failure, 130 when interrupted, or the command's own status.
    """
    try:
        status = function(argv) or OK
        sys.stdout.flush()
        return status
    except SystemExit as stop:
        return _exit_status(stop)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe has gone; keep the interpreter from complaining when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        ours = is_our_complaint(error)
        if not ours or os.environ.get("TENFOLD_TRACEBACK", "0") not in ("", "0"):
            print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        if ours:
            print(redact(f"{prog}: error: {' '.join(str(error).split())}"), file=sys.stderr)
        return WRONG_INPUT if ours else FAILURE


def main(argv: list[str] | None = None) -> int:
    """Runs `tenfold`.

    Args:
        argv: the arguments without the program's name; those of the process when None.

    Returns:
        The exit status.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        return run_command("tenfold", lambda _: print(_help()), []) if argv else _usage_error()
    name, rest = argv[0], argv[1:]
    if name in ("-V", "--version"):
        print(f"tenfold {importlib.metadata.version('tenfold')}")
        return OK
    rows = available_commands()
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(rows)}"
        print(f"tenfold: error: unknown command {name!r}; {hint}", file=sys.stderr)
        return WRONG_INPUT
    row = rows[name]

    def call(arguments: list[str]) -> int | None:
        return importlib.import_module(f"tenfold.experiments.{row.module}").main(arguments)

    return run_command(f"tenfold {name}", call, [name, *rest] if row.takes_name else rest)


if __name__ == "__main__":
    sys.exit(main())
