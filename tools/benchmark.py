"""Measure how fast a model reads and writes, and compare that with what the machine allows.

    python tools/benchmark.py --shape 110m
    python tools/benchmark.py --model DIR --prompt-tokens 512 --compare hf

Decode steps run in the library's own generation loop. The same run also times a roofline: one pass
of float32 BLAS over all matrices of the model.
"""

if __name__ == "__main__":  # before the other imports, which take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import npllama
from benchmarking.figures import Program, Ratio, program, ratio
from benchmarking.machine import machine, n_threads
from benchmarking.measure import Task, make_task, open_model, side_by_side
from benchmarking.rivals import Command, Transformers, check_installed
from benchmarking.roofline import roofline_nbytes, roofline_of
from benchmarking.shapes import SHAPES, prompt_lengths, random_llama
from benchmarking.step_profile import OpTime, profile
from benchmarking.table import profile_table, programs_table, ratio_line
from benchmarking.text import paragraph, profile_text, programs_text
from command_line import Parser, exit_code, named_path, say
from npllama.backend import BACKENDS, get_backend
from npllama.console import check_output, open_streams
from npllama.errors import InputError
from npllama.llama import Llama
from npllama.operating_system import usable_cores
from npllama.weight_formats import FORMATS


@dataclass(frozen=True)
class Report:
    """Everything that is reported. --json prints these fields.

    Attributes:
        model, task, machine: what was measured, and on which machine.
        programs: npllama, then its roofline, then the programs it is compared with.
        ratios: npllama's speed divided by that of each of those programs.
        profile: None unless requested.
        remarks: what a reader needs to know to interpret the figures.
    """

    model: dict[str, Any]
    task: dict[str, Any]
    machine: dict[str, Any]
    programs: list[Program]
    ratios: list[Ratio]
    profile: list[OpTime] | None
    remarks: list[str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code(
        "benchmark",
        lambda: _print_report(options),
        out_of_memory="use a shorter --context, a smaller --batch or a narrower --dtype",
    )


def _print_report(options: argparse.Namespace) -> None:
    check_output()
    _check(options)
    with threadpool_limits(limits=options.threads, user_api="blas"):
        report = benchmark(options)
    if options.json:
        say(json.dumps(asdict(report)))
    else:
        say(as_markdown(report) if options.markdown else as_text(report))


def benchmark(options: argparse.Namespace) -> Report:
    """Run the measurements that the options ask for. The options must be parsed and checked."""
    commands = [Command(command, n_threads()) for command in options.compare_command]
    begin = time.perf_counter()
    llama = _open(options)
    load_seconds = None if options.model is None else time.perf_counter() - begin
    config = llama.config
    task = _task(options, llama)
    opening = open_model(llama, task)
    length = options.prompt_tokens + options.new_tokens
    roofline, remark = roofline_of(llama, options.batch, length)
    remarks = [] if remark is None else [remark]
    with ExitStack() as stack:
        rivals: list[Transformers | Command] = [*commands]
        if options.compare is not None:
            transformers = Transformers(config, llama.dtype, task, n_threads())
            rivals.insert(0, stack.enter_context(transformers))
            remarks.append(f"{transformers.name}: {transformers.versions}, random weights")
        bar = stack.enter_context(tqdm(total=options.runs, unit="run", disable=None, leave=False))
        runs = side_by_side(llama, task, roofline, rivals, options.runs, bar.update)
    fewest, most = min(runs.threads), llama.backend.threads.most
    if fewest < most:
        remarks.append(
            f"other programs kept cores busy: one run began with {fewest} of {most} threads, for "
            "npllama and its roofline alike; --threads N fixes the number"
        )
    name = f"npllama {llama.dtype}"
    programs = [
        program(
            name,
            runs.npllama,
            runs.roofline,
            task,
            config,
            llama.bytes_per_forward,
            load_seconds,
            None if load_seconds is None else load_seconds + opening.first_token,
            opening.peak_nbytes,
        )
    ]
    if roofline is not None:
        nbytes = roofline_nbytes(config)
        title = "roofline: float32 BLAS"
        programs.append(program(title, runs.roofline, runs.roofline, task, config, nbytes))
    ratios = []
    for rival, samples in zip(rivals, runs.rivals, strict=True):
        is_hf = isinstance(rival, Transformers)
        programs.append(
            program(
                rival.name,
                samples,
                runs.roofline,
                task,
                config if is_hf else None,  # the model of another command is unknown here
                _step_nbytes(llama, rival.dtype) if is_hf else None,
                peak_bytes=rival.peak_nbytes if is_hf else None,
            )
        )
        ratios.append(ratio(rival.name, runs.npllama, samples))
    return Report(
        model={
            "name": options.shape or str(options.model),
            "dtype": llama.dtype,
            "parameters": config.n_parameters,
            "bytes": llama.parameters.nbytes,
            **config.to_hf(llama.dtype),
        },
        task={
            "prompt_tokens": task.lengths,
            "new_tokens": options.new_tokens,
            "context": llama.context,
            "runs": options.runs,
        },
        machine=machine(llama.backend),
        programs=programs,
        ratios=ratios,
        profile=profile(llama, task) if options.profile else None,
        remarks=remarks,
    )


def as_text(report: Report) -> str:
    """The report as text for a terminal."""
    parts = [paragraph(_what(report)), programs_text(report.programs)]
    if notes := _notes(report):
        parts.append("\n".join(map(paragraph, notes)))
    if report.profile is not None:
        parts.append(profile_text(report.profile))
    return "\n\n".join(parts)


def as_markdown(report: Report) -> str:
    """The report as Markdown, for a README."""
    parts = [_what(report), programs_table(report.programs)]
    if notes := _notes(report):
        parts.append("\n".join(notes))
    if report.profile is not None:
        parts.append(profile_table(report.profile))
    return "\n\n".join(parts)


def _what(report: Report) -> str:
    m, t, c = report.model, report.task, report.machine
    lengths = t["prompt_tokens"]
    prompts = f"prompt {lengths[0]} tokens"
    if len(lengths) > 1:
        prompts = f"{len(lengths)} prompts of {lengths[-1]} to {lengths[0]} tokens"
    runs = "1 run" if t["runs"] == 1 else f"{t['runs']} runs"
    return (
        f"{m['name']} ({m['parameters']:,} parameters, {m['dtype']}); {prompts}, "
        f"{t['new_tokens']} new tokens, {runs}; {c['device']} ({c['processor']}), "
        f"threads {c['threads']} ({c['blas']}), NumPy {c['numpy']}"
    )


def _notes(report: Report) -> list[str]:
    return [ratio_line(r) for r in report.ratios] + [f"Note: {r}." for r in report.remarks]


def _check(options: argparse.Namespace) -> None:
    least = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "runs": 1, "threads": 1, "context": 1}
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {value}: expected at least {bound}")
    if options.threads is not None and options.threads > usable_cores():
        raise InputError(
            f"--threads is {options.threads}: expected at most {usable_cores()}, the number of "
            "cores that can be used here; more threads would wait for one another"
        )
    if options.compare is not None:
        check_installed()


