"""The figures as Markdown tables, and the definition of their columns."""

from collections.abc import Callable, Sequence

from benchmarking.figures import Program, Ratio, Spread
from benchmarking.step_profile import OpTime

UNKNOWN = "–"

COLUMNS: list[tuple[str, Callable[[Program], str]]] = [
    ("prefill tokens/s", lambda p: of_runs(p.prefill_tokens_per_second)),
    ("prefill of roofline", lambda p: of_runs(p.prefill_of_roofline, 2)),
    ("prefill GFLOP/s", lambda p: of_median(p.prefill_gigaflops)),
    ("decode tokens/s", lambda p: of_runs(p.decode_tokens_per_second)),
    ("decode of roofline", lambda p: of_runs(p.decode_of_roofline, 2)),
    ("decode GB/s", lambda p: of_median(p.decode_gigabytes_per_second)),
    ("decode GFLOP/s", lambda p: of_median(p.decode_gigaflops)),
    ("first token ms", lambda p: of_median(p.first_token_seconds, 1e3)),
    ("load s", lambda p: one(p.load_seconds)),
    ("load to first token s", lambda p: one(p.load_to_first_token_seconds)),
    ("memory MB", lambda p: one(p.peak_bytes, 1e-6)),
]
PROFILE_TITLES = ("op", "calls", "us", "share")


def programs_table(programs: Sequence[Program]) -> str:
    """One row per program. For several runs, a cell is "median (min to max)"."""
    titles = [title for title, _ in COLUMNS]
    rows = [[p.name.replace("|", "\\|"), *(cell(p) for _, cell in COLUMNS)] for p in programs]
    return markdown(["", *titles], rows)


def ratio_line(ratio: Ratio) -> str:
    """A sentence that states npllama's speed relative to another program's."""
    text = f"Of {ratio.to}: decode {of_runs(ratio.decode, 2)} x"
    if ratio.prefill is not None:
        text += f", prefill {of_runs(ratio.prefill, 2)} x"
    return text + "."


def profile_table(lines: Sequence[OpTime]) -> str:
    """One row per op of a decode step, and their sum."""
    return markdown(PROFILE_TITLES, profile_rows(lines))


def profile_rows(lines: Sequence[OpTime]) -> list[list[str]]:
    """The cells of PROFILE_TITLES for each op and for their sum."""
    rows = [
        [line.op, f"{line.calls:g}", f"{line.seconds * 1e6:,.1f}", f"{line.share:.1%}"]
        for line in lines
    ]
    step = sum(line.seconds for line in lines)
    rows.append(["decode step", "", f"{step * 1e6:,.1f}", f"{sum(x.share for x in lines):.1%}"])
    return rows


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are right-aligned numbers."""
    lines = [titles, ["---", *(["---:"] * (len(titles) - 1))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def of_runs(figure: Spread | None, digits: int | None = None) -> str:
    """ "53.1 (52.0 to 54.2)", or only the median if all runs agree."""
    if figure is None:
        return UNKNOWN
    median, least, most = (number(x, digits) for x in (figure.median, figure.min, figure.max))
    return median if least == most else f"{median} ({least} to {most})"


def of_median(figure: Spread | None, factor: float = 1.0) -> str:
    """The median in another unit."""
    return one(None if figure is None else figure.median, factor)


def one(value: float | None, factor: float = 1.0) -> str:
    """A number in another unit, or a dash if unknown."""
    return UNKNOWN if value is None else number(value * factor)


def number(value: float, digits: int | None = None) -> str:
    """A number with `digits` decimals; by default with three significant digits."""
    if digits is None:
        digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"
