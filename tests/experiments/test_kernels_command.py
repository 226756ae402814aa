"""`tenfold kernels` builds, says what runs, and says why it cannot."""

import shutil

import pytest
from tenfold.experiments.cli import main
from tenfold.kernels.native_build import forget

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    monkeypatch.delenv("TENFOLD_CPU_KERNELS", raising=False)
    forget()
    yield
    forget()


@needs_compiler
def test_build_then_status(tmp_path, monkeypatch, capsys):
    assert main(["kernels", "status"]) == 0
    assert "torch's operators are used" in capsys.readouterr().out
    assert main(["kernels", "build"]) == 0
    (library,) = (tmp_path / "cpu_kernels").glob("*.so")
    assert f"C++ kernels are used: {library}" in capsys.readouterr().out
    monkeypatch.setenv("TENFOLD_CPU_KERNELS", "off")
    forget()
    assert main(["kernels", "status"]) == 0
    assert "torch's operators are used" in capsys.readouterr().out


def test_no_compiler_is_a_failure_with_the_reason(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["kernels", "build"]) == 1
    assert "CXX names no-such-compiler" in capsys.readouterr().err


def test_an_unknown_setting_is_wrong_input(monkeypatch, capsys):
    monkeypatch.setenv("TENFOLD_CPU_KERNELS", "fast")
    assert main(["kernels", "status"]) == 2
    assert "TENFOLD_CPU_KERNELS=fast is not one of auto, build, off" in capsys.readouterr().err
