"""9: the residual stream."""

import numpy as np

from npllama.explore.figures.residual import block_shares, residual_norms
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    hidden = run.hidden  # (L+1, T, D)
    attention, feed_forward = shares(run)
    return Section(
        slug="residual",
        title="The residual stream: each block adds, none replaces",
        idea=(
            say(
                "A block, one layer of the model, has two halves: attention and feed-forward. Each "
                "reads the normalized stream and <em>adds</em> its result to the stream as it "
                "was. So what one layer wrote stays readable for all later ones, and in training "
                "the gradient reaches every layer along the sum, unweakened by the layers above. "
                "Without the sum, networks of dozens of layers hardly train."
            ),
        ),
        equations=(
            r"x' = x + \text{Attention}(\text{RMSNorm}(x))\,W_o^{\top}",
            r"x'' = x' + \text{SwiGLU}(\text{RMSNorm}(x'))\,W_{down}^{\top}",
        ),
        functions=(
            Function(
                Ops.attention_block,
                ("test_attention_block_is_norm_projections_rope_attention_and_residual",),
            ),
            Function(Ops.feed_forward, ("test_feed_forward_is_norm_swiglu_and_residual",)),
        ),
        shapes=(
            shape("x", "T, D", n, c.dim),
            shape("all L + 1 streams", "L+1, T, D", c.n_layers + 1, n, c.dim),
        ),
        parts=(
            Picture(
                residual_norms(np.linalg.norm(hidden, axis=-1), run.pieces),
                say("The length of each token's vector after the embedding and after each block."),
            ),
            Picture(
                block_shares(attention, feed_forward),
                say(
                    "What each half of a block adds: its length relative to that of the stream it "
                    "is added to, averaged over the tokens."
                ),
            ),
        ),
        see=_see(hidden, attention, feed_forward),
    )


def shares(run: Record) -> tuple[np.ndarray, np.ndarray]:
    """(L,) and (L,): the length of what attention and feed-forward add, relative to the stream."""
    attention, feed_forward, x = [], [], run.embedded
    for layer in run.layers:
        attention.append(_relative(layer.after_attention - x, x))
        feed_forward.append(_relative(layer.hidden - layer.after_attention, layer.after_attention))
        x = layer.hidden
    return np.array(attention), np.array(feed_forward)


def _relative(added: np.ndarray, x: np.ndarray) -> float:
    length = np.maximum(np.linalg.norm(x, axis=-1), 1e-30)
    return float((np.linalg.norm(added, axis=-1) / length).mean())


def _see(hidden: np.ndarray, attention: np.ndarray, feed_forward: np.ndarray) -> tuple:
    norms = np.linalg.norm(hidden, axis=-1)  # (L+1, T)
    x, y = hidden[0, -1], hidden[-1, -1]
    cosine = float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30))
    both = attention + feed_forward
    return (
        say(
            "The last token's vector grows from a length of {begin:.3g} to {end:.3g}. The cosine "
            "of the angle between its first and its last vector is {cosine:.2f}: "
            "{how}.",
            begin=float(norms[0, -1]),
            end=float(norms[-1, -1]),
            cosine=cosine,
            how="the embedding is still visible in it"
            if cosine > 0.3
            else "little of the embedding's direction is left",
        ),
        say(
            "Layer {most} adds most relative to the stream it finds, layer {least} least.",
            most=int(both.argmax()),
            least=int(both.argmin()),
        )
        if len(both) > 1
        else say("This model has one layer."),
    )
