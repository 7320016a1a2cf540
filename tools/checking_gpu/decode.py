"""Decoding with the shipped model, 1.1b and 7b, as fractions of the GPU's read bandwidth."""

import sys
from dataclasses import dataclass

from checking_gpu.decoding import Decoding, decode
from checking_gpu.limits import READ_BYTES, read_bandwidth
from checking_gpu.models import shape_llama, shipped_llama
from checking_gpu.results import BELOW, OK
from checking_gpu.stage import Stage, main
from npllama.llama import Llama
from npllama.ops import ops_for

READ = "read bandwidth"
SHIPPED_MICROSECONDS = 150
INT8_TO_FLOAT16 = 1.6


@dataclass(frozen=True)
class Case:
    """Decoding up to `context` positions. `least` is the bar, a fraction of the read bandwidth."""

    context: int
    batch: int = 1
    least: float | None = None
    graph: bool = True


# model -> cases, the most important first
CASES: dict[tuple[str, str], tuple[Case, ...]] = {
    ("1.1b", "float16"): (Case(512, least=0.6), Case(512, graph=False)),
    ("7b", "float16"): (
        Case(512, least=0.8),
        Case(3500, least=0.7),
        Case(512, batch=8),
        Case(512, graph=False),
    ),
    ("7b", "int8"): (Case(512), Case(3500), Case(512, batch=8)),
    ("1.1b", "int8"): (Case(512), Case(512, batch=8)),
}


def run(stage: Stage) -> None:
    """Measure the bandwidth, the shipped model, and all cases."""
    bandwidth(stage)
    for graph in (True, False):
        stage.attempt("shipped model", _shipped, stage, graph)
    run_cases(stage, CASES)


def bandwidth(stage: Stage) -> None:
    """Measure the bytes per second of a read-only reduction, once per run of check_gpu.sh."""
    if stage.results.number(READ) is None:
        stage.attempt(READ, _bandwidth, stage, 2**20 if stage.tiny else READ_BYTES)


def _bandwidth(stage: Stage, nbytes: int) -> None:
    found = read_bandwidth(stage.backend(), nbytes)
    stage.results.keep(READ, found)
    stage.add(f"{READ}, {nbytes / 1e9:.3g} GB", f"{found / 1e9:,.0f} GB/s")


def run_cases(stage: Stage, cases: dict[tuple[str, str], tuple[Case, ...]]) -> None:
    """Add one row per case. Each model is made once."""
    bandwidth(stage)
    for (shape, dtype), some in cases.items():
        stage.attempt(f"{shape} {dtype}", _model, stage, shape, dtype, some, needs=8)


def _model(stage: Stage, shape: str, dtype: str, cases: tuple[Case, ...]) -> None:
    llama = shape_llama(shape, stage.backend(), dtype, stage.tiny)
    what = f"{shape} {dtype}"
    for case in cases[:2] if stage.tiny else cases:
        stage.attempt(_name(what, case), _case, stage, llama, what, case, needs=4)


def eager(llama: Llama) -> Llama:
    """The same model with decode steps that are not captured as a graph."""
    ops = ops_for(llama.backend, graph=False)
    return Llama(llama.config, llama.parameters, ops, llama.context, llama.tokenizer)


def _case(stage: Stage, llama: Llama, what: str, case: Case) -> None:
    used = llama if case.graph else eager(llama)
    if stage.tiny:
        found = decode(used, context=8, batch=1, new_tokens=3, runs=1)
    else:
        found = decode(used, case.context, case.batch)
    name = _name(what, case)
    stage.results.keep(name, found.tokens_per_second)
    read = stage.results.number(READ)
    if read is None:
        stage.add(name, text(found))
    else:
        fraction = found.bytes_per_second / read
        stage.bar(name, f"{fraction:.3f} of the bandwidth: {text(found)}", fraction, case.least)
    if what == "7b int8" and case == Case(512):
        _beside_float16(stage, found)


def _beside_float16(stage: Stage, found: Decoding) -> None:
    wide = stage.results.number("7b float16, context 512")
    if wide:
        ratio = found.tokens_per_second / wide
        stage.bar("7b int8 to float16, tokens/s", f"{ratio:.2f}", ratio, INT8_TO_FLOAT16)


def _shipped(stage: Stage, graph: bool) -> None:
    llama = shipped_llama(ops_for(stage.backend(), graph))
    if stage.tiny:
        found = decode(llama, context=8, new_tokens=3, runs=1)
    else:
        found = decode(llama, context=256, new_tokens=192, runs=5)
    name = f"shipped model, {llama.dtype}" + ("" if graph else ", eager")
    us = found.seconds * 1e6
    if graph and not stage.tiny:
        bar = f"under {SHIPPED_MICROSECONDS} us"
        stage.add(name, text(found), bar, OK if us < SHIPPED_MICROSECONDS else BELOW)
    else:
        stage.add(name, text(found))


def text(found: Decoding) -> str:
    """tokens/s, time and bytes per step, and the reason if steps were eager unexpectedly."""
    figures = (
        f"{found.tokens_per_second:,.1f} tokens/s, {found.seconds * 1e6:,.0f} us per step, "
        f"{found.nbytes / 1e9:.3g} GB per step"
    )
    return figures + (f" ({found.eager_because})" if found.eager_because else "")


def _name(what: str, case: Case) -> str:
    parts = [what, f"context {case.context}"]
    if case.batch > 1:
        parts.append(f"batch {case.batch}")
    if not case.graph:
        parts.append("eager")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main("decode", run))
