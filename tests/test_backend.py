"""Which backend is picked, what it says where it cannot, and how much memory it reports."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import npllama
from npllama import backend, process_memory
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


def test_free_memory_is_above_zero_and_within_what_is_installed():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 16 * MB < Backend().free_bytes() <= installed


def test_peak_memory_counts_what_was_touched():
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = Backend().peak_bytes()
    array = np.ones(60 * MB, dtype="uint8")
    peak = Backend().peak_bytes()
    assert before + 0.9 * array.nbytes < peak < before + 1.2 * array.nbytes
    untouched = np.empty(1000 * MB, dtype="uint8")
    assert Backend().peak_bytes() < peak + 0.1 * untouched.nbytes


@pytest.mark.parametrize(
    ("own", "resident", "peak"), [(5, 7, 7), (7, 5, 7), (7, None, 7), (None, None, None)]
)
def test_peak_memory_counts_other_processes_too(monkeypatch, own, resident, peak):
    monkeypatch.setattr(process_memory, "_own_peak", lambda: own)
    monkeypatch.setattr(process_memory, "resident_bytes", lambda: resident)
    assert Backend().peak_bytes() == peak


@pytest.fixture
def system_files(monkeypatch, tmp_path):
    """Writes files where the backend then finds /proc and /sys."""
    monkeypatch.setattr(backend, "Path", lambda path: tmp_path / str(path).lstrip("/"))

    def write(**files):
        for name, text in files.items():
            path = tmp_path / FILES[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text) + "\n")

    return write


FILES = {
    "meminfo": "proc/meminfo",
    "v2_max": "sys/fs/cgroup/memory.max",
    "v2_current": "sys/fs/cgroup/memory.current",
    "v2_stat": "sys/fs/cgroup/memory.stat",
    "v1_limit": "sys/fs/cgroup/memory/memory.limit_in_bytes",
    "v1_usage": "sys/fs/cgroup/memory/memory.usage_in_bytes",
    "v1_stat": "sys/fs/cgroup/memory/memory.stat",
}


def meminfo(kib):
    return f"MemTotal: 1000000 kB\nMemFree: 5 kB\nMemAvailable: {kib} kB\nCached: 7 kB"


def cgroup_v2(limit, used, cached, shared=0):
    return {
        "v2_max": limit,
        "v2_current": used,
        "v2_stat": f"anon 12345\nfile {cached}\nkernel 7\nshmem {shared}",
    }


def cgroup_v1(limit, used, cached, shared=0):
    statistics = f"cache 3\nshmem 1\ntotal_cache {cached}\ntotal_shmem {shared}"
    return {"v1_limit": limit, "v1_usage": used, "v1_stat": statistics}


AVAILABLE = 800_000 * 1024


@pytest.mark.parametrize("cgroup", [cgroup_v2, cgroup_v1])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (1000 * MB, 600 * MB, 0, 400 * MB),
        (1000 * MB, 600 * MB, 100 * MB, 500 * MB),  # page cache is given back when asked for
        (1000 * MB, 1001 * MB, 0, 0),
        (64_000 * MB, 600 * MB, 0, AVAILABLE),
        (9223372036854771712, 600 * MB, 0, AVAILABLE),  # how version 1 writes "no limit"
    ],
)
def test_free_memory_is_the_least_of_the_machines_and_the_control_groups(
    system_files, cgroup, limit, used, cached, free
):
    system_files(meminfo=meminfo(800_000), **cgroup(limit, used, cached))
    assert Backend().free_bytes() == free


@pytest.mark.parametrize("cgroup", [cgroup_v2, cgroup_v1])
def test_shared_memory_counts_as_page_cache_and_is_not_given_back(system_files, cgroup):
    system_files(meminfo=meminfo(800_000), **cgroup(1000 * MB, 700 * MB, 650 * MB, shared=600 * MB))
    assert Backend().free_bytes() == 350 * MB


def test_without_a_limit_free_memory_is_the_machines(system_files):
    system_files(meminfo=meminfo(800_000))
    assert Backend().free_bytes() == AVAILABLE
    system_files(**cgroup_v2("max", 600 * MB, 0))
    assert Backend().free_bytes() == AVAILABLE


@pytest.mark.parametrize(
    "damage", [{"v2_max": "lots"}, {"v2_current": ""}, {"v2_stat": "three words here"}]
)
def test_control_group_files_of_another_form_are_left_alone(system_files, damage):
    system_files(meminfo=meminfo(800_000), **(cgroup_v2(MB, MB, 0) | damage))
    assert Backend().free_bytes() == AVAILABLE


@pytest.mark.parametrize("files", [{}, {"meminfo": "MemTotal: 5 kB"}])
def test_without_meminfo_free_memory_is_at_most_what_is_installed(system_files, files):
    system_files(**files)
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert Backend().free_bytes() == installed
    system_files(**cgroup_v2(5 * MB, 2 * MB, 0))
    assert Backend().free_bytes() == 3 * MB


def test_where_nothing_is_known_free_memory_is_none(monkeypatch, system_files):
    def sysconf(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(backend.os, "sysconf", sysconf)
    assert Backend().free_bytes() is None


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
