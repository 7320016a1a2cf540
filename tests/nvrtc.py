"""Compiles kernels with NVRTC, and disassembles them with nvdisasm, on a machine without a GPU.

Both programs are pip packages. The compiler options are those of CuPy 14. The compiler reports
registers, spills and shared memory of each kernel, and the disassembler lists its instructions.
"""

import atexit
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture.

    Attributes:
        registers: registers per thread.
        stack: bytes of local memory per thread, for example for arrays with run-time indices.
        spills: bytes of register spills, stores and loads together.
        shared: bytes of static shared memory.
        instructions: the distinct names of its instructions, such as "LDG.E.128".
    """

    registers: int
    stack: int
    spills: int
    shared: int
    instructions: frozenset[str]


class CompilationError(Exception):
    """The error messages of the compiler."""


def installed(package: str, name: str) -> Path | None:
    """The file of an installed package whose name matches a regular expression; None if there is
    none."""
    try:
        files = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if re.fullmatch(name, file.name))
    return next(found, None)


def missing() -> str | None:
    """What is missing, and the command that installs it; None if everything is installed."""
    packages = {"nvidia-cuda-nvrtc": r"libnvrtc\.so\.\d+", "nvidia-cuda-nvdisasm": "nvdisasm"}
    for package, name in packages.items():
        if installed(package, name) is None:
            return f"{package} is not installed: pip install -e '.[kernels]'"
    return None


def compile_kernels(
    code: str, names: Collection[str], arch: str, disassemble: bool = True
) -> dict[str, Compiled]:
    """Compile kernels in the same way as CuPy's RawModule.

    Args:
        names: the names of the kernels, with template arguments.
        arch: the architecture, such as "sm_90".
        disassemble: whether to list the instructions, which takes as long as compiling small
            kernels. If not, there are none.

    Raises:
        CompilationError: the source has an error, or does not contain one of the kernels.
    """
    cubin, lowered, log = _compiler().compile(code, names, arch)
    instructions = _instructions(cubin) if disassemble else defaultdict(set)
    reports = {match["name"]: match for match in _REPORT.finditer(log)}
    compiled = {}
    for name in names:
        report = reports[lowered[name]]
        shared = re.search(r"(\d+) bytes smem", report["rest"])
        compiled[name] = Compiled(
            registers=int(report["registers"]),
            stack=int(report["stack"]),
            spills=int(report["stores"]) + int(report["loads"]),
            shared=int(shared[1]) if shared else 0,
            instructions=frozenset(instructions[lowered[name]]),
        )
    return compiled


class _Compiler:
    """The functions of libnvrtc that compile a source."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        self._headers = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, self._headers)
        self._call("nvrtcInstallBundledHeaders", self._headers.encode(), 0, None)

    def compile(
        self, code: str, names: Iterable[str], arch: str
    ) -> tuple[bytes, dict[str, str], str]:
        """Compile, and return the machine code, the mangled name of each kernel, and the report."""
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), code.encode(), b"kernel.cu", 0, None, None
        )
        try:
            for name in names:
                self._call("nvrtcAddNameExpression", program, name.encode())
            options = [
                "--std=c++17",
                "-ftz=true",
                "--device-as-default-execution-space",
                f"-arch={arch}",
                f"-I{self._headers}",
                "--ptxas-options=-v",  # writes the report; CuPy does not use this option
            ]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            failed = self._library.nvrtcCompileProgram(program, len(options), array)
            log = self._bytes(program, "ProgramLog").decode().rstrip("\0")
            if failed:
                raise CompilationError(log)
            lowered = {name: self._lowered(program, name) for name in names}
            return self._bytes(program, "CUBIN"), lowered, log
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, name: str) -> str:
        text = ctypes.c_char_p()
        self._call("nvrtcGetLoweredName", program, name.encode(), ctypes.byref(text))
        return text.value.decode()

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        n = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(n))
        content = ctypes.create_string_buffer(n.value)
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw

    def _call(self, function: str, *arguments: object) -> None:
        error = getattr(self._library, function)(*arguments)
        if error:
            text = self._library.nvrtcGetErrorString(error).decode()
            raise CompilationError(f"{function}: {text}")


@functools.cache
def _compiler() -> _Compiler:
    return _Compiler(installed("nvidia-cuda-nvrtc", r"libnvrtc\.so\.\d+"))


def _instructions(cubin: bytes) -> dict[str, set[str]]:
    """The instructions in the machine code, by mangled kernel name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [installed("nvidia-cuda-nvdisasm", "nvdisasm"), "-c", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(_by_kernel(done.stdout))


def _by_kernel(listing: str) -> Iterator[tuple[str, set[str]]]:
    parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.M)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        yield name, set(_INSTRUCTION.findall(text))
