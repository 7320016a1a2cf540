"""Compare each override of NumPy with the reference, and report how much time it saves.

    python tools/measure_overrides.py
    python tools/measure_overrides.py --operation rope --operation attention --runs 31
    python tools/measure_overrides.py --list

An override is a method of `NumpyOps`. The reference is the method of the same name in `Ops`. All
other methods that the two call are overrides, so a ratio is the gain of one override alone.

- The threads of BLAS are those of a forward pass for the override, and all for the reference.
- A function is called several times in a row. Its arguments can therefore be in the processor's
  cache, which is not so in a model.
- The output is a Markdown table. The times are medians of runs that alternate between override and
  reference. A ratio is the override's time divided by the reference's time in the same run. The
  table has the median ratio, with the quartiles in brackets.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import cache

from benchmarking.machine import machine
from benchmarking.measure import PAUSE
from command_line import Parser, exit_code, say
from measuring.operations import Operation, RandomLayer, Sizes, operations
from measuring.ratios import Side, Timings, compare
from npllama.backend import Backend
from npllama.console import open_streams
from npllama.errors import InputError
from npllama.ops import Ops
from npllama.threads import Threads

SIZES = Sizes()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code("measure_overrides", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    for name in ("runs", "threads"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}: expected at least 1")
    chosen = [o for o in operations(SIZES) if o.name in (options.operation or [o.name])]
    if options.list:
        for operation in chosen:
            say(f"{operation.name}: {operation.operands}")
    else:
        _measure(chosen, options.threads, options.runs)


def _measure(chosen: Sequence[Operation], n_threads: int, n_runs: int) -> None:
    facts = machine(Backend())
    say(f"{facts['processor']}, {facts['blas']}, NumPy {facts['numpy']}, {n_runs} runs")
    say("")
    say("| operation | operands | threads | override | reference | ratio |")
    say("|---|---|---|---|---|---|")

    @cache
    def layer(is_training: bool) -> RandomLayer:
        return RandomLayer(SIZES, is_training, n_threads)

    for operation in chosen:
        random_layer = layer(operation.is_training)
        override, reference = sides(operation, random_layer)
        n = random_layer.ops.backend.threads.most
        timings = compare(override, reference, n_runs, PAUSE if n > 1 else 0)
        say(_row(operation, n, timings))


def sides(operation: Operation, layer: RandomLayer) -> tuple[Side, Side]:
    """The override and the reference, with the same arguments."""
    ops, arguments = layer.ops, operation.arguments(layer)
    override = getattr(ops, operation.name)
    reference = getattr(Ops, operation.name)
    threads = ops.backend.threads
    return (
        Side(lambda: override(*arguments), lambda: ops.forward_context(operation.n_rows)),
        Side(lambda: reference(ops, *arguments), lambda: threads.blas(threads.most)),
    )


def _row(operation: Operation, n_threads: int, timings: Timings) -> str:
    lower, median, upper = timings.ratios()
    cells = [
        f"`{operation.name}`",
        operation.operands,
        f"{n_threads}",
        _time(statistics.median(timings.override)),
        _time(statistics.median(timings.reference)),
        f"{median:.2f} ({lower:.2f} to {upper:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _parser() -> argparse.ArgumentParser:
    p = Parser("measure_overrides", __doc__.split("\n")[0])
    p.add_argument(
        "--operation",
        action="append",
        choices=tuple(dict.fromkeys(o.name for o in operations(SIZES))),
        metavar="NAME",
        help="measure only this operation; can be repeated (default: all; --list shows the names)",
    )
    p.add_argument("--runs", type=int, default=21, metavar="N", help="(default: %(default)s)")
    p.add_argument(
        "--threads",
        type=int,
        default=Threads().most,
        metavar="N",
        help="threads of a forward pass; training uses one (default: all cores, here %(default)s)",
    )
    p.add_argument("--list", action="store_true", help="list the operations and their operands")
    return p


if __name__ == "__main__":
    sys.exit(main())
