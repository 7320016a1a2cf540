"""`import cupy` without a GPU: the strict arrays, and the few of CuPy's calls that are about the
device. With the folder above on PYTHONPATH, programs take it for CuPy."""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent.parent))

import numpy as np

from strict_array import API, StrictArray, StrictModule

__version__ = API["version"]
_MODULE = StrictModule()
_FREE = 2 * 10**9


def __getattr__(name: str) -> object:
    return getattr(_MODULE, name)


def asarray(array: object) -> StrictArray:
    """A copy of a NumPy array on the device."""
    return array if isinstance(array, StrictArray) else StrictArray(np.array(array))


def asnumpy(array: StrictArray) -> np.ndarray:
    """A copy of a device array on the host."""
    if not isinstance(array, StrictArray):
        raise TypeError(f"asnumpy was given a {type(array).__name__}: expected a device array")
    return array.array.copy()


def get_default_memory_pool() -> SimpleNamespace:
    return SimpleNamespace(
        free_bytes=lambda: 0, total_bytes=lambda: 0, free_all_blocks=lambda: None
    )


def _device() -> SimpleNamespace:
    return SimpleNamespace(
        id=0,
        mem_info=(_FREE, _FREE),
        compute_capability="80",
        attributes={"MultiProcessorCount": 4},
        synchronize=lambda: None,
    )


cuda = SimpleNamespace(
    Device=_device,
    get_current_stream=lambda: SimpleNamespace(synchronize=lambda: None, ptr=0),
    runtime=SimpleNamespace(
        getDeviceProperties=lambda _id: {"name": b"CuPy for tests"},
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    ),
)
