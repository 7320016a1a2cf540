"""Queries the CUDA driver through its library, without CuPy or the CUDA toolkit."""

import ctypes
import os
from dataclasses import dataclass

LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine.

    Attributes:
        n_devices: number of usable devices.
        version: the newest CUDA version that the driver supports, such as (12, 4).
        found: why there is no device, in a few words; "" if there is one.
        remedy: what was expected instead, and what to do.
    """

    n_devices: int = 0
    version: tuple[int, int] = (0, 0)
    found: str = ""
    remedy: str = ""


def cuda_driver() -> Driver:
    """Query the driver for its version and devices."""
    library = driver_library()
    if library is None:
        return Driver(
            found="no NVIDIA driver",
            remedy="expected an NVIDIA GPU and its driver, whose library is libcuda.so.1; "
            "install the driver",
        )
    error, count, version = library.cuInit(0), ctypes.c_int(0), ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(version))
    supported = cuda_version(version.value)
    if error == 0:
        error = library.cuDeviceGetCount(ctypes.byref(count))
    if error == 0 and count.value > 0:
        return Driver(count.value, supported)
    if error not in (0, _NO_DEVICE):
        return Driver(
            version=supported,
            found=f"the NVIDIA driver does not start (CUDA error {error})",
            remedy="expected nvidia-smi to list a GPU; restart the machine if the driver was "
            "updated, or reinstall the driver",
        )
    remedy = "expected a GPU that nvidia-smi lists"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        remedy += f"; CUDA_VISIBLE_DEVICES is {hidden!r} and hides the others, unset it"
    return Driver(version=supported, found="no CUDA device", remedy=remedy)


def cuda_device_count() -> int:
    """Number of CUDA devices that the driver reports; 0 without a driver."""
    return cuda_driver().n_devices


def cuda_version(number: int) -> tuple[int, int]:
    """Decode CUDA's version numbers: 12040 is version 12.4."""
    return number // 1000, number % 1000 // 10


def driver_library() -> ctypes.CDLL | None:
    """The driver's library; None if it is not installed."""
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
