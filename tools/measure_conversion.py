"""Compare a conversion with a plain copy of the same files: MB/s, and peak memory.

    python tools/make_synthetic_meta.py 7B /data/7B
    python tools/measure_conversion.py /data/7B /data [--dtype int8]

Each is timed until its bytes are on the disk, and removed again. The copy goes first, and reads
the source into the machine's memory if it fits; with --repeat 2 the second line has both read it
from there. This program imports no more than convert.py: a process counts its parent's peak as its
own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, exit_code, named_path, say
from npllama.console import open_streams
from npllama.errors import InputError

CONVERT = Path(__file__).with_name("convert.py")
KIB = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there


def copy(source: Path, folder: Path) -> tuple[float, int]:
    """(seconds, bytes) of copying the weights of `source`, a file or a directory."""
    n_bytes = 0
    began = time.perf_counter()
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        if not path.is_file():
            continue
        shutil.copyfile(path, folder / path.name)
        with open(folder / path.name, "rb+") as file:
            os.fsync(file.fileno())
            n_bytes += file.seek(0, 2)
    return time.perf_counter() - began, n_bytes


def convert(source: Path, dest: Path, options: list[str]) -> tuple[float, int]:
    """(seconds, peak bytes) of a conversion, which waits for the disk by itself.

    Raises:
        SystemExit: it failed, and has said why.
    """
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, CONVERT, source, dest, *options])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that it is not waited for again
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - began, usage.ru_maxrss * KIB


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line names; the exit code."""
    open_streams()
    p = Parser("measure_conversion", __doc__.split("\n")[0])
    p.add_argument("source", type=named_path, help="what tools/convert.py takes")
    p.add_argument("folder", type=named_path, help="where to write, on the disk to be measured")
    p.add_argument("--dtype", help="of convert.py; as stored unless given")
    p.add_argument("--repeat", type=int, default=1, metavar="N", help="times (default: 1)")
    args = p.parse_args(argv)
    return exit_code("measure_conversion", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> None:
    if not args.source.exists():
        raise InputError(f"{args.source} does not exist: expected a checkpoint")
    if not args.folder.is_dir():
        raise InputError(f"{args.folder} is no directory: expected one")
    if args.repeat < 1:
        raise InputError(f"--repeat is {args.repeat}: expected at least 1")
    options = ["--dtype", args.dtype] if args.dtype else []
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            copying, n_bytes = copy(args.source, Path(name))
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            converting, peak = convert(args.source, Path(name) / "model", options)
        copied, converted = n_bytes / copying / 1e6, n_bytes / converting / 1e6
        say(
            f"{n_bytes / 1e9:.2f} GB: copied at {copied:.0f} MB/s, converted at {converted:.0f} "
            f"MB/s ({converted / copied:.2f} of it), peak {peak / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
