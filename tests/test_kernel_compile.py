"""Compiles the kernels for sm_80 and sm_90 with CuPy's options, and checks their use of resources.

The kernels and their template arguments are those that real models launch.
"""

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

import nvrtc
from conftest import needed
from kernel_launches import A100, GPUS, H100, REGISTERS, Gpu, Launch, few, launches
from npllama.ops.cuda.kernels import SOURCES

COMMON = (SOURCES / "common.cu").read_text()
FILES = {path.stem: path.read_text() for path in SOURCES.glob("*.cu") if path.stem != "common"}
AT_ONCE = 8
"""Kernels per call of the compiler. Each call reads CUDA's headers again."""
MOST = 130
"""The most template instances to compile in total, which limits the time of this test."""

# the comment above a kernel, its template, attributes and name
_KERNEL = re.compile(
    r"(?P<comment>(?:^//[^\n]*\n)*)"
    r"^(?:template\s*<[^{};]*?>\s*|extern\s+\"C\"\s*)*"
    r"__global__\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)|void|\s)+(?P<name>\w+)\s*\(",
    re.M,
)


def register_limits(source: str) -> dict[str, int | None]:
    """The limit N of each kernel from a line "// registers: at most N" above it, or None."""
    limits = {}
    for match in _KERNEL.finditer(source):
        limit = re.search(r"^// registers: at most (\d+)\b", match["comment"], re.M)
        limits[match["name"]] = int(limit[1]) if limit else None
    return limits


def problems(gpu: Gpu, file: str, source: str, run: Iterable[Launch]) -> list[str]:
    """The problems of the kernels of one file, compiled for a GPU, one line each."""
    run = sorted(run, key=lambda launch: launch.name)
    names = sorted({launch.name for launch in run})
    loads_wide = file.startswith("gemv")  # these kernels are as fast as their loads
    compiled = nvrtc.compile_kernels(COMMON + source, names, gpu.arch, disassemble=loads_wide)
    limits = register_limits(source)
    found = []
    for name, kernel in compiled.items():
        limit = limits[name.partition("<")[0]]
        if kernel.spills:
            found.append(f"{name} spills {kernel.spills} bytes of registers")
        elif kernel.stack:
            found.append(f"{name} keeps {kernel.stack} bytes of a thread in local memory")
        if limit is None:
            found.append(f'{name} has no line "// registers: at most N" in the comment above it')
        elif kernel.registers > limit:
            found.append(f"{name} takes {kernel.registers} registers: at most {limit} are allowed")
        if loads_wide and not any(
            re.match(r"LDG(STS)?\b.*\.128", instruction) for instruction in kernel.instructions
        ):
            found.append(f"{name} has no load of 16 bytes from global memory")
    for launch in run:
        kernel = compiled[launch.name]
        registers = -(-kernel.registers // 8) * 8 * launch.n_threads  # in multiples of 8
        if registers > REGISTERS:
            found.append(f"{launch.name}: {launch.n_threads} threads take {registers} registers")
        shared = launch.shared + kernel.shared
        if shared > gpu.shared_limit:
            found.append(f"{launch.name}: {shared} bytes of shared memory in a block")
    return [f"{file}.cu, {gpu.arch}: {line}" for line in found]


@pytest.fixture(scope="module")
def compiler():
    needed(nvrtc.missing())


def launches_by_file():
    """The launches of real models, by (GPU, rows) and then by file."""
    by_file = {(gpu, n_rows): defaultdict(set) for n_rows in (8, 1) for gpu in GPUS}
    for (gpu, n_rows), launched in by_file.items():
        for launch in launches(gpu, n_rows):
            launched[launch.file].add(launch)
    return by_file


@pytest.fixture(scope="module")
def all_launches():
    return launches_by_file()


# -- the project's kernels


def all_problems(chosen: dict[tuple[Gpu, str], set[str]], all_launches) -> list[str]:
    """The problems of the chosen kernels. They are compiled in small groups, because compilation is
    slow."""
    run = defaultdict(set)
    for (gpu, _), launched in all_launches.items():
        for file, those in launched.items():
            run[gpu, file] |= those
    jobs = []
    for (gpu, file), names in chosen.items():
        for begin in range(0, len(names), AT_ONCE):
            some = sorted(names)[begin : begin + AT_ONCE]
            launched = {launch for launch in run[gpu, file] if launch.name in some}
            jobs.append((gpu, file, FILES[file], launched))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for lines in pool.map(lambda job: problems(*job), jobs) for line in lines]


