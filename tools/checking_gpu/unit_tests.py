"""Runs the project's tests on the GPU, the most important first."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from checking_gpu.results import FAILED, OK
from checking_gpu.stage import Stage, main

ROOT = Path(__file__).parent.parent.parent
FILES = (
    "test_overrides.py",
    "test_equivalence.py",
    "test_kernels_*.py",
    "test_*graph*.py",
    "test_capture*.py",
    "test_prompt*.py",
    "test_decode_step.py",
    "test_generation.py",
    "test_conformance.py",
    "test_sampling.py",
    "test_shipped_model.py",
    "test_model.py",
    "test_kv_cache.py",
    "test_hidden_keys.py",
    "test_derivatives.py",
    "test_gradients.py",
    "test_conversation.py",
    "test_serving.py",
    "test_explore.py",
)
"""Test files in tests/, the most important first."""
N_SHOWN = 8


def run(stage: Stage) -> None:
    """Add one row for all tests, and one for each of the first failures."""
    patterns = ("test_hidden_keys.py",) if stage.tiny else FILES
    files = list(dict.fromkeys(f for p in patterns for f in sorted((ROOT / "tests").glob(p))))
    command = [sys.executable, "-m", "pytest", "--backend", "cupy", "-q", "-rfE", "--tb=line"]
    command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default", "--color=no"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    command += [str(f.relative_to(ROOT)) for f in files]
    said, ended = _output(command, stage.seconds_left() - 4)
    print(said, file=sys.stderr)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+.*)$", said, re.M)
    what = f"pytest --backend cupy, {len(files)} files"
    if ended:
        last = (said.strip().splitlines() or ["no output"])[-1].strip("= ")
        is_ok = not failures and re.match(r"\d+ passed", last)  # "1 failed, 2 passed" is not ok
        stage.add(what, last, "all pass", OK if is_ok else FAILED)
    else:
        marks = "".join(re.findall(r"^[.FEsxX]+(?= *(?:\[|$))", said, re.M))
        n_failed = marks.count("F") + marks.count("E")
        figure = f"timed out: {marks.count('.')} passed, {n_failed} failed until then"
        stage.add(what, figure, "all pass", FAILED)
    for failure in failures[:N_SHOWN]:
        stage.add("", failure[:160], "", FAILED)


def _output(command: list[str], seconds: float) -> tuple[str, bool]:
    """The output of a program, and whether it ended within the time."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            said, _ = process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        return said, False
    return said, True


if __name__ == "__main__":
    sys.exit(main("tests", run))
