"""Shared fixtures: the implementations of ops, small models, and data files."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cuda_simulator import compiler
from model_directory import byte_tokenizer
from npllama.backend import Backend, CupyBackend, cuda_device_count
from npllama.config import LlamaConfig
from npllama.initialization import random_parameters
from npllama.llama import Llama
from npllama.ops import CupyOps, NumpyOps, Ops
from npllama.threads import Threads
from npllama.tokenizer import Tokenizer
from strict_array import StrictBackend
from strict_cupy import StrictCupyBackend
from work_ahead import WorkAhead

ROOT = Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"
FIXTURES = Path(__file__).parent / "fixtures"
FAKE_CUPY = Path(__file__).parent / "fake_cupy"
sys.path.insert(0, str(ROOT / "tools"))  # convert.py imports its modules from there

# A background job of a shell ignores Ctrl-C, and its child processes inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores this signal

# Every implementation of the mathematics: the reference, and the overrides of each backend.
# "strict" arrays refuse what CuPy refuses, so tests on them need no GPU. "strict-kernels" also runs
# the kernels, in a simulator that takes seconds. Slow tests of the code around the kernels are
# therefore marked array_calls. They run "strict-cupy", with the array calls that CupyOps uses if no
# kernel fits.
STRICT_CUPY = "strict-kernels" if compiler() else "strict-cupy"
CUPY_IMPLEMENTATIONS = ("cupy", "cupy-reference")

# The first test file beside which the work of later files may run. test_benchmark.py measures.
WORK_AHEAD_FROM = "test_blocks.py"

# The number of selected tests with simulated kernels from which the kernels of small models are
# compiled ahead: those of the whole suite, but not those of one file.
COMPILE_AHEAD_FROM = 200


def cupy_is_present():
    return importlib.util.find_spec("cupy") is not None and cuda_device_count() > 0


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        choices=("all", "numpy", "cupy"),
        default="all",
        help="all: every installed backend; numpy: NumPy only; cupy: CuPy only, which must exist",
    )
    parser.addoption(
        "--array-calls",
        action="store_true",
        help="run no simulated kernels: strict-cupy replaces strict-kernels in all tests",
    )


def pytest_configure(config):
    if os.environ.get("NPLLAMA_CI") == "1" and not compiler():
        raise pytest.UsageError("CI has no g++ 12: it would skip the tests of the kernels")


def pytest_generate_tests(metafunc):
    if "implementation" in metafunc.fixturenames:
        backend = metafunc.config.getoption("backend")
        without_kernels = metafunc.config.getoption("array_calls") or any(
            metafunc.definition.iter_markers("array_calls")
        )
        host = ("numpy", "strict", "strict-cupy" if without_kernels else STRICT_CUPY)
        names = () if backend == "cupy" else host
        if backend == "cupy" or (backend == "all" and cupy_is_present()):
            names += CUPY_IMPLEMENTATIONS
        metafunc.parametrize("implementation", names)


def pytest_collection_modifyitems(config, items):
    if config.getoption("backend") != "cupy":
        return
    if not cupy_is_present():
        raise pytest.UsageError("--backend cupy: no CuPy or no CUDA device on this machine")
    items[:] = [item for item in items if "implementation" in getattr(item, "fixturenames", ())]


class ArrayCalls(CupyOps):
    """CupyOps without kernels: its array calls, and the reference for everything else."""


for _name in set(vars(CupyOps)) - {"linear", "cached_attention", "cache_dtype"}:
    if hasattr(Ops, _name) and not _name.startswith("_"):
        setattr(ArrayCalls, _name, getattr(Ops, _name))


def make_ops(implementation) -> Ops:
    if implementation == "numpy":
        return NumpyOps(Backend(threads=Threads(2)))
    if implementation == "strict":
        return Ops(StrictBackend())
    if implementation == "strict-kernels":
        return CupyOps(StrictCupyBackend())
    if implementation == "strict-cupy":
        return ArrayCalls(StrictBackend())
    import cupy

    return (CupyOps if implementation == "cupy" else Ops)(CupyBackend(cupy))


@pytest.fixture
def ops(implementation) -> Ops:
    return make_ops(implementation)


@pytest.fixture
def to_device(ops):
    return ops.backend.to_device


@pytest.fixture
def to_host(ops):
    return ops.backend.to_host


@pytest.fixture
def rng():
    return np.random.default_rng(0)


TINY = LlamaConfig(
    dim=48, n_layers=2, n_heads=6, n_kv_heads=3, ffn_dim=56, vocab_size=260, context_length=64
)


def make_llama(ops, config=TINY, seed=0, tokenizer=None, dtype="float32") -> Llama:
    """A small model with random weights. The default tokenizer has one token per byte."""
    parameters = random_parameters(config, ops, seed, dtype)
    return Llama(config, parameters, ops, tokenizer=tokenizer or byte_tokenizer())


def rope_table(ops, n_positions, head_dim, theta, dtype="float32"):
    """Cosines and sines of RoPE for a number of positions, a head width and a base."""
    config = LlamaConfig(head_dim, 1, 1, 1, 1, 1, rope_theta=theta)
    return ops.rope_table(n_positions, ops.rope_frequencies(config), dtype)


@pytest.fixture
def llama(ops) -> Llama:
    return make_llama(ops)


@pytest.fixture(scope="session")
def all_work_ahead(tmp_path_factory):
    work = WorkAhead(tmp_path_factory.mktemp)
    yield work
    work.end()


def _n_kernel_tests(session):
    callspecs = (getattr(item, "callspec", None) for item in session.items)
    return sum(spec.params.get("implementation") == "strict-kernels" for spec in callspecs if spec)


@pytest.fixture(scope="module", autouse=True)
def work_ahead(request, all_work_ahead):
    """The work of test files that starts before their turn. The tests of these files wait for it,
    so it has ended before test_model.py."""
    if request.path.name >= WORK_AHEAD_FROM:
        if _n_kernel_tests(request.session) >= COMPILE_AHEAD_FROM:
            all_work_ahead.start_program("compile_ahead", [])
        all_work_ahead.start(request.session.items)
    return all_work_ahead


def run_script(code):
    """Run Python code in a separate process, with warnings off. The process must exit with code
    0."""
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, timeout=60).returncode == 0


def needed(missing: str | None) -> None:
    """Skip the test if a tool is missing. On CI, which installs all tools, fail instead."""
    if missing is not None:
        (pytest.fail if os.environ.get("NPLLAMA_CI") == "1" else pytest.skip)(missing)


def data_file(name) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here: it lies beside the project on its developers' machines")
    return path


@pytest.fixture(scope="session")
def llama_tokenizer() -> Tokenizer:
    """The tokenizer of Llama 2."""
    return Tokenizer(data_file("llama2-tokenizer/tokenizer.model"))
