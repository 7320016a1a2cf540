"""2: the embedding's rows."""

from markupsafe import Markup

from npllama.explore.figures.embedding import embedding_rows
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    return Section(
        slug="embedding",
        title="Each id selects a row",
        idea=(
            say(
                "The embedding matrix <var>W</var> has one row for each of the {v} ids. A row has "
                "<var>D</var> = {d} elements, which were learned in training. The vector of a "
                "token is a copy of the row of its id.",
                v=f"{c.vocab_size:,}",
                d=f"{c.dim:,}",
            ),
            say(
                "From here on the text is a matrix <var>x</var> with one row per token, the "
                "<em>residual stream</em>. Each later part of the model reads <var>x</var> and "
                "adds to it; section 9 says why."
            ),
        ),
        equations=(r"x_t = \text{row } i_t \text{ of } W",),
        functions=(Function(Ops.embedding, ("test_embedding_takes_rows",)),),
        shapes=(
            shape("W", "V, D", c.vocab_size, c.dim),
            shape("x", "T, D", n, c.dim),
        ),
        parts=(
            Picture(
                embedding_rows(run.pieces, run.embedded),
                say("One row per token, one column per element of its vector."),
            ),
        ),
        see=(_repeated(run), _no_position()),
    )


def _repeated(run: Record) -> Markup:
    shown = run.pieces
    twice = next((p for p in shown if shown.count(p) > 1), None)
    if twice is None:
        return say("No piece occurs twice here. If one did, its rows would be equal.")
    places = [str(run.start + i) for i, p in enumerate(shown) if p == twice]
    return say(
        "{piece} is at positions {places}. Its rows there are equal.",
        piece=piece(twice),
        places=", ".join(places[:-1]) + " and " + places[-1],
    )


def _no_position() -> Markup:
    return say(
        "A row depends only on the id, and not yet on the position or on the other tokens. RoPE "
        "brings in the position (section 5), and attention the other tokens (section 6)."
    )
