"""8: SwiGLU."""

import numpy as np

from npllama.costs import parameters_by_part
from npllama.explore.figures.swiglu import gate_on_silu, gate_rows
from npllama.explore.layers import LayerRecord
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_CLOSED = 0.1
"""A gate of SiLU that lets through less than this is called nearly closed."""


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    layer = c.n_layers // 2
    shown = run.layers[layer]
    x, silu = shown.silu_curve  # (121,) each
    part = parameters_by_part(c)
    return Section(
        slug="swiglu",
        title="SwiGLU: a network that gates itself",
        idea=(
            say(
                "Attention moves information between tokens. The feed-forward network then works "
                "on each token alone, with {share:.0%} of this model's parameters. It widens the "
                "vector to <var>F</var> = {f} elements, applies a nonlinear "
                "function to each of them, and projects back.",
                share=part["feed-forward"] / c.n_parameters,
                f=f"{c.ffn_dim:,}",
            ),
            say(
                "The first transformers used ReLU there, which sets negative elements to 0: on or "
                "off. <strong>SwiGLU</strong> computes two projections, <em>up</em> and "
                "<em>gate</em>, and multiplies up by SiLU(gate). So the token itself decides, "
                "element by element, how much of up passes. A product of two projections can also "
                "say <q>this <em>and</em> that</q>, which a sum cannot. ReLU has a slope of 0 for "
                "every negative element, SiLU at one point only: a gate that is nearly closed "
                "still gets a gradient, and can learn to open."
            ),
            say(
                "Shazeer compared such gates at equal size and found them better than ReLU. Three "
                "matrices in place of two need a smaller <var>F</var> for the same number of "
                "parameters: about 8/3 <var>D</var> rather than 4 <var>D</var>."
            ),
        ),
        equations=(
            r"\text{SiLU}(z) = z \cdot \frac{1}{1 + e^{-z}}",
            r"\text{SwiGLU}(x) = \text{SiLU}(x\,W_{gate}^{\top}) \odot (x\,W_{up}^{\top})",
        ),
        functions=(
            Function(Ops.swiglu, ("test_swiglu_gates_with_its_first_argument",)),
            Function(Ops.silu, ("test_silu_is_x_times_sigmoid_and_never_overflows",)),
        ),
        shapes=(
            shape("RMSNorm(x)", "T, D", n, c.dim),
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
                    "The {f} gates of {last} in layer {layer}, on SiLU's curve; ReLU for "
                    "comparison.",
                    f=f"{c.ffn_dim:,}",
                    last=piece(run.pieces[-1]),
                    layer=layer,
                ),
            ),
            Picture(
                gate_rows(run.pieces, shown.gate),
                say("The gates of every token in layer {layer}, before SiLU.", layer=layer),
            ),
        ),
        see=_see(run, shown),
    )


def _see(run: Record, layer: LayerRecord) -> tuple:
    gate, passed = layer.gate[-1], np.abs(layer.opened[-1])  # (F,) each
    n, last = len(gate), piece(run.pieces[-1])
    return (
        say(
            "Of the {n} gates of {last}, {negative:.0%} are negative, where ReLU would let "
            "nothing through. {closed:.0%} are nearly closed: |SiLU| is below {limit}.",
            n=f"{n:,}",
            last=last,
            negative=float((gate < 0).mean()),
            closed=float((passed < _CLOSED).mean()),
            limit=_CLOSED,
        ),
        say(
            "The {few} most open gates (a tenth of them) make up {share:.0%} of the sum of "
            "|SiLU(gate)|: a token uses a part of the network, another token another part, as the "
            "rows of the map show.",
            few=max(n // 10, 1),
            share=float(np.sort(passed)[-max(n // 10, 1) :].sum() / max(passed.sum(), 1e-30)),
        ),
    )
