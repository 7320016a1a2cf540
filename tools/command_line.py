"""What the command lines of all tools share: parser, errors, output."""

import argparse
from pathlib import Path
from typing import NoReturn

from npllama.console import WRONG_INPUT, started_as, write
from npllama.console import exit_code as exit_code  # for the tools


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that begin with the tool's name."""

    def __init__(self, tool: str, description: str, **settings: object) -> None:
        super().__init__(
            prog=started_as(tool, f"python tools/{tool}.py"), description=description, **settings
        )
        self.tool = tool

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.tool}: error: {message} (--help lists all options)\n")


def named_path(text: str) -> Path:
    """Convert an argument that names a file or directory.

    Raises:
        argparse.ArgumentTypeError: it is empty. Path would take it for the current directory.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty: expected the name of a file or directory")
    return Path(text)


def say(text: str) -> None:
    """Write a line to standard output.

    Raises:
        InputError: standard output is closed, is a pipe without a reader, or is on a full disk.
    """
    write(text + "\n")
