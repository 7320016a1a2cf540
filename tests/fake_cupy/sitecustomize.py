"""Replaces the CUDA driver library in ctypes by a driver with one device.

Python imports this module at startup if PYTHONPATH contains its folder.
"""

import ctypes


class _Driver:
    """The functions of the driver library that npllama calls."""

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
