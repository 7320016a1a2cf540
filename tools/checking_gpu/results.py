"""The table that the stages fill row by row, in a file, so that a stage that is ended loses none.

python -m checking_gpu.results DIR                       prints the table
python -m checking_gpu.results DIR STAGE CODE LOG        adds a row: the stage ended badly
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

OK, BELOW, DIFFERS, FAILED = "ok", "below", "differs", "failed"
TIMED_OUT = (124, 137)  # exit codes of `timeout`
TITLES = ("stage", "what", "figure", "bar", "")


class Results:
    """The rows of a run of check_gpu.sh, and numbers that later stages compare with."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._rows = self.directory / "rows.jsonl"
        self._numbers = self.directory / "numbers.json"

    def add(self, stage: str, what: str, figure: str, bar: str = "", verdict: str = "") -> None:
        """Write a row, and print it."""
        row = [stage, what, " ".join(figure.split()), bar, verdict]
        with self._rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(part for part in row[1:] if part), flush=True)

    def bar(self, stage: str, what: str, figure: str, value: float, least: float) -> None:
        """A row with the number that `value` must reach."""
        verdict = OK if value >= least else BELOW
        self.add(stage, what, figure, f"at least {least:g}", verdict)

    def rows(self) -> list[list[str]]:
        if not self._rows.exists():
            return []
        return [json.loads(line) for line in self._rows.read_text().splitlines()]

    def keep(self, name: str, number: float) -> None:
        """Keep a number for the stages that follow."""
        numbers = self._read_numbers() | {name: number}
        self._numbers.write_text(json.dumps(numbers))

    def number(self, name: str) -> float | None:
        """A number that was kept."""
        return self._read_numbers().get(name)

    def _read_numbers(self) -> dict[str, float]:
        return json.loads(self._numbers.read_text()) if self._numbers.exists() else {}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table; a stage's name stands in its first row alone."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    before = None
    for stage, *cells in rows:
        shown = "" if stage == before else stage
        before = stage
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in (shown, *cells)) + " |")
    return "\n".join(lines)


def why_it_ended(code: int, log: Path) -> str:
    """A stage's exit code and the last line that it wrote to standard error."""
    if code in TIMED_OUT:
        return "its time ran out"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"exit code {code}" + (f": {said[-1][:200]}" if said else "")


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module."""
    results = Results(arguments[0])
    if len(arguments) > 1:
        _directory, stage, code, log = arguments
        results.add(stage, "", why_it_ended(int(code), Path(log)), "", FAILED)
    else:
        print(markdown(results.rows()))


if __name__ == "__main__":
    main(sys.argv[1:])
