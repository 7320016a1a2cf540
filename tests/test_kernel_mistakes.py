"""Seeds mistakes in the kernels, one change each. The simulator or a wrong result must detect each
one.

For npllama/ops/kernels/FILE.cu, tests/kernel_mistakes/FILE.py contains a list of mistakes

    MISTAKES = [
        ("the barrier before the sums are read", "  __syncthreads();  // sums\n", ""),
        ("one column too many", "c < n_chunks", "c <= n_chunks"),
    ]

with (name, text before, text after), where `text before` occurs exactly once in common.cu +
FILE.cu. It also contains a function

    def run(launcher):
        w = launcher.to_device(np.ones((4, 64), "float32"))
        y = launcher.xp.empty((4,), "float32")
        launcher.launch("gemv", "gemv<float, 1>", (4,), (32,), (w, y, 64))
        assert np.allclose(launcher.to_host(y), 64)

which runs few launches that detect all mistakes. The kernels are compiled again for each mistake,
so `run` should use few template instances. `launcher` is a Kernels object, which can also be passed
to the functions of npllama.ops.cuda. A KernelError or an AssertionError detects a mistake. `run` is
called with three thread orders, and must succeed in all of them on the unchanged source. If a
module has no .cu file with kernels, it defines the kernels in SOURCE.
"""

import importlib
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from cuda_simulator import ORDERS, KernelError, compiler
from npllama.ops.cuda.kernels import SOURCES, Kernels
from strict_cupy import DEVICE, StrictCupyBackend

FILES = sorted(path.stem for path in SOURCES.glob("*.cu"))
MODULES = sorted(p.stem for p in (Path(__file__).parent / "kernel_mistakes").glob("[!_]*.py"))
FEWEST = 10

pytestmark = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


class Launcher(Kernels):
    """Kernels with one text of their source replaced."""

    def __init__(self, module, before="", after=""):
        super().__init__(StrictCupyBackend())
        self.to_device, self.to_host = self.backend.to_device, self.backend.to_host
        self._own, self._before, self._after = getattr(module, "SOURCE", ""), before, after

    def source(self, file):
        if self._own:
            common = f'#line 1 "common.cu"\n{(SOURCES / "common.cu").read_text()}'
            text = f'{common}#line 1 "{file}.cu"\n{self._own}'
        else:
            text = super().source(file)
        if not self._before:
            return text
        assert self._before != self._after
        n = text.count(self._before)
        if n != 1:
            raise LookupError(f"{self._before!r} occurs {n} times in {file}.cu, expected once")
        return text.replace(self._before, self._after)


def load(name):
    return importlib.import_module(f"kernel_mistakes.{name}")


def find(name, number):
    """The first error that detects a mistake in any thread order; None if there is none."""
    module = load(name)
    _, before, after = module.MISTAKES[number]
    launcher = Launcher(module, before, after)
    for order in ORDERS:
        try:
            with DEVICE.thread_order(order):
                module.run(launcher)
        except (KernelError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
    return None


def find_all(names):
    """For each module, what `find` returns for each of its mistakes. Two worker processes search,
    so that a crash or an endless loop ends only a worker."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        finds = {
            name: [workers.submit(find, name, i) for i in range(len(load(name).MISTAKES))]
            for name in names
        }
        return {name: [one.result() for one in those] for name, those in finds.items()}


def work_arguments(items):
    """The modules whose tests are selected, for this file as a program. See work_ahead.py."""
    judged = [item for item in items if item.function is test_every_mistake_is_found]
    return [item.callspec.params["name"] for item in judged] if compiler() else []


@pytest.fixture(scope="module")
def errors(work_ahead):
    """The first error that detects each mistake, by module."""
    return work_ahead.result(sys.modules[__name__])


@pytest.mark.parametrize("name", MODULES)
def test_every_mistake_is_found(name, errors):
    module = load(name)
    for order in ORDERS:
        with DEVICE.thread_order(order):
            module.run(Launcher(module))
    names = [mistake[0] for mistake in module.MISTAKES]
    for mistake, error in zip(names, errors[name], strict=True):
        print(f"{mistake}: {error}")
    assert not [mistake for mistake, error in zip(names, errors[name], strict=True) if not error]


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_mistakes(name):
    assert name in MODULES
    assert len({mistake[1:] for mistake in load(name).MISTAKES}) >= FEWEST


if __name__ == "__main__":
    print(json.dumps(find_all(sys.argv[1:])))
