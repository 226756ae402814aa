"""Builds the C++ CPU kernels on demand and finds the built ones; without them the torch paths run. See README.md."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SETTING = "TENFOLD_CPU_KERNELS"
_SOURCES = ("weighted_gather/native_weighted_gather.cpp", "hash_gather/native_hash_gather.cpp")
_HEADERS = ("native_build/rows.h",)
_FLAGS = ("-shared", "-fPIC", "-O3", "-std=c++17", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi")
_TIMEOUT_S = 300
_KERNELS = Path(__file__).resolve().parents[1]

_INT, _POINTER, _REAL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
_ARGUMENTS = {
    "tenfold_gather": [_INT, *[_POINTER] * 2, _INT, *[_POINTER] * 2, *[_INT] * 8],
    "tenfold_gather_grad_weights": [_INT, *[_POINTER] * 4, *[_INT] * 8],
    "tenfold_gather_grad_table": [_INT, *[_POINTER] * 4, _INT, _POINTER, *[_INT] * 5],
    "tenfold_sort": [_POINTER, _INT, _INT, _POINTER, _POINTER],
    "tenfold_sign_hash": [_POINTER, *[_INT] * 4, _REAL, _POINTER, _POINTER, _INT],
    "tenfold_hash_gather": [_INT, _POINTER, *[_INT] * 4, _REAL, _POINTER, _INT, _INT, _POINTER, _INT],
}

_looked = False
_library: ctypes.CDLL | None = None


def cpu_kernels() -> ctypes.CDLL | None:
    """The built kernels, or None where the torch paths are to run; found out at the first call of a process.

    `TENFOLD_CPU_KERNELS`: unset or `auto` uses kernels that were built before and never builds, `build` builds at the
    first call where they are missing, `off` never uses them.

    Raises:
        ValueError: `TENFOLD_CPU_KERNELS` is another word.
    """
    global _looked, _library
    if not _looked:
        _library = _find()
        _looked = True
    # a mode that watches operators (a count of FLOPs, fake tensors) has to see them
    return None if _library is None or torch._C._len_torch_dispatch_stack() else _library


def forget() -> None:
    """Look for built kernels again at the next call, as `build_cpu_kernels` does after a build."""
    global _looked, _library
    _looked, _library = False, None


@contextmanager
def without_cpu_kernels() -> Iterator[None]:
    """Run the torch paths inside this block (all threads of the process), to compare with them."""
    global _looked, _library
    before = _looked, _library
    _looked, _library = True, None
    try:
        yield
    finally:
        _looked, _library = before


def build_cpu_kernels() -> Path:
    """Build the C++ CPU kernels for this machine where they are missing, about ten seconds, and use them from now on.

    Returns:
        The library, in the cache folder (`TENFOLD_CACHE`, else `tenfold` in the user's).

    Raises:
        RuntimeError: no C++ compiler (`$CXX`, g++ or clang++), it failed, or the cache folder cannot be written.
    """
    path = _path()
    if not path.exists():
        _compile(path)
    _load(path)
    forget()
    return path


def _find() -> ctypes.CDLL | None:
    setting = os.environ.get(SETTING) or "auto"
    if setting not in ("auto", "build", "off"):
        raise ValueError(f"{SETTING}={setting} is not one of auto, build, off")
    if setting == "off":
        return None
    try:
        path = _path()
        if not path.exists():
            if setting == "auto":
                return None
            _compile(path)
        return _load(path)
    except (OSError, RuntimeError) as error:
        warnings.warn(f"{error}; the torch paths of the CPU kernels run instead", RuntimeWarning, stacklevel=2)
        return None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


def _flags() -> list[str]:
    # g++ for Arm knows its own machine by another option
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [*_FLAGS, native, f"-I{_KERNELS / 'native_build'}"]


def _path() -> Path:
    """Where the library of these sources, for this processor and these flags, lies or would lie."""
    key = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        key.update((_KERNELS / name).read_bytes())
    key.update("\n".join([*_flags()[:-1], os.environ.get("CXX", ""), sys.platform, _processor()]).encode())
    chosen = os.environ.get("TENFOLD_CACHE")
    folder = Path(chosen or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tenfold"))
    return folder.expanduser() / "cpu_kernels" / f"{key.hexdigest()[:20]}.so"


def _compiler() -> list[str]:
    chosen = os.environ.get("CXX")
    if chosen:
        words = shlex.split(chosen)
        if shutil.which(words[0]) is None:
            raise RuntimeError(f"CXX names {words[0]}, which is not a program; unset it to use g++ or clang++")
        return words
    for name in ("g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise RuntimeError("the CPU kernels need a C++ compiler: install g++ or clang++, or name one in CXX")


def _compile(path: Path) -> None:
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"the CPU kernels are built on Linux only, this is {sys.platform}")
    compiler = _compiler()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = Path(folder) / path.name
            sources = [str(_KERNELS / name) for name in _SOURCES]
            run = subprocess.run(
                [*compiler, *_flags(), *sources, "-o", str(built)],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_S,
                check=False,
            )
            if run.returncode:
                raise RuntimeError(f"{compiler[0]} cannot build the CPU kernels: {run.stderr.strip()[-500:]}")
            # another process may have been as fast: the same bytes, in one step
            built.replace(path)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{compiler[0]} took longer than {_TIMEOUT_S} s over the CPU kernels") from error
    except OSError as error:
        raise RuntimeError(f"the CPU kernels cannot be built into {path.parent}: {error}") from error


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return library
