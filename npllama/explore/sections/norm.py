"""3: RMSNorm before and after, and why not LayerNorm."""

import numpy as np
from markupsafe import Markup

from npllama.explore.figures.norm import norm_kinds, norm_sizes
from npllama.explore.labels import quantity
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    before = sizes(run.hidden[:-1])  # (L, T)
    after = sizes(run.stacked("normed"))  # (L, T)
    return Section(
        slug="norm",
        title="RMSNorm: every layer reads input of the same size",
        idea=(
            say(
                "Each layer adds to the stream (section 9), so its elements grow with depth, and "
                "they grow differently for each token. The output of a matrix product grows with "
                "its input. Attention computes a softmax of such outputs (section 6). A softmax of "
                "large numbers puts nearly everything on one of them and is nearly constant "
                "around that point, so its gradient is nearly zero, and training stalls."
            ),
            say(
                "RMSNorm divides each token's vector by its <em>root mean square</em>, the "
                "typical size of its elements. Then it multiplies each element by a learned "
                "weight. After that only the direction of the vector matters, and its length does "
                "not. LLaMA normalizes the <em>input</em> of attention and of the feed-forward "
                "network, and leaves the stream itself unchanged."
            ),
            say(
                "<strong>Why not LayerNorm?</strong> The LayerNorm of the first transformers also "
                "subtracts the mean of the elements and adds a learned bias. Zhang and Sennrich "
                "(2019) found that the division brings the benefit, and that the subtraction is "
                "not needed. RMSNorm needs one sum over the elements instead of two, and no bias."
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
                norm_sizes(np.maximum(before, 1e-30), np.maximum(after, 1e-30)),
                say(
                    "The root mean square of each token's elements before and after the RMSNorm "
                    "of each layer's attention. The learned weight <var>w</var> is included, so "
                    "the sizes after are not exactly 1."
                ),
            ),
            Picture(
                norm_kinds(run.embedded[-1], run.layers[0].normed[-1], run.layer_normed[-1]),
                say(
                    "Each element of {last} in layer 0 under both norms, with the same weight and "
                    "no bias. Each element has a weight of its own, so the marks do not lie on a "
                    "line.",
                    last=piece(run.pieces[-1]),
                ),
            ),
        ),
        see=_see(run, before, after),
    )


def sizes(x: np.ndarray) -> np.ndarray:
    """The root mean square over the last axis: (..., D) -> (...)."""
    return np.sqrt((x * x).mean(axis=-1))


def _see(run: Record, before: np.ndarray, after: np.ndarray) -> tuple[Markup, ...]:
    x, normed, other = run.embedded[-1], run.layers[0].normed[-1], run.layer_normed[-1]
    moved = float(np.linalg.norm(normed - other) / max(np.linalg.norm(normed), 1e-30))
    share = abs(float(x.mean())) / max(float(sizes(x)), 1e-30)
    return (
        say(
            "Before the norms the sizes lie between {low} and {high}, a factor of {wide}. After "
            "them they lie between {low_after} and {high_after}, a factor of {narrow}.",
            low=quantity(float(before.min())),
            high=quantity(float(before.max())),
            wide=quantity(float(before.max() / max(before.min(), 1e-30))),
            low_after=quantity(float(after.min())),
            high_after=quantity(float(after.max())),
            narrow=quantity(float(after.max() / max(after.min(), 1e-30))),
        ),
        say(
            "The mean of the elements of {last} is {mean}, {share:.1%} of their root mean square. "
            "Subtracting it, as LayerNorm does, would change the result by {moved:.1%} of its "
            "length. The smaller the mean is beside the root mean square, the less the two norms "
            "differ.",
            last=piece(run.pieces[-1]),
            mean=quantity(float(x.mean())),
            share=share,
            moved=moved,
        ),
    )
