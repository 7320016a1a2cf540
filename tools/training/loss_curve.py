"""The loss over the steps of a run, as CSV and as a picture."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from npllama.errors import InputError


@dataclass(frozen=True)
class Point:
    """One line of the CSV: losses in nats a token, validation only where it was measured."""

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    gradient_norm: float
    train_loss: float
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None


_COLUMNS = [field.name for field in fields(Point)]


def begin_curve(path: Path, steps: int) -> None:
    """Keep the lines of the first `steps` steps of an earlier try, or begin a new file."""
    rows = []
    if path.exists() and steps:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= steps]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def add_point(path: Path, point: Point) -> None:
    """Append one line."""
    row = {
        name: value if value is None or isinstance(value, int) else f"{value:.6g}"
        for name, value in asdict(point).items()
    }
    with open(path, "a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, _COLUMNS).writerow(row)


def check_matplotlib() -> None:
    """Raise InputError where a picture cannot be drawn, before hours are spent."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "--plot needs matplotlib: install npllama's extra [plot], or leave --plot out; "
            "the loss curve is in loss.csv all the same"
        ) from None


def draw_curve(csv_path: Path, png_path: Path) -> None:
    """Train and validation loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")  # a file, not a window
    from matplotlib import pyplot

    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for column, label in (("train_loss", "train"), ("valid_loss", "validation")):
        points = [(int(row["tokens"]) / 1e6, float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(png_path, dpi=120)
    pyplot.close(figure)
