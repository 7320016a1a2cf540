"""Timed runs: the library's own generation loop, the roofline, and the programs to compare with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from benchmarking.peak_memory import PeakMemory
from benchmarking.roofline import Roofline
from npllama.llama import Llama
from npllama.sampling_options import Sampling

GREEDY = Sampling(temperature=0)

PAUSE = 0.3
"""Seconds between programs. Idle BLAS and OpenMP threads spin for a while, and would take a core
from the next program's first forward pass. npllama also needs the pause to count
the free cores, which it does by the load of the last quarter of a second."""


@dataclass(frozen=True)
class Task:
    """What every program does in a run: read `prompts`, then generate `new_tokens` per prompt.

    The first new token comes from the forward pass of the prompt, the others from decode steps,
    which all prompts share.
    """

    prompts: list[list[int]]
    new_tokens: int

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    @property
    def decode_steps(self) -> int:
        return self.new_tokens - 1


@dataclass(frozen=True)
class Sample:
    """One run of one program. None marks a value that the program does not report.

    Attributes:
        prefill: prompt tokens per second, over all prompts.
        decode: new tokens per second after the first of each prompt, over all prompts.
        first_token: seconds from the start to the first new token.
    """

    prefill: float | None
    decode: float
    first_token: float | None


@dataclass(frozen=True)
class Opening:
    """Values that are measured once, before the runs.

    Attributes:
        first_token: seconds that the first generation takes to its first token.
        peak_nbytes: peak memory during a generation; None if unknown.
    """

    first_token: float
    peak_nbytes: int | None


class Rival(Protocol):
    """A program to compare with, which performs a task."""

    def run(self) -> Sample: ...


@dataclass
class Runs:
    """The samples of all programs. The i-th samples of all programs are from the same run.

    Attributes:
        roofline: empty if there is no roofline.
        rivals: one list per program, in the given order.
        threads: number of threads with which npllama began each run.
    """

    npllama: list[Sample] = field(default_factory=list)
    roofline: list[Sample] = field(default_factory=list)
    rivals: list[list[Sample]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


def make_task(lengths: Sequence[int], new_tokens: int, n_ids: int) -> Task:
    """Prompts of random ids in [3, n_ids), which excludes control ids. Always the same prompts."""
    rng = np.random.default_rng(0)
    return Task([rng.integers(min(3, n_ids - 1), n_ids, n).tolist() for n in lengths], new_tokens)


def open_model(llama: Llama, task: Task) -> Opening:
    """Measure the first token of a fresh model. Then run a whole generation, as a warm-up and to
    sample memory; this one is not timed, because sampling memory costs time."""
    first = Task(task.prompts, new_tokens=1)
    first_token = generate(llama, first).first_token
    with PeakMemory() as peak:
        generate(llama, task)
    on_device = llama.backend.xp is not np
    return Opening(first_token, llama.backend.peak_bytes() if on_device else peak.nbytes)


def generate(llama: Llama, task: Task) -> Sample:
    """One greedy run of the library's own loop, which continues after an end-of-sequence id."""
    generation = llama.new_generation(
        task.prompts, max_new_tokens=task.new_tokens, sampling=GREEDY, seed=0, ignore_eos=True
    )
    generation.run()
    t = generation.timings
    return Sample(t.prefill_tokens_per_second, t.decode_tokens_per_second, t.first_token_seconds)


def side_by_side(
    llama: Llama,
    task: Task,
    roofline: Roofline | None,
    rivals: Sequence[Rival],
    n_runs: int,
    done: Callable[[], object] = lambda: None,
) -> Runs:
    """Run all programs `n_runs` times in alternation, so that noise affects all alike.

    Each run has as many roofline passes as decode steps, half of them before npllama's run and half
    after it. Both take about the same time, so they see about the same load.
    """
    runs = Runs(rivals=[[] for _ in rivals])
    if roofline is not None:  # warm-up
        roofline_run(roofline, task, lambda: None, n_passes=1)
    for _ in range(n_runs):

        def ours() -> None:
            time.sleep(PAUSE)
            runs.threads.append(llama.backend.threads.count)
            runs.npllama.append(generate(llama, task))

        if roofline is None:
            ours()
        else:
            runs.roofline.append(roofline_run(roofline, task, ours, task.decode_steps))
        for rival, samples in zip(rivals, runs.rivals, strict=True):
            time.sleep(PAUSE)
            samples.append(rival.run())
            llama.backend.threads.count  # noqa: B018 (the next count then covers the pause)
        if rivals:
            time.sleep(PAUSE)
        done()
    return runs


def roofline_run(
    roofline: Roofline, task: Task, between: Callable[[], None], n_passes: int
) -> Sample:
    """Time roofline passes that replace a task's forward passes; call `between` halfway.

    Prefill: one pass per prompt over all its tokens, with the head only on the last token. Decode:
    the mean of `n_passes` passes over one token per prompt.
    """
    batch = len(task.prompts)
    decode = sum(roofline.seconds(batch, batch) for _ in range(n_passes // 2))
    prefill = sum(roofline.seconds(length, 1) for length in task.lengths)
    between()
    decode += sum(roofline.seconds(batch, batch) for _ in range(n_passes - n_passes // 2))
    return Sample(
        prefill=sum(task.lengths) / prefill,
        decode=batch * n_passes / decode,
        first_token=prefill,
    )
