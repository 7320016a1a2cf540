"""Which backend is chosen, the reasons given if there is no GPU, and the reported memory."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import benchmark
import npllama
import perplexity
import train
from npllama import backend, cuda_device
from npllama.backend import Backend, CupyBackend, cuda_device_count, get_backend
from npllama.config import LlamaConfig
from npllama.cuda_device import Driver, cuda_driver
from npllama.errors import BackendError
from npllama.generate import main

PACKAGE = Path(npllama.__file__).parent
MB = 10**6


def refused(name, device=None):
    """The one-line message with which a backend is refused."""
    with pytest.raises(BackendError) as caught:
        get_backend(name, device=device)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class FakeCupy(ModuleType):
    """The parts of CuPy that the choice of a backend uses.

    Args:
        at: the name of the call that fails.
        error: the exception that it raises.
        n_devices: the number of devices.
        built_for: the CUDA version of this CuPy, as the runtime encodes it.
    """

    def __init__(self, at=None, error=None, n_devices=1, built_for=13020):
        super().__init__("cupy")
        self.current = 0

        def call(name, value=None):
            if name == at:
                raise error
            return value

        class Device:
            def __init__(self, device=None):
                self.id = fake.current if device is None else device

            def use(self):
                fake.current = self.id

            def __enter__(self):
                self.before, fake.current = fake.current, self.id

            def __exit__(self, *_):
                fake.current = self.before

        class Cuda(ModuleType):
            @property
            def cublas(self):
                return call("cublas")

        fake = self
        self.cuda = Cuda("cupy.cuda")
        self.cuda.Device = Device
        self.cuda.nvrtc = SimpleNamespace(getVersion=lambda: call("getVersion", (13, 5)))
        self.cuda.runtime = SimpleNamespace(
            runtimeGetVersion=lambda: built_for,
            getDeviceCount=lambda: call("getDeviceCount", n_devices),
            getDeviceProperties=lambda device: {"name": b"H%d" % device},
        )
        self.zeros = lambda _n: call("zeros")
        self.asarray = lambda array: (self.current, array)


@pytest.fixture
def with_driver(monkeypatch):
    set_driver(monkeypatch, Driver(1, (13, 0)))


def set_driver(monkeypatch, driver):
    monkeypatch.setattr(backend, "cuda_driver", lambda: driver)


def set_cupy(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "cupy", module)  # None: not installed


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
        "import sys, npllama.backend as b; b.cuda_driver = lambda: b.Driver(); "
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
    module = FakeCupy()
    set_cupy(monkeypatch, module)
    for name in ("auto", "cupy"):
        chosen = get_backend(name)
        assert type(chosen) is CupyBackend and chosen.xp is module
        assert (chosen.name, chosen.steps_ahead, chosen.no_gpu) == ("cupy", 1, None)


@pytest.mark.usefixtures("with_driver")
def test_numpy_is_numpy_even_where_there_is_a_device(monkeypatch):
    set_cupy(monkeypatch, FakeCupy())
    chosen = get_backend("numpy")
    assert (chosen.name, chosen.no_gpu) == ("numpy", None)


# -- reasons for no GPU, and what to do: driver, CuPy, and CuPy's own errors

INSUFFICIENT = RuntimeError(  # the base class of CUDARuntimeError
    "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
)
NOT_FOUND = RuntimeError('Failure finding "libnvrtc.so.13": No such file: libnvrtc.so.13')
NO_CUBLAS = ImportError('Failure finding "libcublasLt.so.13": No such file')
RULED = ImportError("\n=====\nFailed to import CuPy.\n\nmore\n=====")
READY = Driver(1, (13, 0))
CASES = {
    "no driver": (Driver(found="no NVIDIA driver", remedy="install it"), None, "install it"),
    "CuPy is not installed": (READY, None, "pip install 'npllama[cuda13]'"),
    "CuPy is not installed ": (Driver(1, (12, 4)), None, "pip install 'npllama[cuda12]'"),
    "CuPy: the driver supports CUDA up to 12.4, but this CuPy needs CUDA 13.2": (
        Driver(1, (12, 4)),
        FakeCupy("getDeviceCount", INSUFFICIENT),
        "expected a driver for CUDA 13 or newer; install one, or pip uninstall cupy-cuda13x and "
        "pip install 'npllama[cuda12]'",
    ),
    "CuPy: the driver supports CUDA up to 11.8, but this CuPy needs CUDA 12.9": (
        Driver(1, (11, 8)),
        FakeCupy("getDeviceCount", INSUFFICIENT, built_for=12090),
        "expected a driver for CUDA 12 or newer; install one; --backend",
    ),
    "CuPy: cudaErrorDevicesUnavailable: busy": (
        READY,
        FakeCupy("zeros", RuntimeError("cudaErrorDevicesUnavailable: busy\nmore")),
        "nvidia-smi",
    ),
    "CuPy: MemoryError": (READY, FakeCupy("zeros", MemoryError()), "nvidia-smi"),
    "CuPy: ValueError": (READY, FakeCupy("zeros", ValueError("  \n ")), "nvidia-smi"),
    "CuPy: NVRTC cannot be loaded": (
        READY,
        FakeCupy("getVersion", NOT_FOUND),
        "expected CUDA 13's library; pip install 'npllama[cuda13]' installs it",
    ),
    "CuPy: cuBLAS cannot be loaded": (
        READY,
        FakeCupy("cublas", NO_CUBLAS, built_for=12090),
        "expected CUDA 12's library; pip install 'npllama[cuda12]' installs it",
    ),
}


@pytest.mark.parametrize("found", CASES)
def test_a_gpu_that_cannot_be_used_is_one_line_with_the_reason_and_what_to_do(
    monkeypatch, capsys, found
):
    driver, module, remedy = CASES[found]
    found = driver.found or found.strip()
    set_driver(monkeypatch, driver)
    set_cupy(monkeypatch, module)
    message = refused("cupy")
    assert message.startswith(f"backend cupy cannot be used ({found}): ")
    assert remedy in message and message.endswith("; --backend numpy runs on the CPU")

    assert main(["--prompt", "a", "--backend", "cupy"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"npllama: error: {message}\n")

    assert refused("auto", 0).startswith(f"device 0 cannot be used ({found}): ")  # device 0 given
    chosen = get_backend("auto")
    assert (chosen.name, chosen.no_gpu) == ("numpy", found)
    assert main(["--prompt", "a", "--max-new-tokens", "1", "--stats"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "backend" in line]
    assert re.fullmatch(rf"backend +numpy \(CPU, \d+ cores; {re.escape(found)}\)", line)


@pytest.mark.usefixtures("with_driver")
def test_a_cupy_that_cannot_be_imported_is_one_line_with_the_reason(monkeypatch):
    def fail(_name):
        raise RULED

    monkeypatch.setattr(backend.importlib, "import_module", fail)
    message = refused("cupy")
    assert "(CuPy: Failed to import CuPy.): pip install 'npllama[cuda13]'" in message
    assert get_backend("auto").no_gpu == "CuPy: Failed to import CuPy."


# -- several devices


@pytest.mark.usefixtures("with_driver")
def test_a_device_is_current_in_every_thread_that_moves_arrays(monkeypatch):
    module = FakeCupy(n_devices=3)
    set_cupy(monkeypatch, module)
    chosen = get_backend("auto", device=2)
    assert chosen.device_name() == "H2, device 2 of 0 to 2"
    module.current = 0  # as in another thread
    assert chosen.to_device("a") == (2, "a")
    module.current = 0
    chosen = get_backend("cupy")  # uses the device that is current now, also later
    module.current = 1
    assert chosen.to_device("a") == (0, "a")
    set_cupy(monkeypatch, FakeCupy())
    assert get_backend("cupy").device_name() == "H0"


@pytest.mark.usefixtures("with_driver")
@pytest.mark.parametrize(
    ("n_devices", "device", "expected"),
    [(1, 1, "expected 0, the only one"), (3, 3, "expected 0 to 2"), (3, 99, "expected 0 to 2")],
)
def test_a_device_that_does_not_exist_is_refused(monkeypatch, n_devices, device, expected):
    set_cupy(monkeypatch, FakeCupy(n_devices=n_devices))
    for name in ("auto", "cupy"):
        message = refused(name, device)
        assert message.startswith(f"device {device} cannot be used (there is no such GPU): ")
        assert expected in message


@pytest.mark.parametrize("device", [-1, "0", 1.0, True])
def test_a_device_that_is_no_number_is_refused(device):
    with pytest.raises(BackendError, match=f"device is {device!r}: expected a GPU's number"):
        get_backend("auto", device=device)


def test_a_device_is_not_for_numpy(capsys):
    with pytest.raises(BackendError, match="device is 1, the number of a GPU, but backend numpy"):
        npllama.load(backend="numpy", device=1)
    assert main(["--prompt", "a", "--backend", "numpy", "--device", "1"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


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
    assert len(lines) == 1 and "GPU" in lines[0] and "--backend numpy" in lines[0]


# -- the driver


def fake_library(init=0, count=0, error=0, version=12040):
    def write(value, error):
        def call(pointer):
            pointer._obj.value = value
            return error

        return call

    return SimpleNamespace(
        cuInit=lambda _flags: init,
        cuDeviceGetCount=write(count, error),
        cuDriverGetVersion=write(version, 0),
    )


@pytest.mark.parametrize(
    ("library", "devices", "found"),
    [
        (fake_library(count=3), 3, ""),
        (fake_library(), 0, "no CUDA device"),
        (fake_library(init=100, count=3), 0, "no CUDA device"),  # CUDA_ERROR_NO_DEVICE
        (fake_library(init=803), 0, "the NVIDIA driver does not start (CUDA error 803)"),
        (fake_library(count=3, error=3), 0, "the NVIDIA driver does not start (CUDA error 3)"),
    ],
)
@pytest.mark.parametrize("name", ["libcuda.so.1", "libcuda.so", "nvcuda.dll"])
def test_devices_are_those_that_the_driver_counts(monkeypatch, library, devices, found, name):
    def load(asked):
        if asked != name:
            raise OSError(f"{asked}: cannot open shared object file")
        return library

    monkeypatch.setattr(cuda_device.ctypes, "CDLL", load)
    driver = cuda_driver()
    assert (driver.n_devices, driver.version, driver.found) == (devices, (12, 4), found)
    assert cuda_device_count() == devices
    assert bool(driver.remedy) == bool(found)


def test_devices_that_a_variable_hides_are_told(monkeypatch):
    monkeypatch.setattr(cuda_device, "driver_library", lambda: fake_library(init=100))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in cuda_driver().remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES is '7' and hides the others, unset it" in cuda_driver().remedy


def test_without_a_driver_there_are_no_devices(monkeypatch):
    def load(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(cuda_device.ctypes, "CDLL", load)
    assert cuda_device_count() == 0
    assert cuda_driver().found == "no NVIDIA driver" and "libcuda.so.1" in cuda_driver().remedy


# -- memory


def test_free_gpu_memory_is_the_devices_and_what_the_pool_holds_unused():
    pool = SimpleNamespace(free_bytes=lambda: 5, total_bytes=lambda: 50)
    device = SimpleNamespace(id=0, mem_info=(100, 1000), use=lambda: None)
    cuda = SimpleNamespace(Device=lambda number=None: device)
    cupy = CupyBackend(SimpleNamespace(cuda=cuda, get_default_memory_pool=lambda: pool))
    assert cupy.free_bytes() == 105 and cupy.peak_bytes() == 50
    assert cupy.memory_name() == "GPU memory"


def test_arrays_go_to_the_backend_and_come_back_the_same(ops, to_device, to_host, rng):
    array = rng.random((3, 5), dtype="float32")
    there = to_device(array)
    back = to_host(there * 2)
    assert isinstance(back, np.ndarray) and np.array_equal(back, array * 2)
    assert to_device(there) is there


# -- all programs


def test_every_program_takes_a_device(monkeypatch, tmp_path, capsys):
    set_driver(monkeypatch, Driver(found="no NVIDIA driver", remedy="install it"))
    text, config = tmp_path / "text", tmp_path / "config.json"
    text.write_text("The quick brown fox jumps over the lazy dog.\n<|endoftext|>\n" * 9)
    config.write_text(json.dumps(LlamaConfig(24, 1, 2, 2, 12, 300, 16).to_hf()))
    new = ["--text", str(text), "--config", str(config), "--batch", "4"]
    new += ["--out", str(tmp_path / "run")]
    for program, arguments in {
        main: ["--prompt", "a"],
        benchmark.main: ["--shape", "15m"],
        perplexity.main: ["--text", str(text)],
        train.main: new,
    }.items():
        assert program([*arguments, "--device", "3"]) == 2
        assert "error: device 3 cannot be used (no NVIDIA driver): " in capsys.readouterr().err