def _open(options: argparse.Namespace) -> Llama:
    backend = get_backend(options.backend, options.threads, options.device)
    if backend.xp is not np and (options.threads is not None or options.compare is not None):
        raise InputError("--threads and --compare hf work only on the CPU: add --backend numpy")
    if options.model is not None:
        llama = npllama.load(
            options.model,
            backend.name,
            options.dtype,
            options.context,
            options.threads,
            options.device,
        )
        _check_length(options, llama.context)
        return llama
    config = SHAPES[options.shape]
    context = options.context or config.context_length
    if context > config.context_length:
        raise InputError(
            f"--context is {context}: the shape {options.shape} allows at most "
            f"{config.context_length}"
        )
    _check_length(options, context)  # before random weights are made, which may take minutes
    return random_llama(config, backend, options.dtype or "float32", context)


def _check_length(options: argparse.Namespace, context: int) -> None:
    if options.prompt_tokens + options.new_tokens > context:
        raise InputError(
            f"--prompt-tokens {options.prompt_tokens} and --new-tokens {options.new_tokens} do "
            f"not fit the context of {context}: use fewer"
        )


def _task(options: argparse.Namespace, llama: Llama) -> Task:
    n_ids = llama.config.vocab_size if llama.tokenizer is None else llama.tokenizer.vocab_size
    lengths = prompt_lengths(options.prompt_tokens, options.batch)
    return make_task(lengths, options.new_tokens, n_ids)


def _step_nbytes(llama: Llama, dtype: str) -> int:
    """Bytes that a decode step reads if all weights are stored in `dtype`."""
    c = llama.config
    embedding = 0 if c.tie_embeddings else c.vocab_size * c.dim
    return (c.n_parameters - embedding) * FORMATS[dtype].dtype.itemsize


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        "benchmark",
        "Measure prefill, decode, load and memory of a model, and compare them with a roofline.",
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=named_path, metavar="DIR", help="a model directory")
    which.add_argument(
        "--shape", choices=tuple(SHAPES), help="a model of this size with random weights"
    )
    p.add_argument(
        "--dtype",
        choices=tuple(FORMATS),
        help="dtype of the weights in memory (default: as stored; float32 for a shape)",
    )
    p.add_argument("--backend", choices=BACKENDS, default="auto")
    p.add_argument("--device", type=int, metavar="N", help="which GPU (default: the first)")
    p.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads (default: as many as free cores)"
    )
    p.add_argument(
        "--prompt-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens of each prompt (default: %(default)s)",
    )
    p.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="new tokens per prompt; all but the first are decode steps (default: %(default)s)",
    )
    p.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="prompts decoded together; each is one token shorter than the previous one "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--context", type=int, metavar="N", help="positions per prompt (default: the model's)"
    )
    p.add_argument(
        "--runs", type=int, default=5, metavar="N", help="repetitions (default: %(default)s)"
    )
    p.add_argument(
        "--compare",
        choices=("hf",),
        help="also run the same task in Hugging Face transformers (extra [reference])",
    )
    p.add_argument(
        "--compare-command",
        action="append",
        default=[],
        metavar="CMD",
        help="also run a program that prints its tokens/s; may be given several times",
    )
    p.add_argument(
        "--profile", action="store_true", help="show the share of each operation in a decode step"
    )
    form = p.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a table for a README")
    form.add_argument("--json", action="store_true", help="print all figures as JSON")
    return p


if __name__ == "__main__":
    sys.exit(main())
