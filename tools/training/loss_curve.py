"""The loss over the steps of a run, as CSV and as a plot."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from npllama.atomic_file import atomic_file
from npllama.errors import InputError


@dataclass(frozen=True)
class Point:
    """One line of the CSV file. Losses are in nats per token. Validation may be missing."""

    step: int
    tokens: int
    seconds: float
    learning_rate: float
    gradient_norm: float
    train_loss: float
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None


_COLUMNS = [field.name for field in fields(Point)]


def write_curve(path: Path, points: list[Point]) -> None:
    """Write the points as CSV. If writing fails, the old file is kept.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        for point in points:
            writer.writerow(
                {
                    name: f"{value:.6g}" if isinstance(value, float) else value
                    for name, value in asdict(point).items()
                }
            )


def check_matplotlib() -> None:
    """Raise InputError if matplotlib is missing. Called before the training, which takes hours."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "--plot needs matplotlib: install npllama's extra [plot], or leave out --plot; "
            "loss.csv holds the loss curve in any case"
        ) from None


def draw_curve(csv_path: Path, png_path: Path) -> None:
    """Plot training and validation loss over tokens."""
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, not to a window
    from matplotlib import pyplot

    with open(csv_path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for column, label in (("train_loss", "train"), ("valid_loss", "validation")):
        points = [(int(row["tokens"]) / 1e6, float(row[column])) for row in rows if row[column]]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set_xlabel("million tokens")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        with atomic_file(png_path) as partial:
            figure.savefig(partial, dpi=120, format="png")
    finally:
        pyplot.close(figure)
