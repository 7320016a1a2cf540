"""Runs pytest on copies of the package, each run in a fork of this process.

This process first imports all modules that every run needs, except for the package, because these
imports take longer than most runs. It reads one JSON job per line from standard input, {"copy": the
folder that contains npllama, "arguments": the arguments of pytest}, and writes one line with the
result per job to standard output.
"""

import gc
import json
import os
import sys
import tempfile

import ml_dtypes  # noqa: F401
import numpy.random  # noqa: F401
import pytest
import safetensors.numpy  # noqa: F401
import sentencepiece  # noqa: F401
import threadpoolctl  # noqa: F401
import tqdm  # noqa: F401


class Failed:
    """A pytest plugin that collects the ids of failed tests."""

    def __init__(self):
        self.ids = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.ids.append(report.nodeid)


def run(job, output):
    """Run pytest in the forked process, with the copy first on the import path. Never returns."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.chdir(job["copy"])
    sys.path[0] = job["copy"]
    failed, code = Failed(), None
    try:
        code = int(pytest.main(job["arguments"], plugins=[failed]))
        import npllama

        assert npllama.__file__.startswith(job["copy"]), f"{npllama.__file__} was tested"
    except BaseException as error:
        code = ascii(error)
    print()
    print(json.dumps({"code": code, "failed": failed.ids}), flush=True)
    os._exit(0)


def main():
    # Cache the bytecode of the copy and of the rewritten tests, so later runs can use it.
    sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
    gc.freeze()  # the garbage collector of a fork then skips the imported objects
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            pid = os.fork()
            if pid == 0:
                run(json.loads(line), output)
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            text = output.read()
        result = {"code": f"ended by status {status}", "failed": []}
        if status == 0:
            text, _, last = text.rstrip("\n").rpartition("\n")
            result = json.loads(last)
        print(json.dumps(result | {"output": text}), flush=True)


if __name__ == "__main__":
    main()
