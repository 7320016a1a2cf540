"""Runs that are timed: the library's own generation loop, the roofline beside it, and rivals."""

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
"""Seconds between programs: threads of BLAS and OpenMP wait for more work by spinning, for some
25 to 200 ms, and would take a core from the next program's first forward. And npllama counts the
free cores by what ran in the last quarter of a second."""


@dataclass(frozen=True)
class Task:
    """What every program does in a run: read `prompts`, then make `new_tokens` a prompt.

    The first of them comes out of the prompts' forward, the others of decode steps, which all
    prompts go through together.
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
    """One run of one program; None is what it does not tell.

    Attributes:
        prefill: prompt tokens a second, over all prompts.
        decode: new tokens a second after each prompt's first, over all prompts.
        first_token: seconds from the start to the first new token.
    """

    prefill: float | None
    decode: float
    first_token: float | None


@dataclass(frozen=True)
class Opening:
    """What is measured once, before the runs.

    Attributes:
        first_token: seconds of the first generation to its first token.
        peak_nbytes: the most memory held during a generation; None where unknown.
    """

    first_token: float
    peak_nbytes: int | None


class Rival(Protocol):
    """Another program that does a task."""

    def run(self) -> Sample: ...


@dataclass
class Runs:
    """The samples of each program, the i-th of all taken side by side.

    Attributes:
        roofline: empty where there is none.
        rivals: of each, in the order they were given.
        threads: how many npllama began each run with.
    """

    npllama: list[Sample] = field(default_factory=list)
    roofline: list[Sample] = field(default_factory=list)
    rivals: list[list[Sample]] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)


def make_task(lengths: Sequence[int], new_tokens: int, n_ids: int) -> Task:
    """Prompts of random ids of [3, n_ids), so of no control id, always the same ones."""
    rng = np.random.default_rng(0)
    return Task([rng.integers(min(3, n_ids - 1), n_ids, n).tolist() for n in lengths], new_tokens)


def open_model(llama: Llama, task: Task) -> Opening:
    """The first token of a fresh model, then a whole generation that warms up what follows and
    during which memory is watched (the watching costs time, so this one is not timed)."""
    first = Task(task.prompts, new_tokens=1)
    first_token = generate(llama, first).first_token
    with PeakMemory() as peak:
        generate(llama, task)
    on_device = llama.backend.xp is not np
    return Opening(first_token, llama.backend.peak_bytes() if on_device else peak.nbytes)


def generate(llama: Llama, task: Task) -> Sample:
    """One run of the library's own loop: greedy, going on after an end-of-sequence id."""
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
    """`n_runs` runs of everything in turn, so that noise hits all alike.

    Half of a run's roofline passes go before npllama's run and half after, and there are as many
    of them as it has decode steps: both take about the same time, around the same moment.
    """
    runs = Runs(rivals=[[] for _ in rivals])
    if roofline is not None:  # warm up
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
            llama.backend.threads.count  # noqa: B018 (the look after this one is at the pause)
        if rivals:
            time.sleep(PAUSE)
        done()
    return runs


def roofline_run(
    roofline: Roofline, task: Task, between: Callable[[], None], n_passes: int
) -> Sample:
    """Passes in the place of a task's forwards, `between` called halfway.

    Prefill: a pass for each prompt, of its rows, the head on its last. Decode: the mean of
    `n_passes` of one row a prompt.
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
