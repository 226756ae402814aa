"""Guards: what is packaged, what may import what, and that it all imports on a plain machine."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("callbacks", "datamodules", "experiments", "inference", "kernels", "lightning_modules")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
METHODS = (
    "cdt",
    "excp",
    "forest_of_thought",
    "free_video_llm",
    "memoryformer",
    "mgsr",
    "mole",
    "slab",
    "specache",
    "star_agents",
)
# whom each folder may import, besides itself
ALLOWED = {
    "kernels": set(),
    "datamodules": {"kernels"},
    "lightning_modules": {"kernels"},
    "callbacks": {"kernels"},
    "inference": {"kernels"},
    "experiments": {"kernels", "datamodules", "lightning_modules", "callbacks", "inference"},
}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("tenfold", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imported_modules(path: Path) -> set[str]:
    """Full names of everything a file imports, relative imports resolved, those inside functions too."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")
            prefix = ".".join(base[: len(base) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (prefix, node.module)))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_the_resolver_of_imports_sees_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "inference" / "evals" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b\nfrom . import c\nfrom .d import e\ndef f():\n    from ...kernels.g import h\n")
    assert imported_modules(path) == {
        "a.b",
        "tenfold.inference.evals",
        "tenfold.inference.evals.c",
        "tenfold.inference.evals.d",
        "tenfold.inference.evals.d.e",
        "tenfold.kernels.g",
        "tenfold.kernels.g.h",
    }


def test_every_folder_with_code_is_packaged():
    on_disk = {module_name(path).rpartition(".")[0] for path in sources() if path.name != "__init__.py"}
    on_disk |= {module_name(path) for path in sources() if path.name == "__init__.py"}
    # the mapped folder itself, though it holds no code
    on_disk.add("tenfold.kernels")
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == on_disk
    assert len(PYPROJECT["tool"]["setuptools"]["packages"]) == len(on_disk)


def test_the_mapping_names_every_folder():
    assert PYPROJECT["tool"]["setuptools"]["package-dir"] == {f"tenfold.{folder}": folder for folder in FOLDERS}


def test_kernels_is_a_namespace_and_tests_are_no_packages():
    # either would put a package named `kernels` on the path and break `import transformers`
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "tenfold").exists()


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = path.relative_to(ROOT).parts[0]
    for module in imported_modules(path):
        parts = module.split(".")
        assert parts[0] not in FOLDERS, f"{module} is a bare import; write tenfold.{module} or a relative one"
        if parts[0] == "tenfold" and len(parts) > 1:
            assert parts[1] == own or parts[1] in ALLOWED[own], f"{own} must not import {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_methods_do_not_import_each_other(path):
    relative = path.relative_to(ROOT).parts
    own = next((part for part in relative[:-1] if part in METHODS), None)
    shared = relative[:2] == ("lightning_modules", "decoder") or relative[0] == "kernels"
    if (own is None and not shared) or relative[0] == "experiments":
        return
    for module in imported_modules(path):
        if module.startswith("tenfold."):
            others = {part for part in module.split(".")[1:] if part in METHODS} - {own}
            assert not others, f"{'/'.join(relative)} imports {module}"


def test_tests_import_the_namespace_only():
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                assert name.split(".")[0] not in FOLDERS, f"{path.relative_to(ROOT)} imports {name}"


def test_short_names_are_unique():
    import lightning.pytorch as lightning
    from lightning.pytorch import callbacks, loggers, plugins, profilers, strategies

    owners = defaultdict(set)
    for module in (lightning, callbacks, loggers, plugins, profilers, strategies):
        for name in getattr(module, "__all__", ()):
            owners[name].add("lightning")
    for folder in ("lightning_modules", "datamodules", "callbacks"):
        package = importlib.import_module(f"tenfold.{folder}")
        for name in getattr(package, "__all__", ()):
            value = getattr(package, name)
            if inspect.isclass(value):
                owners[name].add(value.__module__)
    assert {name: places for name, places in owners.items() if len(places) > 1} == {}
    assert "RunCheckpoint" in owners


