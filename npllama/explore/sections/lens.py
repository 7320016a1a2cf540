"""10: the logit lens."""

import numpy as np
from markupsafe import Markup

from npllama.explore.figures.lens import MOST_COLUMNS, logit_lens
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    lens, few = run.lens, slice(-MOST_COLUMNS, None)
    top = [[run.piece(id_) for id_ in row[few]] for row in lens.ids[:, :, 0]]
    return Section(
        slug="lens",
        title="The logit lens: what the model would say after every layer",
        idea=(
            say(
                "After the last layer the head normalizes the stream and computes its dot product "
                "with one row per piece of the vocabulary. These products are the "
                "<em>logits</em>, and their softmax is the probability of each next token."
            ),
            say(
                "Every layer adds to the same stream, so the head can be applied after any layer. "
                "This <em>logit lens</em> (nostalgebraist 2020) shows how a guess forms."
            ),
            say(
                "<strong>Limits:</strong> the head was trained for the last layer only. An earlier "
                "layer may hold the answer in directions that the head does not read, and the lens "
                "then shows noise. The tuned lens (Belrose et al. 2023) learns a translation for "
                "each layer."
            ),
        ),
        equations=(
            r"\text{logits}_\ell = \text{RMSNorm}(x_\ell)\,W_{head}^{\top}, \qquad"
            r" p_\ell = \text{softmax}(\text{logits}_\ell)",
        ),
        functions=(
            Function(
                Ops.head,
                ("test_head_is_norm_and_projection",),
                "Touvron et al. 2023a (LLaMA), section 2.2",
            ),
        ),
        shapes=(
            shape("x", "T, D", n, c.dim),
            shape("W head", "V, D", c.vocab_size, c.dim),
            shape("logits", "T, V", n, c.vocab_size),
        ),
        parts=(
            Picture(
                logit_lens(top, lens.probability[:, few, 0], lens.entropy[:, few], run.pieces[few]),
                say(
                    "The likeliest next token after the embedding and after each layer{columns}. "
                    "The entropy at the right is that of the last column, after {last}. "
                    "<strong>Limits:</strong> the head fits the last layer only, so earlier rows "
                    "can be noise.",
                    columns="" if n <= MOST_COLUMNS else f", for the last {MOST_COLUMNS} tokens",
                    last=piece(run.pieces[-1]),
                ),
            ),
        ),
        see=_see(run),
    )


def _see(run: Record) -> tuple[Markup, ...]:
    lens = run.lens
    own = lens.ids[0, :, 0] == np.array(run.ids[run.start :])
    seen = [
        _answer(run),
        say(
            "The entropy after {last} goes from {begin:.2f} bits after the embedding to {end:.2f} "
            "bits after the last layer. A certain prediction has 0 bits, an even choice among all "
            "{v} pieces {even:.2f} bits.",
            last=piece(run.pieces[-1]),
            begin=float(lens.entropy[0, -1]),
            end=float(lens.entropy[-1, -1]),
            even=float(np.log2(run.config.vocab_size)),
            v=f"{run.config.vocab_size:,}",
        ),
    ]
    if run.config.tie_embeddings and own.mean() > 0.5:
        seen.append(
            say(
                "The first row repeats the tokens themselves: the head of this model is its "
                "embedding matrix (tied), and a row resembles itself most. The layers turn "
                "<q>this token</q> into <q>the next one</q>."
            )
        )
    return tuple(seen)


def _answer(run: Record) -> Markup:
    """The final token, and the layer from which on the lens shows it."""
    lens = run.lens
    top = lens.ids[:, -1, 0]  # (L+1,)
    others = np.flatnonzero(top != top[-1])  # rows that show another token
    said = say(
        "After {last} the model's likeliest token is {top}, with a probability of {p:.1%}. ",
        last=piece(run.pieces[-1]),
        top=piece(run.piece(top[-1])),
        p=float(lens.probability[-1, -1, 0]),
    )
    if len(others) == 0:
        return said + say("The lens shows it already after the embedding.")
    since = int(others[-1])  # row i is layer i - 1, so the next row is layer `since`
    is_last = since == run.config.n_layers - 1
    when = "only after the last layer" if is_last else f"from layer {since} on"
    said += say("The lens shows it {when}.", when=when)
    layers = others[others > 0]
    if len(layers) == 0:
        return said
    row = int(layers[lens.probability[layers, -1, 0].argmax()])
    return said + say(
        " The strongest other guess of a layer is {other}, with {p:.1%} after layer {layer}.",
        other=piece(run.piece(top[row])),
        p=float(lens.probability[row, -1, 0]),
        layer=row - 1,
    )
