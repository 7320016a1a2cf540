"""The table of results. Each row is written to a file at once, so a killed stage loses no rows.

A bar is the value that a figure should reach.

python -m checking_gpu.results DIR                       prints the table
python -m checking_gpu.results DIR STAGE CODE LOG        adds a row for a stage that failed
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

OK, BELOW, DIFFERS, FAILED = "ok", "below", "differs", "failed"
TIMED_OUT = (124, 137)  # exit codes of the command `timeout`
TITLES = ("stage", "what", "figure", "bar", "")


class Results:
    """The rows of a run of check_gpu.sh, and values that later stages compare with."""

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self._rows = self.directory / "rows.jsonl"
        self._numbers = self.directory / "numbers.json"

    def add(self, stage: str, what: str, figure: str, bar: str = "", verdict: str = "") -> None:
        """Write a row to the file, and print it."""
        row = [stage, what, " ".join(figure.split()), bar, verdict]
        with self._rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print("  ".join(part for part in row[1:] if part), flush=True)

    def bar(self, stage: str, what: str, figure: str, value: float, least: float) -> None:
        """Add a row with a bar: `value` should be at least `least`."""
        verdict = OK if value >= least else BELOW
        self.add(stage, what, figure, f"at least {least:g}", verdict)

    def rows(self) -> list[list[str]]:
        if not self._rows.exists():
            return []
        return [json.loads(line) for line in self._rows.read_text().splitlines()]

    def keep(self, name: str, number: float) -> None:
        """Store a number for later stages."""
        numbers = self._read_numbers() | {name: number}
        self._numbers.write_text(json.dumps(numbers))

    def number(self, name: str) -> float | None:
        """A number stored by `keep`; None if there is none."""
        return self._read_numbers().get(name)

    def _read_numbers(self) -> dict[str, float]:
        return json.loads(self._numbers.read_text()) if self._numbers.exists() else {}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The rows as a Markdown table. The name of a stage is only in its first row."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + "---|" * len(TITLES)]
    before = None
    for stage, *cells in rows:
        shown = "" if stage == before else stage
        before = stage
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in (shown, *cells)) + " |")
    return "\n".join(lines)


def why_it_ended(code: int, log: Path) -> str:
    """The reason for a stage's exit code, with the last line of its standard error."""
    if code in TIMED_OUT:
        return "timed out"
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"exit code {code}" + (f": {said[-1][:200]}" if said else "")


def main(arguments: Sequence[str]) -> None:
    """Run the command line, which the module's docstring describes."""
    results = Results(arguments[0])
    if len(arguments) > 1:
        _directory, stage, code, log = arguments
        results.add(stage, "", why_it_ended(int(code), Path(log)), "", FAILED)
    else:
        print(markdown(results.rows()))


if __name__ == "__main__":
    main(sys.argv[1:])
