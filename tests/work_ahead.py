"""Starts the slow work of some test files before their turn, on a core that other tests leave idle.

Such a file is also a program. Run with the arguments that its function work_arguments(items)
returns for the selected tests, it does the work in an empty current directory, and writes the
results as JSON, the last line of its output. Its priority is low, so the tests of other files get
the time that they need.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


class WorkAhead:
    """The running programs, by test module."""

    def __init__(self, new_folder):
        self._new_folder, self._processes = new_folder, {}

    def start(self, items):
        """Start the programs for the selected tests, except for those that run already."""
        modules = {item.module for item in items if hasattr(item.module, "work_arguments")}
        for module in sorted(modules - self._processes.keys(), key=lambda module: module.__name__):
            arguments = module.work_arguments([i for i in items if i.module is module])
            if arguments:
                folder = self._new_folder(module.__name__)
                self._processes[module] = _started(module.__file__, arguments, folder)
            else:
                self._processes[module] = None

    def start_program(self, name, arguments):
        """Start a program of the folder tests/ that has no result, unless it runs already."""
        if name not in self._processes:
            folder = self._new_folder(name)
            self._processes[name] = _started(ROOT / "tests" / f"{name}.py", arguments, folder)

    def result(self, module):
        """Wait for the program of a module, and return its results."""
        process = self._processes[module]
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output
        return json.loads(output.splitlines()[-1])

    def end(self):
        """Kill the programs whose results nobody needed, with their own child processes."""
        for process in filter(None, self._processes.values()):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _started(file, arguments, folder):
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        ["nice", "-n", "10", sys.executable, file, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group of its own, which Ctrl-C does not reach
    )
