"""10: the logit lens."""

import numpy as np

from npllama.explore.figures.lens import logit_lens
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_COLUMNS = 10


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    lens, few = run.lens, slice(-_COLUMNS, None)
    top = [[run.piece(id_) for id_ in row[few]] for row in lens.ids[:, :, 0]]
    return Section(
        slug="lens",
        title="The logit lens: what the model would say after every layer",
        idea=(
            say(
                "After the last block the head normalizes the stream and compares it with one row "
                "per piece of the vocabulary. The dot products are the <em>logits</em>, and their "
                "softmax is the probability of each next token."
            ),
            say(
                "Every layer writes to the same stream, so the same head can be applied after any "
                "of them. This <em>logit lens</em> shows a guess taking shape."
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
                    "The likeliest next token after the embedding and after each layer, {columns}"
                    "with its probability. <strong>Limits:</strong> the head was trained for the "
                    "last layer alone. In earlier layers, whose directions differ, the lens can "
                    "show noise although the layer holds the answer (nostalgebraist 2020; "
                    "Belrose et al. 2023 correct it by a learned map per layer, the tuned lens).",
                    columns="" if n <= _COLUMNS else f"of the last {_COLUMNS} tokens, ",
                ),
            ),
        ),
        see=_see(run),
    )


def _see(run: Record) -> tuple:
    lens = run.lens
    final = int(lens.ids[-1, -1, 0])
    agrees = lens.ids[:, -1, 0] == final
    since = len(agrees) - int(np.argmin(agrees[::-1])) if not agrees.all() else 0
    when = "already at the embedding" if since == 0 else f"from layer {since - 1} on"
    own = lens.ids[0, :, 0] == np.array(run.ids[run.start :])
    tied = (
        say(
            "The first row repeats the tokens themselves: the head of this model is its embedding "
            "matrix (tied), and a row resembles itself most. The layers turn <q>this token</q> "
            "into <q>the next one</q>."
        ),
    )
    return (
        say(
            "After {last} the model's likeliest token is {top}, with a probability of {p:.1%}. "
            "The lens shows it {when}.",
            last=piece(run.pieces[-1]),
            top=piece(run.piece(final)),
            p=float(lens.probability[-1, -1, 0]),
            when=when,
        ),
        say(
            "The entropy at this position goes from {begin:.1f} bits after the embedding to "
            "{end:.1f} bits after the last layer; 0 bits would be certainty, {even:.1f} bits an "
            "even choice among all {v} pieces.",
            begin=float(lens.entropy[0, -1]),
            end=float(lens.entropy[-1, -1]),
            even=float(np.log2(run.config.vocab_size)),
            v=f"{run.config.vocab_size:,}",
        ),
        *(tied if run.config.tie_embeddings and own.mean() > 0.5 else ()),
    )
