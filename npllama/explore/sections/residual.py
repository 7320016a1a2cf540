"""9: the residual stream."""

import numpy as np
from markupsafe import Markup

from npllama.explore.figures.residual import block_shares, residual_norms
from npllama.explore.labels import percent, quantity
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, say, shape
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    hidden = run.hidden  # (L+1, T, D)
    attention, feed_forward = shares(run)
    return Section(
        slug="residual",
        title="The residual stream: each layer adds, none replaces",
        idea=(
            say(
                "A layer has two halves, attention and feed-forward. Each half reads the "
                "normalized stream and <em>adds</em> its result to the stream. So a layer "
                "computes only a difference, the <em>residual</em>, and the stream carries the "
                "sum. What one layer adds stays in the sum for all later layers."
            ),
            say(
                "In training, the gradient passes along the sum to every layer without being "
                "weakened by the layers above. He et al. (2016) found that deep networks become "
                "harder to train with each layer unless the layers add to their input."
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
                say("The length of each token's vector after the embedding and after each layer."),
            ),
            Picture(
                block_shares(attention, feed_forward),
                say(
                    "The length of what each half of a layer adds, relative to the length of the "
                    "stream to which it is added, averaged over the tokens; on a logarithmic axis."
                ),
            ),
        ),
        see=_see(hidden, attention, feed_forward),
    )


def shares(run: Record) -> tuple[np.ndarray, np.ndarray]:
    """(L,) and (L,): the length of what attention and feed-forward add, relative to the stream to
    which they add it, averaged over the tokens."""
    attention, feed_forward, x = [], [], run.embedded
    for layer in run.layers:
        attention.append(_relative(layer.after_attention - x, x))
        feed_forward.append(_relative(layer.hidden - layer.after_attention, layer.after_attention))
        x = layer.hidden
    return np.array(attention), np.array(feed_forward)


def _relative(added: np.ndarray, x: np.ndarray) -> float:
    length = np.maximum(np.linalg.norm(x, axis=-1), 1e-30)
    return float((np.linalg.norm(added, axis=-1) / length).mean())


def _see(hidden: np.ndarray, attention: np.ndarray, feed_forward: np.ndarray) -> tuple[Markup, ...]:
    norms = np.linalg.norm(hidden, axis=-1)  # (L+1, T)
    x, y = hidden[0, -1], hidden[-1, -1]
    cosine = float(x @ y / max(float(np.linalg.norm(x) * np.linalg.norm(y)), 1e-30))
    largest = max(attention.max(), feed_forward.max())
    half, shares = ("attention", attention)
    if feed_forward.max() == largest:
        half, shares = ("feed-forward network", feed_forward)
    return (
        say(
            "The last token's vector has the length {begin} after the embedding and {end} after "
            "the last layer. The cosine of the angle between the two vectors is {cosine}: {how}.",
            begin=quantity(float(norms[0, -1])),
            end=quantity(float(norms[-1, -1])),
            cosine=quantity(cosine, 2),
            how="the embedding still gives the sum a part of its direction"
            if cosine > 0.3
            else "the embedding is still in the sum, but small beside what the layers added",
        ),
        say(
            "The largest addition is that of the {half} in layer {layer}: {share} of the "
            "length of the stream before it.",
            half=half,
            layer=int(shares.argmax()),
            share=percent(float(largest)),
        ),
    )
