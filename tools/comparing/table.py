"""The differences as a table for a terminal."""

from collections.abc import Sequence

from comparing.differences import Differences, OfPhase
from comparing.truth import Truth

GAP = "  "


def as_text(title: str, truth: Truth, found: Sequence[Differences]) -> str:
    """One line per operation, one column per implementation, the worst layer in brackets."""
    names = list(dict.fromkeys(name for d in found for name in _operations(d, "decode")))
    single = list(dict.fromkeys(name for d in found for name in _operations(d, "prompt")))
    fused = [name for name in names if name not in single]
    if not any(d.kernels for d in found):
        fused = []  # without kernels these would repeat the single operations
    rows = [["", *(d.name for d in found)]]
    for kind, words in (
        ("prompt", f"a prompt of {len(truth.prompt)} tokens"),
        ("decode", f"one token after {len(truth.prompt)}"),
    ):
        rows.append([f"{words}, operations on float64's inputs"])
        for name in [*single, *(fused if kind == "decode" else [])]:
            cells = [_worst(_operations(d, kind).get(name)) for d in found]
            rows.append([f"  {name}", *cells])
        rows.append(["  head", *(_number(d.phases[kind].head) for d in found)])
        rows.append([f"{words}, from the embedding on"])
        for i in range(truth.config.n_layers):
            cells = [_number(d.phases[kind].layers[i]) for d in found]
            rows.append([f"  layer {i}", *cells])
        rows.append(["  logits", *(_number(d.phases[kind].logits) for d in found)])
    lines = [title, *_aligned(rows)]
    lines += [f"greedy ids, {d.name}: {_ids(d, truth)}" for d in found]
    return "\n".join(lines)


def worst_of(phase: OfPhase) -> tuple[str, int, float]:
    """Operation, layer and value of the largest difference of a single operation."""
    return max(
        ((name, i, x) for name, layers in phase.operations.items() for i, x in enumerate(layers)),
        key=lambda found: found[2],
    )


def _operations(found: Differences, kind: str) -> dict[str, list[float]]:
    return found.phases[kind].operations


def _ids(found: Differences, truth: Truth) -> str:
    n, all_ = found.equal_ids, len(truth.ids)
    if n == all_:
        return f"all {all_} as in float64"
    return (
        f"differ from float64's at token {n + 1} of {all_}, where float64's largest logit is "
        f"{truth.gaps[n]:.2g} above the second largest"
    )


def _worst(layers: Sequence[float] | None) -> str:
    if layers is None:
        return "-"
    i = max(range(len(layers)), key=layers.__getitem__)
    return f"{_number(layers[i])} ({i})"


def _number(x: float) -> str:
    return f"{x:.1e}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns. A row with one cell is a heading and may be wider."""
    whole = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] if len(row) > 1 else [row[0]]
        cells += [cell.ljust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append(GAP.join(cells).rstrip())
    return lines
