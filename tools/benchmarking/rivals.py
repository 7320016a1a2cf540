"""Programs to compare with on the same task: transformers, or any command that prints its speed."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from benchmarking.measure import Sample, Task
from benchmarking.peak_memory import PeakMemory
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.errors import InputError, OutOfMemoryError
from npllama.weight_formats import FORMATS

WORKER = Path(__file__).with_name("transformers_worker.py")

_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_UNIT = r"(?:tok(?:en)?s?/s(?:ec(?:ond)?)?|tokens per second)\b"
# "61.2 tokens/s", or in llama2.c's form, "achieved tok/s: 61.2"
_SPEED = re.compile(rf"({_NUMBER})\s*{_UNIT}|{_UNIT}\s*[:=]\s*({_NUMBER})", re.IGNORECASE)


def check_installed() -> None:
    """Raise InputError if torch or transformers is missing. Neither is imported."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--compare hf needs {package}, which is not installed here: "
                "pip install '.[reference]'"
            )


class Transformers:
    """Hugging Face transformers on the CPU, with random weights of the same shapes.

    It runs in a process of its own, which is started once and then asked for each run. transformers
    has no equivalent of int8, so for int8 it computes in float32.

    Raises:
        InputError: transformers failed. The message has the last line of its output.
        OutOfMemoryError: memory cannot hold a second model.
    """

    def __init__(self, config: LlamaConfig, dtype: str, task: Task, n_threads: int) -> None:
        self.dtype = FORMATS[dtype].torch_dtype
        self.name = f"transformers {self.dtype}"
        self.task = task
        nbytes = config.n_parameters * FORMATS[self.dtype].dtype.itemsize
        free = Backend().free_bytes()
        if free is not None and nbytes > free:
            raise OutOfMemoryError(
                f"--compare hf needs {nbytes / 1e9:.2f} GB for a second model, but only "
                f"{free / 1e9:.2f} GB are free: compare a smaller shape or a narrower --dtype"
            )
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the other
            env=dict(os.environ) | {"HF_HUB_OFFLINE": "1"},
        )
        job = {
            "config": config.to_hf(self.dtype),
            "dtype": self.dtype,
            "threads": n_threads,
            "prompts": task.prompts,
            "new_tokens": task.new_tokens,
        }
        self.versions = self._ask(json.dumps(job))["versions"]
        with PeakMemory(self._process.pid) as peak:  # this run is also the warm-up
            self.run()
        self.peak_nbytes = peak.nbytes

    def run(self) -> Sample:
        seconds = self._ask("run")
        task = self.task
        return Sample(
            prefill=sum(task.lengths) / seconds["prefill_seconds"],
            decode=len(task.prompts) * task.decode_steps / seconds["decode_seconds"],
            first_token=seconds["prefill_seconds"],
        )

    def __enter__(self) -> "Transformers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if not self._stderr.closed:
            self._process.kill()
            self._process.communicate()
            self._stderr.close()

    def _ask(self, line: str) -> dict:
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace")
            self._close()
            raise InputError(f"--compare hf: transformers failed: {_last_line(said)}")
        return json.loads(answer)


class Command:
    """A program that prints its speed. Each run starts it again.

    The speed is the last number before "tok/s", "tokens/s" or "tokens per second", or after
    "tok/s:", on standard output or standard error.

    Args:
        command: written as for a shell, but run without one.
        n_threads: value of OMP_NUM_THREADS, unless the variable is already set.
    """

    def __init__(self, command: str, n_threads: int) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--compare-command {command!r}: {error}") from None
        if not self._words:
            raise InputError("--compare-command is empty: expected a program and its arguments")
        if shutil.which(self._words[0]) is None:
            raise InputError(
                f"--compare-command: program {self._words[0]!r} was not found: expected a program "
                "on the PATH, or its path"
            )
        self.name = command
        self._program = Path(self._words[0]).name
        self._n_threads = n_threads

    def run(self) -> Sample:
        """Run the program to its end, and read its speed.

        Raises:
            InputError: the program cannot be started, fails, or prints no speed.
        """
        threads = {"OMP_NUM_THREADS": str(self._n_threads)}
        try:
            done = subprocess.run(
                self._words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=threads | dict(os.environ),
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--compare-command {self._program} cannot be run: {reason}") from None
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise InputError(
                f"--compare-command {self._program} ended with code {done.returncode}: "
                f"{_last_line(said)}"
            )
        speed = printed_speed(said)
        if not speed:
            raise InputError(
                f"--compare-command {self._program} printed no speed: expected a number above 0 "
                f'before "tok/s" or "tokens/s"; its last line is: {_last_line(said)}'
            )
        return Sample(prefill=None, decode=speed, first_token=None)


def printed_speed(text: str) -> float | None:
    """The last number of tokens per second in `text`, or None.

    >>> printed_speed("prompt 80.5 tokens/s, decode 1,061.2 tok/s; 3 s")
    1061.2
    >>> printed_speed("achieved tok/s: 69.25")
    69.25
    """
    found = _SPEED.findall(text)
    if not found:
        return None
    return float("".join(found[-1]).replace(",", ""))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "(it printed nothing)"
