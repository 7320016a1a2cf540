"""The first start on a machine reports that kernels are compiled; later starts do not."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from npllama import console
from npllama.ops.cuda import kernels
from npllama.ops.cuda.kernels import Kernels


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A temporary folder as CuPy's cache of compiled kernels."""
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setenv("CUPY_CACHE_DIR", str(path))
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    for name in ("common", "one", "two"):
        (tmp_path / f"{name}.cu").write_text(f"// {name}")
    return path


@pytest.fixture
def said(monkeypatch):
    """The log messages that a program would print on standard error."""
    lines = []
    monkeypatch.setattr(console, "tell", lines.append)
    console.tell_what_is_logged("npllama")
    return lines


def start(*compiled, version="14.2.0", capability="90", error=None):
    """Start a program on a CuPy that compiles nothing. Its kernels are `compiled`."""

    def module(**_options):
        if error is not None:
            raise error
        return SimpleNamespace(get_function=lambda _name: SimpleNamespace())

    device = SimpleNamespace(compute_capability=capability)
    cupy = SimpleNamespace(
        __version__=version, RawModule=module, cuda=SimpleNamespace(Device=lambda: device)
    )
    it = Kernels(SimpleNamespace(xp=cupy))
    for file, name in compiled:
        it._kernel(file, name)
    return it


LINE = "npllama: compiling kernels for this GPU (some seconds, at the first run only)"
ALL = ("one", "a<float>"), ("one", "a<half>"), ("two", "b")


def test_it_is_said_once_at_the_first_start(folder, said):
    start(*ALL)
    assert said == [LINE]
    start(*ALL)
    assert said == [LINE]


@pytest.mark.parametrize(
    "other", [{"version": "14.3.0"}, {"capability": "80"}, {"source": "// changed"}, {"new": True}]
)
def test_what_cupy_has_to_compile_anew_is_said(folder, said, other):
    start(*ALL)
    said.clear()
    if "source" in other:
        (folder.parent / "common.cu").write_text(other.pop("source"))
    compiled = [("two", "b<int>")] if other.pop("new", False) else ALL
    start(*compiled, **other)
    assert said == [LINE]


def test_a_compilation_that_failed_or_was_interrupted_is_said_again(folder, said):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            start(*ALL, error=error())
    assert said == [LINE, LINE]
    start(*ALL)
    assert said == [LINE, LINE, LINE]


def test_where_cupy_keeps_nothing_it_is_said_at_each_start(folder, said):
    folder.rmdir()
    start(*ALL)
    start(*ALL)
    assert said == [LINE, LINE]


def test_a_program_that_uses_the_library_prints_nothing(folder):
    code = (
        f"import pathlib, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        "import test_first_compilation as t; "
        f"t.kernels.SOURCES = pathlib.Path({str(folder.parent)!r}); t.start(*t.ALL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(list(folder.iterdir())) == len(ALL)
