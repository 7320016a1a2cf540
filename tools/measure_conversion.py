"""Compare a conversion with a plain copy of the same files: speed in MB/s, and peak memory.

    python tools/make_synthetic_meta.py 7B /data/7B
    python tools/measure_conversion.py /data/7B /data [--dtype int8]

Copy and conversion are each timed until their data is on disk, then their output is removed. The
copy runs first, so it may read the source from disk while the conversion reads it from the page
cache. With --repeat 2, both read it from the page cache in the second round, if it fits. This
program imports no more than convert.py, because the system counts a parent's peak memory as part
of its child's.
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
KIB = 1 if sys.platform == "darwin" else 1024  # macOS reports ru_maxrss in bytes


def copy(source: Path, folder: Path) -> tuple[float, int]:
    """Copy the weights of `source`, a file or a directory; return (seconds, bytes)."""
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
    """Run a conversion, which syncs its output to disk, and return (seconds, peak bytes).

    Raises:
        SystemExit: the conversion failed and has printed the reason.
    """
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, CONVERT, source, dest, *options])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # tells Popen not to wait again
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - began, usage.ru_maxrss * KIB


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    p = Parser("measure_conversion", __doc__.split("\n")[0])
    p.add_argument("source", type=named_path, help="a checkpoint that tools/convert.py reads")
    p.add_argument("folder", type=named_path, help="where to write, on the disk to measure")
    p.add_argument("--dtype", help="passed to convert.py (default: as stored)")
    p.add_argument("--repeat", type=int, default=1, metavar="N", help="rounds (default: 1)")
    args = p.parse_args(argv)
    return exit_code("measure_conversion", lambda: _measure(args))


def _measure(args: argparse.Namespace) -> None:
    if not args.source.exists():
        raise InputError(f"{args.source} does not exist: expected a checkpoint")
    if not args.folder.is_dir():
        raise InputError(f"{args.folder} is not a directory: expected a directory to write to")
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
            f"MB/s ({converted / copied:.2f} of that), peak {peak / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
