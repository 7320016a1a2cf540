"""Describes the machine on which the figures were measured."""

import os
import platform
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

from npllama.backend import Backend
from npllama.operating_system import processor_name


def machine(backend: Backend) -> dict[str, Any]:
    """Device, processor, cores, BLAS and its number of threads, and versions."""
    blas = _blas()
    return {
        "device": backend.device_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": n_threads(),
        "blas": None if blas is None else f"{blas['internal_api']} {blas['version']}",
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def n_threads() -> int:
    """Number of threads that NumPy's BLAS uses now; 1 if BLAS does not report it."""
    blas = _blas()
    return 1 if blas is None else blas["num_threads"]


def _blas() -> dict[str, Any] | None:
    found = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return found[0] if found else None
