"""Shows a run's progress: a progress bar, report lines, the loss curve, and the speed."""

import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from perplexity import Score
from training.loss_curve import Point, write_curve
from training.run import Run, StepResult


class Progress:
    """Performs the steps of a run and reports them.

    The speed counts only the time of the steps. Its FLOPs are 6 per parameter and token (2 forward,
    4 backward), whatever else is computed. It is also shown as a fraction of the machine's speed in
    float32 matrix products (sgemm).
    """

    def __init__(self, run: Run, curve: Path, steps: int) -> None:
        self.run = run
        self.curve = curve
        self.steps = steps
        self.sgemm = sgemm_rate(run)
        self.tokens = 0
        self.points: list[Point] = []
        self.seconds_before = 0.0
        self._began = time.perf_counter()
        self._clear()

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint: the curve so far, and the losses since its last point."""
        return {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "points": [asdict(point) for point in self.points],
            "losses": self._losses,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from `state`."""
        self.tokens, self.seconds_before = state["tokens"], state["seconds"]
        self.points = [Point(**point) for point in state["points"]]
        self._losses = list(state["losses"])

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken, summed over all its sessions."""
        return self.seconds_before + time.perf_counter() - self._began

    def __enter__(self) -> "Progress":
        write_curve(self.curve, self.points)
        self._began = time.perf_counter()
        # disable=None shows a bar on a terminal only
        self.bar = tqdm(total=self.steps, initial=self.run.steps_done, unit="step", disable=None)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self.bar.close()

    def step(self) -> None:
        """Perform one step of the run."""
        began = time.perf_counter()
        self._last = self.run.step()
        self._busy += time.perf_counter() - began
        self._steps += 1
        self._losses.append(self._last.loss)
        self._targets += self._last.n_targets
        self.tokens += self._last.n_targets
        with suppress(OSError):  # the run should continue even if the terminal is gone
            self.bar.update()
            self.bar.set_postfix_str(f"loss {self._last.loss:.3f}, {self._speed()}")

    def report(self, score: Score | None = None) -> None:
        """Print a line and add a point to the curve, for the steps since the last report."""
        assert self._last is not None
        point = Point(
            step=self.run.steps_done,
            tokens=self.tokens,
            seconds=self.seconds,
            learning_rate=self._last.learning_rate,
            gradient_norm=self._last.gradient_norm,
            train_loss=float(np.mean(self._losses)),
            valid_loss=None if score is None else score.nats_per_token,
            valid_bits_per_byte=None if score is None else score.bits_per_byte,
        )
        self.points.append(point)
        write_curve(self.curve, self.points)
        line = f"step {point.step:,}/{self.steps:,}, loss {point.train_loss:.4f}"
        if score is not None:
            line += f", validation {point.valid_loss:.4f} nats per token"
            line += f" = {point.valid_bits_per_byte:.4f} bits per byte"
        left = (self.steps - point.step) * self._busy / self._steps
        self.write(f"{line}, {self._speed()}, {tqdm.format_interval(left)} left")
        self._clear()

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError):
            self.bar.write(line, file=sys.stderr)

    def _speed(self) -> str:
        flops = 6 * self.run.model.config.n_parameters * self._targets / self._busy
        return (
            f"{self._targets / self._busy:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s"
            f" = {flops / self.sgemm:.0%} of sgemm"
        )

    def _clear(self) -> None:
        self._last: StepResult | None = None
        self._losses: list[float] = []
        self._targets, self._busy, self._steps = 0, 0.0, 0


def sgemm_rate(run: Run) -> float:
    """FLOP/s of float32 matrix products on all workers of the run; the best of three attempts."""
    xp, to_host, n = run.xp, run.model.backend.to_host, 2048
    a = xp.ones((n, n), dtype="float32")

    def product(_: int) -> float:
        return float(to_host((a @ a)[0, 0]))  # reading one element waits for the whole product

    def rate() -> float:
        began = time.perf_counter()
        list(run.workers.map(product, range(run.workers.n)))
        return run.workers.n * 2 * n**3 / (time.perf_counter() - began)

    return max(rate() for _ in range(3))
