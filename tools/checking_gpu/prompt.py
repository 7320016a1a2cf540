"""Reads a prompt of 2,048 tokens; compares its FLOP/s with the GPU's for float16 products."""

import statistics
import sys

from benchmarking.measure import Task, generate, make_task
from benchmarking.shapes import prefill_flops
from checking_gpu.limits import MATMUL_WIDTH, matmul_rate
from checking_gpu.models import shape_llama
from checking_gpu.stage import Stage, main

N_TOKENS = 2048
LEAST = {("7b", "float16"): 0.4, ("1.1b", "float16"): None, ("7b", "int8"): None}
"""Bar of each model, the most important model first."""


def run(stage: Stage) -> None:
    """Add a row for the rate of products, and one row per model."""
    width = 64 if stage.tiny else MATMUL_WIDTH
    rate = stage.attempt("float16 products", _rate, stage, width)
    for (shape, dtype), least in LEAST.items():
        stage.attempt(f"{shape} {dtype}", _prompt, stage, shape, dtype, rate, least, needs=5)


def _rate(stage: Stage, width: int) -> float:
    rate = matmul_rate(stage.backend(), width)
    stage.add(f"float16 products, {width} x {width}", f"{rate / 1e12:,.0f} TFLOP/s")
    return rate


def _prompt(stage: Stage, shape: str, dtype: str, rate: float | None, least: float | None) -> None:
    llama = shape_llama(shape, stage.backend(), dtype, stage.tiny)
    n_tokens = 40 if stage.tiny else N_TOKENS
    task = make_task([n_tokens], 1, llama.config.vocab_size)
    generate(llama, Task(task.prompts, 1))  # warms up
    runs = [generate(llama, task).prefill for _ in range(1 if stage.tiny else 3)]
    speed = statistics.median(runs)
    flops = prefill_flops(llama.config, task.lengths) / n_tokens * speed
    name = f"{shape} {dtype}, {n_tokens} tokens"
    figure = f"{speed:,.0f} tokens/s, {flops / 1e12:,.1f} TFLOP/s"
    if rate is None:
        stage.add(name, figure)
    else:
        stage.bar(name, f"{flops / rate:.3f} of the products: {figure}", flops / rate, least)


if __name__ == "__main__":
    sys.exit(main("prompt", run))
