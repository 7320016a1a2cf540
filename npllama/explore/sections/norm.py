"""3: RMSNorm before and after, and why not LayerNorm."""

import numpy as np

from npllama.explore.figures.norm import norm_before_after, norm_kinds
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    before, after = run.embedded, run.layers[0].normed
    size = np.sqrt((before * before).mean(axis=-1))  # (T,)
    return Section(
        slug="norm",
        title="RMSNorm: every layer reads input of the same size",
        idea=(
            say(
                "Layers add to the stream, so its elements grow with depth (section 9), and they "
                "grow differently for each token. The output of a matrix product grows with its "
                "input; a softmax of large scores would be nearly one-hot, and training would be "
                "unstable."
            ),
            say(
                "RMSNorm divides each token's vector by its <em>root mean square</em>, the "
                "typical size of its elements, and multiplies each element by a learned weight. "
                "The direction of the vector counts from then on, its length does not. LLaMA "
                "normalizes the <em>input</em> of attention and of the feed-forward network, and "
                "leaves the stream itself as it is."
            ),
            say(
                "<strong>Why not LayerNorm?</strong> LayerNorm, of the first transformers, also "
                "subtracts the mean of the elements and adds a learned bias. Zhang and Sennrich "
                "found that the rescaling brings the benefit and that the subtraction can be left "
                "out. RMSNorm needs one sum over the elements in place of two, and no bias."
            ),
        ),
        equations=(
            r"\text{RMSNorm}(x) = \frac{x}{\sqrt{\frac{1}{D}\sum_{d=1}^{D} x_d^2 + \epsilon}}"
            r" \odot w",
            r"\text{LayerNorm}(x) = \frac{x - \bar{x}}{\sqrt{\frac{1}{D}\sum_{d=1}^{D}"
            r" (x_d - \bar{x})^2 + \epsilon}} \odot w + b",
        ),
        functions=(Function(Ops.rms_norm, ("test_rms_norm_divides_by_the_root_mean_square",)),),
        shapes=(
            shape("x", "T, D", n, c.dim),
            shape("mean of x²", "T, 1", n, 1),
            shape("w", "D", c.dim),
        ),
        parts=(
            Picture(
                norm_before_after(run.pieces, before, after, size),
                say(
                    "The elements of each token before and after the RMSNorm of the first "
                    "attention."
                ),
            ),
            Picture(
                norm_kinds(before[-1], after[-1], run.layer_normed[-1]),
                say(
                    "The elements of {last} under both norms, with the same weight and no bias.",
                    last=piece(run.pieces[-1]),
                ),
            ),
        ),
        see=_see(run, size),
    )


def _see(run: Record, size: np.ndarray) -> tuple:
    x, normed, other = run.embedded[-1], run.layers[0].normed[-1], run.layer_normed[-1]
    moved = np.linalg.norm(normed - other) / max(np.linalg.norm(normed), 1e-30)
    deep = np.sqrt((run.layers[-1].hidden ** 2).mean(axis=-1))
    return (
        say(
            "Before the first block the root mean squares lie between {low:.3g} and {high:.3g}; "
            "after the last block they lie between {deep_low:.3g} and {deep_high:.3g}. RMSNorm "
            "brings each of them to 1 before it multiplies by the weight.",
            low=size.min(),
            high=size.max(),
            deep_low=deep.min(),
            deep_high=deep.max(),
        ),
        say(
            "The mean of the last token's elements is {mean:.3g}, which is {share:.1%} of their "
            "root mean square. Subtracting it too, as LayerNorm does, would change the result by "
            "{moved:.1%} of its length.",
            mean=float(x.mean()),
            share=abs(float(x.mean())) / max(float(size[-1]), 1e-30),
            moved=float(moved),
        ),
    )