def chosen_few(all_launches) -> dict[tuple[Gpu, str], set[str]]:
    """The kernels to compile: for one row, every pair of a dtype and another template argument; for
    eight rows, which take long to compile, every template argument."""
    names = defaultdict(set)
    for (gpu, n_rows), launched in all_launches.items():
        for file, those in launched.items():
            names[gpu, file] |= few(those, with_first=n_rows == 1)
    return names


@pytest.mark.usefixtures("compiler")
def test_kernels_stay_in_registers_and_within_their_limits(all_launches, work_ahead):
    chosen = chosen_few(all_launches)
    assert sum(map(len, chosen.values())) <= MOST
    result = work_ahead.result(sys.modules[__name__])
    assert result["compiled"] == sorted(name for names in chosen.values() for name in names)
    assert not result["problems"], "\n".join(result["problems"])


def work_arguments(items):
    """The argument of this file as a program, if its work is needed. See work_ahead.py."""
    judge = test_kernels_stay_in_registers_and_within_their_limits
    needed = any(item.function is judge for item in items) and not nvrtc.missing()
    return ["few"] if needed else []


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_all_kernels_stay_in_registers_and_within_their_limits(all_launches):
    chosen = defaultdict(set)
    for (gpu, _), launched in all_launches.items():
        for file, those in launched.items():
            chosen[gpu, file] |= {launch.name for launch in those}
    found = all_problems(chosen, all_launches)
    assert not found, "\n".join(found)


def test_every_kernel_is_launched_by_a_real_model(all_launches):
    """Kernels that no model launches would not be compiled by these tests."""
    for gpu in GPUS:
        by_file = defaultdict(set)
        for n_rows in (1, 8):
            for file, those in all_launches[gpu, n_rows].items():
                by_file[file] |= {launch.name.partition("<")[0] for launch in those}
        assert by_file == {file: set(register_limits(text)) for file, text in FILES.items()}


def test_every_kernel_is_found_in_its_file():
    for file, source in FILES.items():
        code = re.sub(r"//[^\n]*", "", source)
        assert len(register_limits(source)) == code.count("__global__"), file


# -- the checks find problems


GOOD = """
// y = sum of all x.
// registers: at most 40
template <typename T>
__global__ void __launch_bounds__(32) sums(const uint4* x, float* y) {
  float numbers[16 / sizeof(T)];
  unpack<T>(__ldcs(x + threadIdx.x), numbers);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < (int)(16 / sizeof(T)); i++) sum += numbers[i];
  y[threadIdx.x] = warp_sum(sum);
}
"""
SPILLING = """
// registers: at most 32
__global__ void __launch_bounds__(1024, 2) sums(const float* x, float* y) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; i++) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; i++) y[i * 1024 + threadIdx.x] = kept[i] * kept[127 - i];
}
"""
INDEXED = """
// registers: at most 64
__global__ void sums(const float* x, const int* at, float* y) {
  float kept[32];
  for (int i = 0; i < 32; i++) kept[at[i]] = x[i];
  y[threadIdx.x] = kept[at[threadIdx.x]];
}
"""
NARROW = """
// registers: at most 64
__global__ void sums(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
"""
SHARED = """
// registers: at most 64
__global__ void sums(const float* x, float* y) {
  __shared__ float kept[1024];
  kept[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = kept[1023 - threadIdx.x];
}
"""


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("file", "source", "name", "expected"),
    [
        ("gemv", GOOD, "sums<__half>", None),
        ("gemv", GOOD.replace("most 40", "most 4"), "sums<__half>", r"\d+ registers: at most 4 "),
        ("gemv", GOOD.replace("// reg", "// Reg"), "sums<float>", 'no line "// registers'),
        ("other", SPILLING, "sums", r"spills \d+ bytes"),
        ("other", INDEXED, "sums", r"keeps 128 bytes of a thread in local memory"),
        ("gemv", NARROW, "sums", "no load of 16 bytes"),
        ("other", NARROW, "sums", None),
    ],
)
def test_a_fault_of_a_kernel_is_found(file, source, name, expected):
    found = problems(A100, file, source, {Launch(file, name, 32, 0)})
    if expected is None:
        assert not found
    else:
        (line,) = found
        assert line.startswith(f"{file}.cu, sm_80: {name} ") and re.search(expected, line)


