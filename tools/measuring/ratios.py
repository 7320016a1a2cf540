"""Time two functions that compute the same result, in alternating runs."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

SECONDS = 0.02
"""The minimum duration of one timing. A shorter function is called several times."""


@dataclass(frozen=True)
class Side:
    """A function, and the context in which it is called. Entering the context is not timed."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager]

    def seconds(self, n_calls: int) -> float:
        """The duration of n calls."""
        with self.context():
            begin = time.perf_counter()
            for _ in range(n_calls):
                self.call()
            return time.perf_counter() - begin


@dataclass(frozen=True)
class Timings:
    """Seconds per call of the override and of the reference, one element per run."""

    override: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)

    def ratios(self) -> tuple[float, float, float]:
        """The lower quartile, the median and the upper quartile of override / reference."""
        each = np.divide(self.override, self.reference)
        lower, median, upper = np.percentile(each, [25, 50, 75]).tolist()
        return lower, median, upper


def compare(override: Side, reference: Side, n_runs: int, pause: float) -> Timings:
    """Time both sides n_runs times. The side that begins changes from run to run.

    Args:
        pause: seconds before each timing. Idle threads of BLAS spin for a while after a product,
            and would take a core from the other side.
    """
    timings = Timings()
    both = [
        (side, _n_calls(side, pause), seconds)
        for side, seconds in ((override, timings.override), (reference, timings.reference))
    ]
    for run in range(n_runs):
        for side, n_calls, seconds in both if run % 2 == 0 else both[::-1]:
            time.sleep(pause)
            seconds.append(side.seconds(n_calls) / n_calls)
    return timings


def _n_calls(side: Side, pause: float) -> int:
    """The number of calls that take about SECONDS."""
    side.seconds(1)  # warms up
    time.sleep(pause)
    return max(1, round(SECONDS / side.seconds(1)))