def run_python(code: str, *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


HIDDEN = """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {names!r} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
import importlib.metadata as metadata
from_name = metadata.Distribution.from_name
def hidden_from_name(name):
    if name.split("[")[0].replace("-", "_").lower() in {names!r}:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)
metadata.Distribution.from_name = staticmethod(hidden_from_name)
"""

# modules that are nothing without one optional library, and its name
NEEDS = {
    "tenfold.inference.evals.harness": "lm_eval",
    "tenfold.inference.evals.long_context.task": "lm_eval",
    "tenfold.inference.evals.model_lm": "lm_eval",
    "tenfold.inference.specache.lm": "lm_eval",
}


def test_every_module_imports_with_the_base_dependencies_alone():
    optional = ["datasets", "pyarrow", "gguf", "lm_eval", "matplotlib", "wandb", "pandas", "av", "triton", "psutil"]
    modules = [
        module_name(path)
        for path in sources()
        # files of one optional library say so in their name
        if not path.name.startswith("triton_") and module_name(path) not in NEEDS
    ]
    code = HIDDEN.format(names=optional) + (
        "import importlib, traceback\n"
        f"failed = {{}}\nfor name in {modules!r}:\n"
        "    try:\n        importlib.import_module(name)\n"
        "    except Exception: failed[name] = traceback.format_exc(limit=-2)\n"
        "assert not failed, '\\n'.join(f'{k}: {v}' for k, v in failed.items())\n"
    )
    run_python(code)


def test_importing_touches_no_network():
    code = (
        "import socket, importlib\n"
        "def refuse(*args, **kwargs): raise AssertionError(f'network at import: {args}')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refuse\n"
        f"for name in {[module_name(path) for path in sources()]!r}:\n"
        "    try: importlib.import_module(name)\n"
        # a library that is not there is the other test's business
        "    except ModuleNotFoundError as error:\n"
        "        if (error.name or '').startswith('tenfold'): raise\n"
    )
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "WANDB_MODE": "online", "TENFOLD_OFFLINE": "0"}
    run_python(code, env=online)


def test_transformers_imports_from_the_repository():
    code = "from transformers import LlamaForCausalLM; import tenfold.kernels; print(LlamaForCausalLM.__module__)"
    assert run_python(code).strip() == "transformers.models.llama.modeling_llama"


def test_hugging_faces_kernels_is_theirs():
    pytest.importorskip("kernels.layer", reason="Hugging Face's kernels is not installed")
    assert "site-packages" in run_python("import os; os.chdir('/'); import kernels; print(kernels.__file__)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, as building leaves files beside them."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    copy.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place / "dist"), str(copy)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return next((place / "dist").glob("tenfold-*.whl"))


def test_the_wheel_holds_code_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {f"tenfold/{path.relative_to(ROOT)}" for path in sources()} - names
    data = [*(ROOT / "experiments").glob("*/*.yaml"), *(ROOT / "inference" / "evals" / "tasks").rglob("*.yaml")]
    data += [*(ROOT / "kernels").rglob("*.cpp"), *(ROOT / "kernels").rglob("*.h")]
    missing |= {f"tenfold/{path.relative_to(ROOT)}" for path in data} - names
    assert missing == set()
    assert {name.split("/")[0] for name in names} == {
        "tenfold",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    }
    assert "tenfold/__init__.py" not in names
    assert "tenfold/kernels/__init__.py" not in names


def test_the_wheel_works_outside_the_repository(wheel, tmp_path):
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    code = (
        "import sys\n"
        # the editable install of the checkout must not answer
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in type(f).__module__ + repr(f).lower()]\n"
        f"sys.path.insert(0, {str(unpacked)!r})\n"
        "import importlib, json\n"
        "names = ['tenfold.experiments.cli', 'tenfold.lightning_modules', 'tenfold.datamodules', 'tenfold.callbacks']\n"
        "files = [importlib.import_module(name).__file__ for name in names]\n"
        "from tenfold.callbacks import RunCheckpoint\n"
        "from tenfold.experiments.cli import main\n"
        "assert main(['fit', '--help']) == 0\n"
        "print('\\n' + json.dumps(files))\n"
    )
    files = json.loads(run_python(code, cwd=tmp_path).splitlines()[-1])
    assert all(Path(file).is_relative_to(unpacked) for file in files), files
