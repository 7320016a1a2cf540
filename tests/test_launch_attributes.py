"""The launch of a kernel that may start early, which calls the driver directly and not through
CuPy."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest

from npllama.errors import exhausted
from npllama.ops.cuda import kernels
from npllama.ops.cuda.kernels import Kernels, _Attribute, _Config, instance


class FakeDriver:
    """A cuLaunchKernelEx that reads its arguments in the same way as the driver."""

    def __init__(self, sizes, error=0):
        self.sizes, self.error, self.launched = sizes, error, []

    def cuLaunchKernelEx(self, config, function, pointers, extra):
        config = config._obj
        attributes = config.attributes[: config.n_attributes]
        values = [ctypes.string_at(p, size) for p, size in zip(pointers, self.sizes, strict=True)]
        self.launched.append(
            {
                "grid": tuple(config.grid),
                "block": tuple(config.block),
                "shared": config.shared,
                "stream": config.stream,
                "attributes": [(a.id, a.value) for a in attributes],
                "function": function.value,
                "values": values,
                "extra": extra,
            }
        )
        return self.error

    def cuGetErrorName(self, error, name):
        name._obj.value = b"CUDA_ERROR_OUT_OF_MEMORY"


@pytest.fixture
def on(monkeypatch):
    """A function that returns Kernels for a compute capability and a driver."""

    def make(driver, capability="90"):
        called = []

        class Kernel:
            kernel, max_dynamic_shared_size_bytes = SimpleNamespace(ptr=4242), 48 * 1024

            def __call__(self, *arguments, **options):
                called.append((arguments, options))

        device = SimpleNamespace(compute_capability=capability)
        cuda = SimpleNamespace(
            Device=lambda: device, get_current_stream=lambda: SimpleNamespace(ptr=77)
        )
        it = Kernels(SimpleNamespace(xp=SimpleNamespace(cuda=cuda)))
        monkeypatch.setattr(kernels, "driver_library", lambda: driver)
        monkeypatch.setattr(it, "_kernel", lambda *_: Kernel())
        return it, called

    return make


ARRAY = SimpleNamespace(data=SimpleNamespace(ptr=2**40 + 8))
ARGUMENTS = (ARRAY, None, 7, 0.5, np.float64(0.25), np.int64(2**40))


def test_the_driver_is_given_what_cupy_would_give_and_leave_to_start_early(on):
    driver = FakeDriver([8, 8, 4, 4, 8, 8])
    it, called = on(driver)
    it.launch("gemv", "gemv<float>", (3,), (64, 2), ARGUMENTS, shared=1024)
    assert not called
    (launch,) = driver.launched
    assert (launch["grid"], launch["block"]) == ((3, 1, 1), (64, 2, 1))
    assert (launch["shared"], launch["stream"], launch["function"]) == (1024, 77, 4242)
    assert launch["attributes"] == [(6, 1)] and launch["extra"] is None
    types = ("uint64", "uint64", "int32", "float32", "float64", "int64")
    pairs = zip(launch["values"], types, strict=True)
    values = [np.frombuffer(value, type_)[0] for value, type_ in pairs]
    assert values == [2**40 + 8, 0, 7, 0.5, 0.25, 2**40]


def test_the_structures_have_the_sizes_of_cudas_header():
    assert (ctypes.sizeof(_Attribute), ctypes.sizeof(_Config)) == (72, 56)


@pytest.mark.parametrize(("driver", "capability"), [(None, "90"), (FakeDriver([]), "80")])
def test_without_a_driver_or_on_an_older_device_cupy_launches(on, driver, capability):
    it, called = on(driver, capability)
    it.launch("gemv", "gemv<float>", (3,), (64,), (7, None, 0.5))
    (((grid, block, values), options),) = called
    assert (grid, block, values, options) == ((3,), (64,), (7, None, 0.5), {"shared_mem": 0})
    assert [type(value) for value in values] == [np.int32, type(None), np.float32]


def test_an_error_of_the_driver_is_named(on):
    it, _ = on(FakeDriver([4], error=2))
    with pytest.raises(RuntimeError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(2\)") as caught:
        it.launch("gemv", "gemv<float>", (3,), (64,), (7,))
    assert exhausted(caught.value) == "GPU memory"


def test_an_instance_is_named_as_cpp_writes_it():
    name = instance("gemv", "int8", np.dtype("float64"), 448, True, False)
    assert name == "gemv<signed char, double, 448, true, false>"