@pytest.mark.usefixtures("compiler")
def test_a_block_that_no_multiprocessor_has_room_for_is_found():
    for gpu in GPUS:
        room = gpu.shared_limit - 4096
        assert not problems(gpu, "other", SHARED, {Launch("other", "sums", 1024, room)})
        (line,) = problems(gpu, "other", SHARED, {Launch("other", "sums", 1024, room + 16)})
        assert f"{gpu.shared_limit + 16} bytes of shared memory" in line
    (line,) = problems(H100, "other", SHARED, {Launch("other", "sums", 65_536, 0)})
    assert "65536 threads take" in line


@pytest.mark.usefixtures("compiler")
def test_a_source_that_does_not_compile_is_an_error_with_the_compilers_words():
    with pytest.raises(nvrtc.CompilationError, match=r"kernel\.cu\(\d+\): error"):
        problems(H100, "gemv", "__global__ void k() { no; }", {Launch("gemv", "k", 1, 0)})


def test_the_limit_stands_in_the_comment_directly_above_its_kernel():
    source = """
// registers: at most 7

// a comment of its own
__global__ void none(int a);
// registers: at most 12 of 255
extern "C" __global__ void __launch_bounds__(32 * (2 + 1), 2)
one(int a);
// registers: at most 96
template <typename T, int N = (1 < 2)>
__global__ void
    two(T* a);
"""
    assert register_limits(source) == {"none": None, "one": 12, "two": 96}


def test_launches_of_real_models_are_noted(monkeypatch):
    """A replacement for `head` records the real weights, rows and GPU. Nothing is computed."""
    from npllama.ops import cupy_ops

    def head(self, x, head):
        w = head.lm_head
        n_rows, width = x.shape[0], w.shape[1]
        self.kernels.launch("f", f"k<{w.format.name}, {n_rows}>", (1,), (4, 8), (), width)
        return cupy_ops.Ops.head(self, x, head)

    monkeypatch.setattr(cupy_ops.CupyOps, "head", head)
    noted = {launch for n in (1, 8) for launch in launches(H100, n) if launch.file == "f"}
    assert Launch("f", "k<int8, 8>", 32, 8192) in noted  # 34B, 70B
    assert Launch("f", "k<bfloat16, 1>", 32, 192) in noted  # the shipped model
    assert len(noted) == 4 * 2 * 6  # dtypes, row counts, widths


def test_the_few_have_every_argument_and_the_largest_blocks():
    values = [(t, n, threads) for t in ("a", "b") for n in (1, 2) for threads in (32, 64)]
    launched = {Launch("f", f"k<{t}, {n}, {threads}>", threads, 0) for t, n, threads in values}
    assert few(launched, with_first=True) == {
        "k<a, 1, 32>", "k<a, 2, 64>", "k<b, 1, 32>", "k<b, 2, 64>"
    }  # fmt: skip
    assert few(launched, with_first=False) == {"k<a, 1, 32>", "k<b, 2, 64>"}
    assert few({Launch("f", "k", 32, 0)}, with_first=True) == {"k"}


if __name__ == "__main__":
    _launches = launches_by_file()
    _chosen = chosen_few(_launches)
    _compiled = sorted(name for names in _chosen.values() for name in names)
    print(json.dumps({"compiled": _compiled, "problems": all_problems(_chosen, _launches)}))
