"""From samples to the figures that are reported: rates, parts of the roofline, ratios, spreads."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarking.measure import Sample, Task
from benchmarking.shapes import prefill_flops
from npllama.config import LlamaConfig
from npllama.costs import forward_flops


@dataclass(frozen=True)
class Spread:
    """A figure over all runs."""

    median: float
    min: float
    max: float

    def times(self, factor: float) -> "Spread":
        """The same figure in another unit."""
        return Spread(self.median * factor, self.min * factor, self.max * factor)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, least and largest; None where a run does not have the figure."""
    values = list(values)
    if not values or None in values:
        return None
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Program:
    """What is reported of one program; None where it is not known.

    Attributes:
        prefill_tokens_per_second, decode_tokens_per_second: see Sample.
        prefill_of_roofline, decode_of_roofline: the program's rate divided by the roofline's of
            the same run.
        decode_gigabytes_per_second: bytes of weights that a step reads, once for all rows,
            times steps a second.
        prefill_gigaflops, decode_gigaflops: matrix products alone (npllama.costs.forward_flops),
            a second.
        first_token_seconds: from a run's start.
        load_seconds: from nothing to a model.
        load_to_first_token_seconds: the same, and the first generation to its first token.
        peak_bytes: of memory during a generation.
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
    """npllama's tokens a second divided by those of another program in the same run."""

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
    """The figures of a program's samples.

    Args:
        roofline: the samples of the same runs; empty where there is none.
        config: the model it ran; None where only the program knows.
        step_nbytes: bytes of weights that its decode step reads; None where not known.
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
    """Ours divided by theirs, run by run."""
    pairs = list(zip(ours, theirs, strict=True))
    return Ratio(
        to,
        spread(a.prefill and b.prefill and a.prefill / b.prefill for a, b in pairs),
        spread(a.decode / b.decode for a, b in pairs),
    )
