"""Which backend is picked, what it says where it cannot, and how much memory it reports."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import npllama
from npllama import backend
from npllama.backend import Backend, CupyBackend, cuda_device_count, get_backend
from npllama.errors import BackendError

PACKAGE = Path(npllama.__file__).parent
MB = 10**6


def refused(name):
    """The one line with which a backend is refused."""
    with pytest.raises(BackendError) as caught:
        get_backend(name)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def fake_cupy(error=None):
    """A module that computes, or fails at its first array as CuPy does without a GPU."""

    def zeros(_n):
        if error is not None:
            raise error

    return SimpleNamespace(zeros=zeros)


@pytest.fixture
def with_driver(monkeypatch):
    monkeypatch.setattr(backend, "cuda_device_count", lambda: 1)


# -- names


def test_numpy_is_plain_numpy():
    numpy = get_backend("numpy")
    assert type(numpy) is Backend and (numpy.name, numpy.xp) == ("numpy", np)
    assert numpy.steps_ahead == 0
    assert numpy.memory_name() == "memory" and numpy.device_name().startswith("CPU")


def test_on_the_cpu_arrays_are_moved_without_a_copy():
    array = np.arange(6.0)
    assert get_backend("numpy").to_device(array) is array
    assert np.shares_memory(get_backend("numpy").to_host(array[::2]), array)


@pytest.mark.parametrize("name", ["", "NUMPY", "cuda", "torch", "numpy ", "a\nb", None])
def test_an_unknown_backend_is_refused_with_the_known_ones(name):
    with pytest.raises(BackendError) as caught:
        get_backend(name)
    message = str(caught.value)
    assert repr(name) in message and "auto, numpy, cupy" in message and "\n" not in message


# -- auto


@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
def test_auto_without_a_driver_is_numpy_and_leaves_cupy_alone():
    code = "import sys, npllama.backend as b; print(b.get_backend().name, 'cupy' in sys.modules)"
    assert run_python(code) == "numpy False"


def test_auto_without_a_device_is_numpy_and_leaves_cupy_alone():
    code = (
        "import sys, npllama.backend as b; b.cuda_device_count = lambda: 0; "
        "print(b.get_backend('auto').name, 'cupy' in sys.modules)"
    )
    assert run_python(code) == "numpy False"


def test_running_on_numpy_imports_neither_cupy_nor_a_framework():
    code = (
        "import sys, npllama; "
        "npllama.load(backend='numpy').generate('a', max_new_tokens=2, seed=0); "
        "print([name for name in ('cupy', 'torch', 'transformers') if name in sys.modules])"
    )
    assert run_python(code) == "[]"


def test_only_the_backend_imports_cupy():
    importers = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(s in path.read_text() for s in ("import cupy", "from cupy", 'import_module("cupy'))
    ]
    assert importers == ["backend.py"]


@pytest.mark.usefixtures("with_driver")
def test_auto_with_a_device_and_cupy_is_cupy(monkeypatch):
    module = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    for name in ("auto", "cupy"):
        chosen = get_backend(name)
        assert type(chosen) is CupyBackend and chosen.xp is module
        assert (chosen.name, chosen.steps_ahead) == ("cupy", 1)


@pytest.mark.usefixtures("with_driver")
@pytest.mark.parametrize("module", [None, fake_cupy(RuntimeError("cudaErrorNoDevice"))])
def test_auto_with_a_device_and_a_cupy_that_fails_is_numpy(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "cupy", module)  # None: the import fails
    assert get_backend("auto").name == "numpy"


@pytest.mark.usefixtures("with_driver")
def test_numpy_is_numpy_even_where_there_is_a_device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    assert get_backend("numpy").name == "numpy"


# -- cupy where it cannot be had


def test_cupy_that_is_not_installed_is_one_line_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = refused("cupy")
    assert "cupy" in message and "pip install 'npllama[cuda12]'" in message
    assert "--backend numpy" in message


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (RuntimeError("cudaErrorInsufficientDriver: too old"), "cudaErrorInsufficientDriver"),
        (ImportError("\n=====\nCuPy is not correctly installed.\n\nmore\n====="), "CuPy is not"),
        (OSError("libnvrtc.so.12: cannot open"), "libnvrtc.so.12"),
        (RuntimeError(), "RuntimeError"),
        (ValueError("  \n "), "ValueError"),
    ],
)
def test_cupy_that_cannot_compute_is_one_line_with_the_reason(monkeypatch, error, shown):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(error))
    message = refused("cupy")
    assert f"({shown}" in message and "NVIDIA GPU" in message and "--backend numpy" in message


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")
@pytest.mark.skipif(cuda_device_count() > 0, reason="this machine has a CUDA device")
def test_the_real_cupy_without_a_device_is_refused_the_same_way():
    code = (
        "from npllama.backend import get_backend\n"
        "from npllama.errors import BackendError\n"
        "try: get_backend('cupy')\n"
        "except BackendError as error: print(error)"
    )
    lines = run_python(code).splitlines()
    assert len(lines) == 1 and "cuda" in lines[0].lower() and "--backend numpy" in lines[0]


# -- the driver


def fake_driver(init, count, error=0):
    def get_count(pointer):
        pointer._obj.value = count
        return error

    return SimpleNamespace(cuInit=lambda _flags: init, cuDeviceGetCount=get_count)


@pytest.mark.parametrize(
    ("driver", "devices"),
    [
        (fake_driver(0, 3), 3),
        (fake_driver(0, 0), 0),
        (fake_driver(100, 3), 0),  # CUDA_ERROR_NO_DEVICE
        (fake_driver(0, 3, error=3), 0),
    ],
)
@pytest.mark.parametrize("library", ["libcuda.so.1", "libcuda.so", "nvcuda.dll"])
def test_devices_are_those_that_the_driver_counts(monkeypatch, driver, devices, library):
    def load(name):
        if name != library:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(backend.ctypes, "CDLL", load)
    assert cuda_device_count() == devices


def test_without_a_driver_there_are_no_devices(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(backend.ctypes, "CDLL", load)
    assert cuda_device_count() == 0


# -- memory


def test_free_gpu_memory_is_the_devices_and_what_the_pool_holds_unused():
    pool = SimpleNamespace(free_bytes=lambda: 5, total_bytes=lambda: 50)
    device = SimpleNamespace(mem_info=(100, 1000))
    cuda = SimpleNamespace(Device=lambda: device)
    cupy = CupyBackend(SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool))
    assert cupy.free_bytes() == 105 and cupy.peak_bytes() == 50
    assert cupy.memory_name() == "GPU memory"


def test_arrays_go_to_the_backend_and_come_back_the_same(ops, to_device, to_host, rng):
    array = rng.random((3, 5), dtype="float32")
    there = to_device(array)
    back = to_host(there * 2)
    assert isinstance(back, np.ndarray) and np.array_equal(back, array * 2)
    assert to_device(there) is there
