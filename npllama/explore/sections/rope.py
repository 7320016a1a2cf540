"""5: RoPE."""

import numpy as np
from markupsafe import Markup

from npllama.explore.figures.dials import rope_dials
from npllama.explore.figures.rope import (
    rope_clock,
    rope_difference,
    rope_distance,
    rope_frequencies,
)
from npllama.explore.labels import quantity
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_MOST_HANDS = 8
_PLACES = ((5, 2), (15, 12))
"""Positions of a query and a key: two pairs of the same distance."""


def section(run: Record) -> Section:
    c, n, r = run.config, len(run.pieces), run.rotations
    half = len(r.frequencies)
    return Section(
        slug="rope",
        title="RoPE: scores that depend on how far apart two tokens are",
        idea=(
            say(
                "The dot product of a query and a key does not depend on where the tokens are. In "
                "<q>the cat saw the dog</q> and <q>the dog saw the cat</q> the same words would "
                "have the same scores. Something must bring in the order. The first transformers "
                "added a vector for each position to the embedding. Then what is learned about "
                "positions 5 and 8 need not hold for positions 105 and 108."
            ),
            say(
                "<strong>RoPE</strong>, rotary position embedding, takes the elements of each "
                "query and key in pairs. A pair is a point in a plane, and RoPE rotates it by an "
                "angle proportional to the token's position, like the hand of a clock. The dot "
                "product of two rotated points depends on the points and on the "
                "<em>difference</em> of their angles. So a score depends on what the query and the "
                "key contain and on how far the key lies before the query, but not on where both "
                "lie. What a head learns about <q>three tokens back</q> holds at every position. "
                "RoPE has no parameters. Values are not rotated, since they are mixed and not "
                "compared."
            ),
            say(
                "Each of the <var>C</var>/2 = {half} pairs turns at a speed of its own; here the "
                "base is <var>b</var> = {base}. Fast pairs distinguish near tokens, like a second "
                "hand; slow pairs distinguish far ones, like an hour hand. In the first "
                "equations <var>x</var> is a query or a key, and <var>m</var> is its position.",
                half=half,
                base=f"{c.rope_theta:,.0f}",
            ),
        ),
        equations=(
            r"y_i = x_i \cos m\theta_i - x_{i+C/2} \sin m\theta_i, \qquad"
            r" y_{i+C/2} = x_{i+C/2} \cos m\theta_i + x_i \sin m\theta_i, \qquad"
            r" \theta_i = b^{-2i/C}",
            r"\text{RoPE}(q, m) \cdot \text{RoPE}(k, n) = \text{RoPE}(q, m - n) \cdot k",
        ),
        functions=(
            Function(
                Ops.rope,
                (
                    "test_rope_turns_each_pair_as_a_complex_number",
                    "test_scores_depend_on_relative_position_only",
                ),
            ),
            Function(Ops.rope_frequencies, ("test_rope_frequencies_equal_those_of_transformers",)),
            Function(Ops.rope_table, ("test_rope_angles_are_right_at_long_positions_in_float32",)),
        ),
        shapes=(
            shape("q before and after", "H, T, C", c.n_heads, n, c.head_dim),
            shape("k before and after", "K, T, C", c.n_kv_heads, n, c.head_dim),
            shape("cos, sin", "T, C/2", n, half),
        ),
        parts=_pictures(run),
        see=_see(run),
    )


def _pictures(run: Record) -> tuple[Picture, ...]:
    r, at = run.rotations, len(run.ids) - 1
    pair, half = _shown_pair(r.frequencies), len(r.frequencies)
    q, k = (x[:, [pair, pair + half]] for x in (r.q, r.k))  # (n, C) -> (n, 2)
    last = piece(run.pieces[-1])
    return (
        Picture(
            rope_dials(r.frequencies, at),
            say(
                "The {half} pairs as clocks, pair 0 first, at position {at}, the last one of the "
                "prompt. The number below a clock is the number of tokens per full turn.",
                half=half,
                at=at,
            ),
            say(
                '<div class="control" data-turn hidden><label for="position">Turn the hands'
                '</label><input id="position" type="range" min="0" max="{most}" step="1" '
                'value="{at}"><output for="position"></output></div>',
                most=max(run.context - 1, 1),
                at=at,
            ),
        ),
        Picture(
            rope_clock(r.frequencies, pair, q[:_MOST_HANDS]),
            say(
                "Pair {pair} of the query of {last} in head 0 of layer 0, rotated to several "
                "positions.",
                pair=pair,
                last=last,
            ),
        ),
        Picture(
            rope_difference(q, k, float(r.frequencies[pair]), _PLACES),
            say(
                "The same pair of the query and of the key of {last} at two pairs of positions. "
                "Both hands have turned, and the angle between them is the same. The dot product "
                "over all pairs is {first} at the left and {second} at the right.",
                last=last,
                first=quantity(float(r.scores[_PLACES[0]]), 5),
                second=quantity(float(r.scores[_PLACES[1]]), 5),
            ),
        ),
        Picture(
            rope_frequencies(r.frequencies, r.plain),
            say("The tokens per full turn of each pair, on a logarithmic axis."),
        ),
        Picture(
            rope_distance(r.scores),
            say(
                "An experiment: the query and the key of {last} in head 0 of layer 0 are rotated "
                "to all positions. A cell is their dot product; a key after the query is masked "
                "(section 6). The distance is the same along a diagonal, and so is the product. "
                "The model learns which distances a head prefers.",
                last=last,
            ),
        ),
    )


def _shown_pair(frequencies: np.ndarray) -> int:
    """The pair that turns by about 0.6 radians per position: its first hands are easy to tell
    apart."""
    return int(np.abs(np.log(frequencies / 0.6)).argmin())


def _see(run: Record) -> tuple[Markup, ...]:
    r = run.rotations
    waves = 2 * np.pi / r.frequencies
    fast, slow = float(waves.min()), float(waves.max())
    seen_scores = r.scores[np.tril_indices(len(r.scores))]
    context = f"The context is {run.context:,} tokens."
    if run.context < slow:
        context = (
            f"The context of {run.context:,} tokens is {run.context / slow:.1%} of that turn. The "
            "slowest hand never comes round, so each distance has its own setting of the hands."
        )
    seen = [
        say(
            "The fastest pair turns once in {fast} tokens, the slowest once in {slow} tokens. "
            "{context}",
            fast=quantity(fast),
            slow=f"{slow:,.0f}",
            context=context,
        ),
        say(
            "Measured: products at the same distance differ by at most {spread}, the rounding of "
            "float32, while products at different distances lie between {low} and {high}.",
            spread=quantity(r.spread, 2),
            low=quantity(float(seen_scores.min())),
            high=quantity(float(seen_scores.max())),
        ),
    ]
    if run.config.rope_scaling is not None:
        seen.append(_scaling(run))
    return tuple(seen)


def _scaling(run: Record) -> Markup:
    scaling, r = run.config.rope_scaling, run.rotations
    if np.allclose(r.frequencies, r.plain):
        effect = "it changes no frequency at this context, only at a longer one."
    else:
        effect = (
            "slow pairs turn slower than without scaling, so that the angles of a longer text stay "
            "within the range of the training."
        )
    return say(
        "This model scales its frequencies ({kind}, factor {factor:g}): {effect}",
        kind=scaling.kind,
        factor=scaling.factor,
        effect=effect,
    )
