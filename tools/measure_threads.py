"""Compare generation in a program's other threads with generation in its main thread.

    python tools/measure_threads.py --shape 15m --dtype int8
    python tools/measure_threads.py --model DIR --requests 8

A web server or a GUI calls npllama from several threads. This program reports three ratios of
median seconds, from runs that alternate:

- one request in another thread, relative to the main thread; the aim is 1.00.
- N requests at once in N threads, relative to N requests in sequence; the aim is 1.00.
- N threads that share a server (`llama.server`), relative to N requests in sequence; the aim is far
  below 1.00.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import npllama
from benchmarking.measure import Task, generate, make_task
from benchmarking.shapes import SHAPES, random_llama
from command_line import Parser, exit_code, named_path, say
from npllama.backend import get_backend
from npllama.console import open_streams
from npllama.errors import InputError
from npllama.llama import Llama
from npllama.weight_formats import FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    options = _parser().parse_args(arguments)
    return exit_code("measure_threads", lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    for name in ("prompt_tokens", "new_tokens", "requests", "runs"):
        if getattr(options, name) < 1:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is {getattr(options, name)}: expected at least 1")
    llama = _open(options)
    n_ids = llama.config.vocab_size if llama.tokenizer is None else llama.tokenizer.vocab_size
    task = make_task([options.prompt_tokens], options.new_tokens, n_ids)
    main_thread, other = one_request(llama, task, options.runs)
    say(f"one request: {main_thread:.3f} s in the main thread, {other:.3f} s in another thread,")
    say(f"    ratio {other / main_thread:.2f}")
    in_turn, at_once = many_requests(llama, task, options.requests, options.runs)
    say(f"{options.requests} requests: {in_turn:.3f} s in sequence, {at_once:.3f} s at once,")
    say(f"    ratio {at_once / in_turn:.2f}")
    in_turn, served = served_requests(llama, task, options.requests, options.runs)
    say(f"{options.requests} requests: {in_turn:.3f} s in sequence, {served:.3f} s by a server,")
    say(f"    ratio {served / in_turn:.2f}, {in_turn / served:.2f} times as many tokens per second")


def one_request(llama: Llama, task: Task, n_runs: int) -> tuple[float, float]:
    """Median seconds of a request in this thread and in another one, in alternating runs."""
    with ThreadPoolExecutor(1) as pool:
        return _side_by_side(
            lambda: generate(llama, task),
            lambda: pool.submit(generate, llama, task).result(),
            n_runs,
        )


def many_requests(llama: Llama, task: Task, n: int, n_runs: int) -> tuple[float, float]:
    """Median seconds of n requests in sequence, and of n requests at once in n threads."""
    with ThreadPoolExecutor(n) as pool:
        return _side_by_side(
            lambda: [generate(llama, task) for _ in range(n)],
            lambda: list(pool.map(lambda _: generate(llama, task), range(n))),
            n_runs,
        )


def served_requests(llama: Llama, task: Task, n: int, n_runs: int) -> tuple[float, float]:
    """Median seconds of n requests in sequence, and of n threads that share one server."""
    (prompt,) = task.prompts
    options = {"max_new_tokens": task.new_tokens, "ignore_eos": True, "temperature": 0}
    context = len(prompt) + task.new_tokens
    with llama.server(batch_size=n, context=context) as server, ThreadPoolExecutor(n) as pool:
        return _side_by_side(
            lambda: [generate(llama, task) for _ in range(n)],
            lambda: list(pool.map(lambda _: server.generate(prompt, **options), range(n))),
            n_runs,
        )


def _side_by_side(
    one: Callable[[], object], two: Callable[[], object], n_runs: int
) -> tuple[float, float]:
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in range(n_runs + 1):
        for function, times in zip((one, two), seconds, strict=True):
            begin = time.perf_counter()
            function()
            if run > 0:  # the first run warms up
                times.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _open(options: argparse.Namespace) -> Llama:
    if options.model is not None:
        return npllama.load(options.model, "numpy", options.dtype, threads=options.threads)
    config = SHAPES[options.shape]
    backend = get_backend("numpy", options.threads)
    return random_llama(config, backend, options.dtype or "float32", config.context_length)


def _parser() -> argparse.ArgumentParser:
    p = Parser("measure_threads", __doc__.split("\n")[0])
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=named_path, metavar="DIR", help="a model directory")
    which.add_argument("--shape", choices=tuple(SHAPES), help="random weights in memory")
    p.add_argument(
        "--dtype",
        choices=tuple(FORMATS),
        help="dtype of the weights in memory (default: as stored; float32 for a shape)",
    )
    p.add_argument("--threads", type=int, metavar="N", help="(default: one per free core)")
    for name, default in (("prompt-tokens", 32), ("new-tokens", 32), ("requests", 4), ("runs", 5)):
        p.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)"
        )
    return p


if __name__ == "__main__":
    sys.exit(main())
