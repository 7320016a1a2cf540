"""Where the time of a decode step goes, by method of the ops object."""

from dataclasses import dataclass

from benchmarking.measure import GREEDY, Task
from npllama.llama import Llama
from npllama.op_times import watched

OUTSIDE = "outside of ops"


@dataclass(frozen=True)
class OpTime:
    """One line of a profile, means over the decode steps.

    Attributes:
        op: the method, with the shape of the matrix it is given where it is given one; or
            OUTSIDE: the loop, the cache's bookkeeping, the tokenizer.
        calls: a step.
        seconds: a step, without the time of ops that it calls itself.
        share: of the step.
    """

    op: str
    calls: float
    seconds: float
    share: float


def profile(llama: Llama, task: Task) -> list[OpTime]:
    """The decode steps of one generation, by op, the slowest first; shares sum to 1.

    Each call costs about a microsecond of watching, which counts as time of the op that made
    it; on a device, which is waited for after each op, steps are not ahead of one another.
    """
    backend = llama.backend
    generation = llama.new_generation(
        task.prompts, max_new_tokens=task.new_tokens, sampling=GREEDY, seed=0, ignore_eos=True
    )
    marker = backend.xp.zeros(1)
    with watched(llama.ops, lambda: backend.to_host(marker)) as watch:
        steps_before = None
        for _ in generation:
            if steps_before is None:  # what came before was the prompts, and steps queued ahead
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
