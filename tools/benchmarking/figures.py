"""Computes the reported figures from samples: rates, fractions of the roofline, ratios, spreads."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarking.measure import Sample, Task
from benchmarking.shapes import prefill_flops
from npllama.config import LlamaConfig
from npllama.costs import forward_flops


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of a figure over all runs."""

    median: float
    min: float
    max: float

    def times(self, factor: float) -> "Spread":
        """The same figure in another unit."""
        return Spread(self.median * factor, self.min * factor, self.max * factor)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, minimum and maximum; None if a run lacks the value."""
    values = list(values)
    if not values or None in values:
        return None
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Program:
    """The reported figures of one program. None marks an unknown figure.

    Attributes:
        prefill_tokens_per_second, decode_tokens_per_second: see Sample.
        prefill_of_roofline, decode_of_roofline: the program's rate divided by the roofline's
            rate in the same run.
        decode_gigabytes_per_second: bytes of weights that a step reads (once for all rows) times
            steps per second.
        prefill_gigaflops, decode_gigaflops: operations per second, of matrix products only
            (npllama.costs.forward_flops).
        first_token_seconds: time from the start of a run.
        load_seconds: time to load the model.
        load_to_first_token_seconds: time to load the model and generate the first token.
        peak_bytes: peak memory during a generation.
    """

    name: str
    prefill_tokens_per_second: Spread | None
    prefill_of_roofline: Spread | None
    prefill_gigaflops: Spread | None
    decode_tokens_per_second: Spread
    decode_of_roofline: Spread | None
    decode_gigabytes_per_second: Spread | None
    decode_gigaflops: Spread | None
    first_token_seconds: Spread | None
    load_seconds: float | None = None
    load_to_first_token_seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Ratio:
    """npllama's tokens per second divided by those of another program in the same run."""

    to: str
    prefill: Spread | None
    decode: Spread


def program(
    name: str,
    samples: list[Sample],
    roofline: list[Sample],
    task: Task,
    config: LlamaConfig | None,
    step_nbytes: int | None,
    load_seconds: float | None = None,
    load_to_first_token_seconds: float | None = None,
    peak_bytes: int | None = None,
) -> Program:
    """Compute the figures of a program from its samples.

    Args:
        roofline: the roofline's samples of the same runs; empty if there is none.
        config: the model that the program ran; None if only the program knows.
        step_nbytes: bytes of weights that its decode step reads; None if unknown.
    """
    prefill = spread(s.prefill for s in samples)
    decode = spread(s.decode for s in samples)
    gigaflops_prefill = gigaflops_decode = gigabytes = None
    if config is not None:
        if prefill is not None:
            flops = prefill_flops(config, task.lengths)
            gigaflops_prefill = prefill.times(flops / sum(task.lengths) / 1e9)
        gigaflops_decode = decode.times(forward_flops(config, 1, 1) / 1e9)
    if step_nbytes is not None:
        gigabytes = decode.times(step_nbytes / len(task.prompts) / 1e9)
    parts = ratio(name, samples, roofline) if roofline else None
    return Program(
        name=name,
        prefill_tokens_per_second=prefill,
        prefill_of_roofline=parts and parts.prefill,
        prefill_gigaflops=gigaflops_prefill,
        decode_tokens_per_second=decode,
        decode_of_roofline=parts and parts.decode,
        decode_gigabytes_per_second=gigabytes,
        decode_gigaflops=gigaflops_decode,
        first_token_seconds=spread(s.first_token for s in samples),
        load_seconds=load_seconds,
        load_to_first_token_seconds=load_to_first_token_seconds,
        peak_bytes=peak_bytes,
    )


def ratio(to: str, ours: list[Sample], theirs: list[Sample]) -> Ratio:
    """The rates `ours` divided by the rates `theirs`, run by run."""
    pairs = list(zip(ours, theirs, strict=True))
    return Ratio(
        to,
        spread(a.prefill and b.prefill and a.prefill / b.prefill for a, b in pairs),
        spread(a.decode / b.decode for a, b in pairs),
    )
