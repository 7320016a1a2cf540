"""A CUDA driver with one device, for a machine that has none: what asks for it by ctypes finds it.

Python imports this at its start where the folder is on PYTHONPATH.
"""

import ctypes


class _Driver:
    """The calls that npllama asks the driver's library for."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = 1
        return 0

    def cuDriverGetVersion(self, version: object) -> int:
        version._obj.value = 13000
        return 0


class _CDLL(ctypes.CDLL):
    def __new__(cls, name: str | None = None, *args: object, **settings: object) -> object:
        return _Driver() if name == "libcuda.so.1" else super().__new__(cls)


ctypes.CDLL = _CDLL
