"""Compiles kernels for the simulator before the tests need them: those of small models.

A program that work_ahead.py starts. The kernels of other shapes are compiled by their tests.
"""

import contextlib
from dataclasses import replace

from conftest import TINY
from cuda_simulator import MAX_SHARED, CompilationError, Module
from kernel_launches import MODELS, Gpu, launches
from npllama.ops.cuda.kernels import Kernels
from npllama.weight_formats import FORMATS
from strict_cupy import DEVICE, StrictCupyBackend
from test_capture import ON_KERNELS

ROWS = (3, 1, 2, 8)  # the kernels' template arguments depend on the number of rows
GPU = Gpu("sm_80", "80", DEVICE.n_sms, MAX_SHARED)


def kernels() -> list[tuple[str, str]]:
    """The file and the name of each kernel, in about the order in which the tests need them."""
    found = {}  # a set in the order of insertion
    for config in (ON_KERNELS, TINY, MODELS["stories"]):
        for dtype in FORMATS:
            for n_rows in ROWS:
                launched = launches(GPU, n_rows, [replace(config, n_layers=1)], [dtype])
                found |= dict.fromkeys(sorted((each.file, each.name) for each in launched))
    return list(found)


if __name__ == "__main__":
    source = Kernels(StrictCupyBackend()).source
    for file, name in kernels():
        with contextlib.suppress(CompilationError):  # the tests that launch it report the error
            Module(source(file), (name,))
