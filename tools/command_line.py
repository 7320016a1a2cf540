"""What every tool's command line has in common: its parser, its errors, its output."""

import argparse
from typing import NoReturn

from npllama.console import WRONG_INPUT, write
from npllama.console import exit_code as exit_code  # for the tools


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line that begin with the tool's name."""

    def __init__(self, tool: str, description: str, **settings: object) -> None:
        super().__init__(prog=f"python tools/{tool}.py", description=description, **settings)
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.tool}: error: {message} (--help lists all options)\n")


def say(text: str) -> None:
    """A line on standard output.

    Raises:
        InputError: it cannot be written: closed, a pipe without a reader, or a full disk.
    """
    write(text + "\n")
