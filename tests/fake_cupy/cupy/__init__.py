"""A package named cupy for programs under test on machines without a GPU.

PYTHONPATH must contain the parent folder. Its sitecustomize.py provides the matching CUDA driver.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.append(str(Path(__file__).parent.parent.parent))

import numpy as np

from strict_array import API, StrictArray
from strict_cupy import DEVICE, StrictCupy

__version__ = API["version"]
_MODULE = StrictCupy(DEVICE)
_CUDA = 13000  # version 13.0


def __getattr__(name: str) -> object:
    return getattr(_MODULE, name)


def asarray(array: object) -> StrictArray:
    """Copy a NumPy array to the device."""
    return array if isinstance(array, StrictArray) else DEVICE.upload(array)


def asnumpy(array: StrictArray) -> np.ndarray:
    """Copy a device array to the host."""
    if not isinstance(array, StrictArray):
        raise TypeError(f"asnumpy was given a {type(array).__name__}: expected a device array")
    return DEVICE.download(array.array)


_OF_THE_MACHINE = {
    "getDeviceProperties": lambda number: {"name": b"CuPy for tests"},
    "getDeviceCount": lambda: 1,
    "driverGetVersion": lambda: _CUDA,
    "runtimeGetVersion": lambda: _CUDA,
}
_LIBRARIES = {
    "nvrtc": SimpleNamespace(getVersion=lambda: (13, 0)),
    "cublas": SimpleNamespace(),
}
cuda = SimpleNamespace(**(_LIBRARIES | vars(_MODULE.cuda)))
cuda.runtime = SimpleNamespace(**(vars(_MODULE.cuda.runtime) | _OF_THE_MACHINE))
