import importlib.util
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tenfold.experiments import cli


def run(function, argv=(), monkeypatch=None):
    return cli.run_command("tenfold test", function, list(argv))


def tenfold_function(source: str, name: str = "tenfold.some_module"):
    """A function that Python believes to be defined in a module of this project."""
    scope = {"__name__": name}
    exec(source, scope)
    return scope["command"]


def test_help_lists_only_commands_whose_module_is_there(capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "ghost", cli.Command("commands.no_such_module", "never written"))
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "  fit " in out
    assert "ghost" not in out
    assert cli.main(["ghost"]) == 2


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tenfold 0.")


def test_no_command_is_wrong_input(capsys):
    assert cli.main([]) == 2
    assert capsys.readouterr().err.endswith("tenfold: error: no command given\n")


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["fti"]) == 2
    assert capsys.readouterr().err == "tenfold: error: unknown command 'fti'; did you mean fit?\n"


@pytest.mark.parametrize("name", list(cli.available_commands()))
def test_every_listed_command_has_an_entry_point(name):
    module = f"tenfold.experiments.{cli.COMMANDS[name].module}"
    assert "def main(" in Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def test_our_own_value_error_is_one_line_and_status_2(capsys):
    command = tenfold_function("def command(argv):\n    raise ValueError('width is 3;\\n  use a power of two')")
    assert run(command) == 2
    assert capsys.readouterr().err == "tenfold test: error: width is 3; use a power of two\n"


def test_our_own_missing_file_is_status_2(capsys):
    command = tenfold_function("def command(argv):\n    open('/no/such/file')")
    assert run(command) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_value_error_from_elsewhere_is_a_failure_with_its_traceback(capsys):
    command = tenfold_function("import json\ndef command(argv):\n    json.loads('{')")
    assert run(command) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "JSONDecodeError" in err


def test_another_error_of_ours_is_a_failure(capsys):
    command = tenfold_function("def command(argv):\n    raise RuntimeError('broken')")
    assert run(command) == 1
    assert "RuntimeError: broken" in capsys.readouterr().err


def test_the_traceback_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("TENFOLD_TRACEBACK", "1")
    command = tenfold_function("def command(argv):\n    raise ValueError('width is 3')")
    assert run(command) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("tenfold test: error: width is 3\n")


def test_interrupts(capsys):
    assert run(tenfold_function("def command(argv):\n    raise KeyboardInterrupt")) == 130
    assert capsys.readouterr().err == "tenfold test: interrupted\n"
    # as Lightning leaves after Ctrl+C
    source = "import sys\ndef command(argv):\n    try:\n        raise KeyboardInterrupt\n"
    source += "    except KeyboardInterrupt:\n        sys.exit(1)"
    assert run(tenfold_function(source)) == 130


@pytest.mark.parametrize(("code", "status"), [("None", 0), ("0", 0), ("2", 2), ("7", 7), ("'no'", 1)])
def test_system_exit_keeps_its_status(code, status):
    assert run(tenfold_function(f"import sys\ndef command(argv):\n    sys.exit({code})")) == status


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "aws_secret"])
@pytest.mark.parametrize("kind", ["ValueError", "RuntimeError"])
def test_secrets_are_not_printed(variable, kind, capsys, monkeypatch):
    monkeypatch.setenv(variable, "s3cr3t-value-1234")
    source = f"import os\ndef command(argv):\n    raise {kind}('refused with ' + os.environ[{variable!r}])"
    run(tenfold_function(source))
    captured = capsys.readouterr()
    assert "s3cr3t-value-1234" not in captured.out + captured.err
    assert "refused with ***" in captured.err


def test_a_short_value_is_not_taken_for_a_secret(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "a")
    assert cli.redact("a banana") == "a banana"


def test_help_imports_nothing_heavy():
    code = "import sys; from tenfold.experiments.cli import main; main(['--help']); "
    code += "print(sorted({'torch', 'lightning', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_complaint():
    reader, writer = socket.socketpair()
    reader.close()
    with subprocess.Popen([sys.executable, "-m", "tenfold.experiments.cli", "--help"], stdout=writer, stderr=-1) as p:
        writer.close()
        assert b"Traceback" not in p.stderr.read()
