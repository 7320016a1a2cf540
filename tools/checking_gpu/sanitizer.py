"""Runs a few launches under compute-sanitizer, to find invalid memory accesses and races."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from checking_gpu.launches import DTYPES
from checking_gpu.results import FAILED, OK
from checking_gpu.stage import Stage, main

LAUNCHES = "checking_gpu.launches"
TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def run(stage: Stage) -> None:
    """Add one row per tool of the sanitizer."""
    program = _program()
    if program is None:
        stage.add("compute-sanitizer", "not run: not found here (it comes with CUDA's toolkit)")
        return
    tools = TOOLS[:1] if stage.tiny else TOOLS
    for i, tool in enumerate(tools):
        limit = (stage.seconds_left() - 2) / (len(tools) - i)
        stage.attempt(tool, _sanitize, stage, program, tool, limit)


def _sanitize(stage: Stage, program: str, tool: str, limit: float) -> None:
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", LAUNCHES, *(DTYPES[:1] if stage.tiny else DTYPES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        stage.add(tool, "timed out", "", FAILED)
        return
    said = done.stdout + done.stderr
    print(said, file=sys.stderr)
    summary = re.findall(r"=+ ?((?:ERROR|RACECHECK) SUMMARY: .*)", said)
    figure = summary[-1] if summary else (said.strip().splitlines() or ["no output"])[-1][:200]
    stage.add(tool, figure, "0 errors", OK if done.returncode == 0 and summary else FAILED)


def _program() -> str | None:
    """compute-sanitizer from the PATH, a CUDA toolkit, or one of NVIDIA's wheels."""
    wheels = [str(p.parent) for s in sys.path for p in Path(s).glob("nvidia/*/bin/compute-san*")]
    for place in (None, *PLACES, *wheels):
        found = shutil.which("compute-sanitizer", path=place)
        if found is not None:
            return found
    return None


if __name__ == "__main__":
    sys.exit(main("sanitizer", run))
