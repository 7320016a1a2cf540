"""Runs of pytest on copies of the package, each in a fork of this program.

The imports that every run needs, but not the package, are made once, before the first fork: they
took longer than most runs. Reads a job a line from standard input, {"copy": folder that holds
npllama, "arguments": pytest's}, and writes the run's result as a line to standard output.
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
    """A plugin that keeps the ids of the tests that failed."""

    def __init__(self):
        self.ids = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.ids.append(report.nodeid)


def run(job, output):
    """In the fork: pytest from the copy's folder, which comes first on the path; never returns."""
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
    # The next runs find what one compiles: the copy's files, and the tests as pytest rewrites them
    sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
    gc.freeze()  # a fork's collections need not look at what was imported before
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
