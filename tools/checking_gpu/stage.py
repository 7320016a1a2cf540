"""What all stages share: options, table rows, time limit, and handling of failures."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from checking_gpu.results import FAILED, Results
from npllama.backend import Backend, get_backend
from npllama.errors import NpllamaError

Result = TypeVar("Result")


class Stage:
    """A running stage.

    Attributes:
        name: its name in check_gpu.sh.
        tiny: whether models are tiny, so that a CPU runs them in a moment. Their figures say
            nothing about a GPU.
    """

    def __init__(self, name: str, results: Results, tiny: bool, seconds: float) -> None:
        self.name = name
        self.results = results
        self.tiny = tiny
        self._until = time.monotonic() + seconds

    def backend(self) -> Backend:
        """The CuPy backend. Stages use no other."""
        return get_backend("cupy")

    def seconds_left(self) -> float:
        """Seconds until check_gpu.sh ends the stage."""
        return self._until - time.monotonic()

    def add(self, what: str, figure: str, bar: str = "", verdict: str = "") -> None:
        """Add a row to the table."""
        self.results.add(self.name, what, figure, bar, verdict)

    def bar(self, what: str, figure: str, value: float, least: float | None) -> None:
        """Add a row with a bar: `value` should be at least `least`. None means no bar."""
        if least is None or self.tiny:
            self.add(what, figure)
        else:
            self.results.bar(self.name, what, figure, value, least)

    def attempt(
        self, what: str, work: Callable[..., Result], *arguments: object, needs: float = 0
    ) -> Result | None:
        """Run a part of the stage. If it fails, add a row that says so, and continue.

        Args:
            needs: seconds the part needs. If fewer are left, it is skipped with a row.
        """
        if self.seconds_left() < needs and not self.tiny:
            self.add(what, "no time left")
            return None
        try:
            return work(*arguments)
        except Exception as error:  # drivers, compilers and kernels raise many types
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            self.add(what, f"{type(error).__name__}: {said[0][:200]}", "", FAILED)
            return None


def main(name: str, run: Callable[[Stage], None]) -> int:
    """Run a stage's command line, and return the exit code. Failed parts have their own rows."""
    p = argparse.ArgumentParser(prog=f"python -m checking_gpu.{name}")
    p.add_argument("--results", required=True, metavar="DIR", help="directory of the table")
    p.add_argument("--seconds", type=float, default=600, help="time limit of the stage")
    p.add_argument("--tiny", action="store_true", help="use models that a CPU runs in a moment")
    options = p.parse_args()
    stage = Stage(name, Results(options.results), options.tiny, options.seconds)
    try:
        run(stage)
    except NpllamaError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skips exit handlers, in which a device could hang
