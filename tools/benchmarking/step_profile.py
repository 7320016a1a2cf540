"""Measures how much of a decode step each method of the ops object takes."""

from dataclasses import dataclass

from benchmarking.measure import GREEDY, Task
from npllama.llama import Llama
from npllama.op_times import watched

OUTSIDE = "outside of ops"


@dataclass(frozen=True)
class OpTime:
    """One line of a profile: means over the decode steps.

    Attributes:
        op: the method, with the shape of its matrix argument if it has one. OUTSIDE stands for
            the loop, the cache's bookkeeping and the tokenizer.
        calls: calls per step.
        seconds: seconds per step, without the time of ops that it calls.
        share: fraction of the step.
    """

    op: str
    calls: float
    seconds: float
    share: float


def profile(llama: Llama, task: Task) -> list[OpTime]:
    """Profile the decode steps of one generation by op, slowest first. Shares sum to 1.

    Timing a call takes time itself, which is attributed to the op that made the call. On a device,
    each op is waited for, so steps are not queued ahead as they usually are.
    """
    backend = llama.backend
    generation = llama.new_generation(
        task.prompts, max_new_tokens=task.new_tokens, sampling=GREEDY, seed=0, ignore_eos=True
    )
    marker = backend.xp.zeros(1)
    with watched(llama.ops, lambda: backend.to_host(marker)) as watch:
        steps_before = None
        for _ in generation:
            if steps_before is None:  # discard the prompts and the steps queued during them
                watch.clear()
                steps_before = generation.timings.decode_steps
    n_steps = generation.timings.decode_steps - steps_before
    total = generation.timings.decode_seconds
    lines = [
        OpTime(op, watch.calls[op] / n_steps, seconds / n_steps, seconds / total)
        for op, seconds in watch.seconds.items()
    ]
    lines.sort(key=lambda line: -line.seconds)
    rest = total - sum(watch.seconds.values())
    return [*lines, OpTime(OUTSIDE, 1.0, rest / n_steps, rest / total)]
