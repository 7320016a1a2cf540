"""What every stage has in common: its options, its table, the time it has, and its failures."""

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
    """A stage as it runs.

    Attributes:
        name: as check_gpu.sh lists it.
        tiny: whether models are so small that the CPU does them in a moment; no figure then
            says anything about a GPU.
    """

    def __init__(self, name: str, results: Results, tiny: bool, seconds: float) -> None:
        self.name = name
        self.results = results
        self.tiny = tiny
        self._until = time.monotonic() + seconds

    def backend(self) -> Backend:
        """CuPy; there is no other here."""
        return get_backend("cupy")

    def seconds_left(self) -> float:
        """Before check_gpu.sh ends the stage."""
        return self._until - time.monotonic()

    def add(self, what: str, figure: str, bar: str = "", verdict: str = "") -> None:
        """A row of the table."""
        self.results.add(self.name, what, figure, bar, verdict)

    def bar(self, what: str, figure: str, value: float, least: float | None) -> None:
        """A row with the number that `value` must reach; None for none."""
        if least is None or self.tiny:
            self.add(what, figure)
        else:
            self.results.bar(self.name, what, figure, value, least)

    def attempt(
        self, what: str, work: Callable[..., Result], *arguments: object, needs: float = 0
    ) -> Result | None:
        """Do a part; where it fails that is a row, and the stage goes on.

        Args:
            needs: seconds; without so many left the part is a row that says so.
        """
        if self.seconds_left() < needs and not self.tiny:
            self.add(what, "no time left")
            return None
        try:
            return work(*arguments)
        except Exception as error:  # whatever a driver, a compiler or a kernel raises
            traceback.print_exc()
            said = str(error).strip().splitlines() or [""]
            self.add(what, f"{type(error).__name__}: {said[0][:200]}", "", FAILED)
            return None


def main(name: str, run: Callable[[Stage], None]) -> int:
    """The command line of a stage; returns the exit code. A part that failed has said so."""
    p = argparse.ArgumentParser(prog=f"python -m checking_gpu.{name}")
    p.add_argument("--results", required=True, metavar="DIR", help="where the table is kept")
    p.add_argument("--seconds", type=float, default=600, help="that the stage has")
    p.add_argument("--tiny", action="store_true", help="models that a CPU does in a moment")
    options = p.parse_args()
    stage = Stage(name, Results(options.results), options.tiny, options.seconds)
    try:
        run(stage)
    except NpllamaError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a device that hangs at exit would take the next stage's time
