"""Compares npllama with transformers on the same GPU, eager and compiled: 1.1b float16, batch 1."""

import importlib.util
import json
import os
import subprocess
import sys

from benchmarking.shapes import SHAPES
from checking_gpu.decode import Case, run_cases
from checking_gpu.results import FAILED
from checking_gpu.stage import Stage, main

WORKER = "checking_gpu.transformers_worker"
SHAPE, DTYPE, CONTEXT, NEW_TOKENS = "1.1b", "float16", 512, 64
OURS = f"{SHAPE} {DTYPE}, context {CONTEXT}"
LEAST = {"eager": 4.0, "compiled": 1.0}
"""Bars for npllama's tokens/s divided by those of transformers, by mode."""


def run(stage: Stage) -> None:
    """Measure npllama's speed unless a stage has done so, and add one row per transformers mode."""
    missing = [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]
    if missing:
        stage.add("transformers", f"not run: {' and '.join(missing)} not installed here")
        return
    if stage.tiny:
        stage.add("transformers", "not run with --tiny")
        return
    if stage.results.number(OURS) is None:
        run_cases(stage, {(SHAPE, DTYPE): (Case(CONTEXT),)})
        stage.backend().xp.get_default_memory_pool().free_all_blocks()
    for way, least in LEAST.items():
        _transformers(stage, way, least)


def _transformers(stage: Stage, way: str, least: float) -> None:
    """Run transformers in a process of its own, whose last output line is JSON."""
    job = {
        "config": SHAPES[SHAPE].to_hf(DTYPE),
        "dtype": DTYPE,
        "context": CONTEXT,
        "new_tokens": NEW_TOKENS,
        "way": way,
    }
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    limit = stage.seconds_left() - 3
    if way == "eager":
        limit = min(limit, 40)
    name = f"transformers {way}, {SHAPE} {DTYPE}"
    if limit < 5:
        stage.add(name, "no time left")
        return
    try:
        done = subprocess.run(
            [sys.executable, "-m", WORKER, json.dumps(job)],
            capture_output=True,
            text=True,
            timeout=limit,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        stage.add(name, "timed out", "", FAILED)
        return
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        lines = done.stderr.strip().splitlines() or ["(it printed nothing)"]
        stage.add(name, lines[-1][:200], "", FAILED)
        return
    found = json.loads(done.stdout.strip().splitlines()[-1])
    speed = 1 / found["seconds"]
    stage.add(
        f"{name} ({found['versions']})", f"{speed:,.1f} tokens/s, {1e6 / speed:,.0f} us per token"
    )
    ours = stage.results.number(OURS)
    if ours:
        ratio = ours / speed
        stage.bar(f"npllama to transformers {way}", f"{ratio:.2f}", ratio, least)


if __name__ == "__main__":
    sys.exit(main("rival", run))
