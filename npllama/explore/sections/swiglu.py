"""8: SwiGLU."""

import numpy as np
from markupsafe import Markup

from npllama.costs import parameters_by_part
from npllama.explore.figures.swiglu import gate_on_silu, gate_rows
from npllama.explore.layers import LayerRecord
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_CLOSED = 0.1
"""A gate is called nearly closed if |SiLU| is below this value."""


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    layer = c.n_layers // 2
    shown = run.layers[layer]
    x, silu = shown.silu_curve  # (121,) each
    by_last = np.argsort(-shown.gate[-1], kind="stable")  # (F,)
    return Section(
        slug="swiglu",
        title="SwiGLU: a network that gates itself",
        idea=_idea(run),
        equations=(
            r"\text{SiLU}(z) = z \cdot \frac{1}{1 + e^{-z}}",
            r"\text{SwiGLU}(h) = \text{SiLU}(h\,W_{gate}^{\top}) \odot (h\,W_{up}^{\top}), \qquad"
            r" \text{added to } x\text{: } \text{SwiGLU}(h)\,W_{down}^{\top}",
        ),
        functions=(
            Function(Ops.swiglu, ("test_swiglu_gates_with_its_first_argument",)),
            Function(Ops.silu, ("test_silu_is_x_times_sigmoid_and_never_overflows",)),
        ),
        shapes=(
            shape("h = RMSNorm(x)", "T, D", n, c.dim),
            shape("gate, up", "T, F", n, c.ffn_dim),
            shape("SwiGLU", "T, F", n, c.ffn_dim),
        ),
        parts=(
            Picture(
                gate_on_silu(
                    shown.gate[-1],
                    shown.opened[-1],
                    x,
                    silu,
                    np.maximum(x, 0),
                    run.pieces[-1],
                ),
                say(
                    "The {f} gates of {last} in layer {layer} on the curve of SiLU, and ReLU for "
                    "comparison. The bars count the gates.",
                    f=f"{c.ffn_dim:,}",
                    last=piece(run.pieces[-1]),
                    layer=layer,
                ),
            ),
            Picture(
                gate_rows(run.pieces, shown.gate[:, by_last]),
                say(
                    "The gates of each token in layer {layer} before SiLU. The columns are sorted "
                    "by the gates of the last token, {last}: rows that differ from the last row "
                    "open other gates.",
                    layer=layer,
                    last=piece(run.pieces[-1]),
                ),
            ),
        ),
        see=_see(run, shown),
    )


def _idea(run: Record) -> tuple[Markup, ...]:
    c = run.config
    return (
        say(
            "Attention moves information between tokens. The feed-forward network then works on "
            "each token alone, with {share:.0%} of this model's parameters. It widens the "
            "normalized vector <var>h</var> to <var>F</var> = {f} elements, applies a nonlinear "
            "function to each of them, and projects back to <var>D</var> = {d} elements with "
            "<var>W<sub>down</sub></var>.",
            share=parameters_by_part(c)["feed-forward"] / c.n_parameters,
            f=f"{c.ffn_dim:,}",
            d=f"{c.dim:,}",
        ),
        say(
            "The first transformers used ReLU, which sets negative elements to 0 and keeps the "
            "others. <strong>SwiGLU</strong> (Swish-gated linear unit; Swish is another name of "
            "SiLU, the sigmoid linear unit) computes two projections, <em>up</em> and "
            "<em>gate</em>, and multiplies up by SiLU(gate). So each token decides, element by "
            "element, how much of up passes. A product of two projections is large only if both "
            "are, like an <q>and</q>: 1 × 0 = 0, whereas the sum 1 + 0 is 1."
        ),
        say(
            "ReLU has the slope 0 for every negative input, so an element that is always negative "
            "learns nothing. SiLU is smooth, and its slope is 0 only at its minimum: a gate that "
            "is nearly closed still gets a gradient and can learn to open. Below 0 a gate passes "
            "a little of up with the opposite sign, at most 0.278 of it."
        ),
        say(
            "Shazeer (2020) compared such gates with ReLU at an equal number of parameters and "
            "found that they predict better. He made <var>F</var> smaller, since there are three "
            "matrices instead of two: 8/3 <var>D</var> instead of 4 <var>D</var>. Here "
            "<var>F</var> is {ratio:.3g} <var>D</var>.",
            ratio=c.ffn_dim / c.dim,
        ),
    )


def _see(run: Record, layer: LayerRecord) -> tuple[Markup, ...]:
    gate, passed = layer.gate[-1], np.abs(layer.opened[-1])  # (F,) each
    n, last = len(gate), piece(run.pieces[-1])
    few = max(n // 10, 1)
    seen = [
        say(
            "Of the {n} gates of {last}, {negative:.0%} are negative; ReLU would set these to 0. "
            "{closed:.0%} are nearly closed: |SiLU| is below {limit}.",
            n=f"{n:,}",
            last=last,
            negative=float((gate < 0).mean()),
            closed=float((passed < _CLOSED).mean()),
            limit=_CLOSED,
        ),
        say(
            "The {few} most open gates, a tenth of them, have {share:.0%} of the sum of "
            "|SiLU(gate)|.",
            few=few,
            share=float(np.sort(passed)[-few:].sum() / max(passed.sum(), 1e-30)),
        ),
    ]
    if len(run.pieces) > 1:
        own, other = (set(np.argsort(-np.abs(x))[:few].tolist()) for x in layer.opened[[-1, -2]])
        seen.append(
            say(
                "Of these {few} gates, {n} are also among the {few} most open gates of the token "
                "before, {before}. The other {others} are not: each token opens its own gates.",
                few=few,
                n=len(own & other),
                others=few - len(own & other),
                before=piece(run.pieces[-2]),
            )
            if len(own & other) < few
            else say(
                "The token before, {before}, has the same most open gates.",
                before=piece(run.pieces[-2]),
            )
        )
    return tuple(seen)
