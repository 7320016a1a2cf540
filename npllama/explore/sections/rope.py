"""5: RoPE."""

import numpy as np

from npllama.explore.figures.dials import rope_dials
from npllama.explore.figures.rope import rope_clock, rope_distance, rope_frequencies
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_MOST_HANDS = 8


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    r = run.rotations
    pair = _shown_pair(r.frequencies)
    half = len(r.frequencies)
    hands = r.turned[:_MOST_HANDS, [pair, pair + half]]  # (n, C) -> (at most 8, 2)
    functions = (
        Function(
            Ops.rope,
            (
                "test_rope_turns_each_pair_as_a_complex_number",
                "test_scores_depend_on_relative_position_only",
            ),
        ),
        Function(Ops.rope_frequencies, ("test_rope_frequencies_equal_those_of_transformers",)),
        Function(Ops.rope_table, ("test_rope_angles_are_right_at_long_positions_in_float32",)),
    )
    return Section(
        slug="rope",
        title="RoPE: scores that know how far apart two tokens are",
        idea=(
            say(
                "The dot product of a query and a key does not depend on where the tokens stand: "
                "in <q>the cat saw the dog</q> and <q>the dog saw the cat</q> the same words would "
                "have the same scores. Something must bring in the order."
            ),
            say(
                "<strong>RoPE</strong>, rotary position embedding, takes the elements of each "
                "query and key in pairs. A pair is a point in a plane, and RoPE turns it by an "
                "angle proportional to the token's position, like the hand of a clock. A dot "
                "product of two turned points depends on the <em>difference</em> of their "
                "angles, and so on the <em>distance</em> between the tokens alone. What a head "
                "learns about <q>three tokens back</q> then holds at every position. RoPE has no "
                "parameters, and it leaves the values as they are."
            ),
            say(
                "Each of the <var>C</var>/2 = {half} pairs turns at a speed of its own. Fast "
                "pairs tell near tokens apart, as a second hand does; slow pairs tell far ones "
                "apart, as an hour hand does.",
                half=half,
            ),
        ),
        equations=(
            r"y_i = x_i \cos p\theta_i - x_{i+C/2} \sin p\theta_i, \qquad"
            r" y_{i+C/2} = x_{i+C/2} \cos p\theta_i + x_i \sin p\theta_i, \qquad"
            r" \theta_i = \theta^{-2i/C}",
            r"\text{RoPE}(q, m) \cdot \text{RoPE}(k, n) = \text{RoPE}(q, m - n) \cdot k",
        ),
        functions=functions,
        shapes=(
            shape("q before and after", "H, T, C", c.n_heads, n, c.head_dim),
            shape("k before and after", "K, T, C", c.n_kv_heads, n, c.head_dim),
            shape("cos, sin", "T, C/2", n, half),
        ),
        parts=(
            Picture(
                rope_dials(r.frequencies, len(run.ids) - 1),
                say(
                    "All {half} pairs as clocks at position {position}, the last one of the "
                    "prompt. Below each is the number of tokens that it takes for a whole turn.",
                    half=half,
                    position=len(run.ids) - 1,
                ),
                say(
                    '<div class="control" data-turn hidden><label for="position">Turn the hands'
                    '</label><input id="position" type="range" min="0" max="{most}" step="1" '
                    'value="{at}"><output for="position"></output></div>',
                    most=max(run.context - 1, 1),
                    at=len(run.ids) - 1,
                ),
            ),
            Picture(
                rope_clock(r.frequencies, pair, hands),
                say(
                    "Pair {pair} of the query of {last} in head 0 of layer 0, put at several "
                    "positions.",
                    pair=pair,
                    last=piece(run.pieces[-1]),
                ),
            ),
            Picture(
                rope_frequencies(r.frequencies, r.plain),
                say("Tokens that each pair takes for a whole turn; the axis is logarithmic."),
            ),
            Picture(
                rope_distance(r.scores),
                say(
                    "Scores of one query and one key at all pairs of positions. Along a diagonal "
                    "the distance is the same, and so is the score."
                ),
            ),
        ),
        see=_see(run),
    )


def _shown_pair(frequencies: np.ndarray) -> int:
    """The pair whose hands at the first positions are easiest to tell apart: about 0.6 radians."""
    return int(np.abs(np.log(frequencies / 0.6)).argmin())


def _see(run: Record) -> tuple:
    r = run.rotations
    waves = 2 * np.pi / r.frequencies
    fast, slow = float(waves.min()), float(waves.max())
    seen = [
        say(
            "The fastest pair turns once in {fast:.1f} tokens, the slowest once in {slow} tokens. "
            "{context}",
            fast=fast,
            slow=f"{slow:,.0f}",
            context=say(
                "The context of {n} tokens is {part:.1%} of that turn, so no two distances look "
                "alike to all pairs.",
                n=f"{run.context:,}",
                part=run.context / slow,
            )
            if run.context < slow
            else f"The context is {run.context:,} tokens.",
        ),
        say(
            "Measured: scores of the same distance differ by at most {spread:.1e}, which is "
            "float32's rounding, while scores of different distances lie between {low:.2f} and "
            "{high:.2f}.",
            spread=r.spread,
            low=float(r.scores.min()),
            high=float(r.scores.max()),
        ),
    ]
    scaling = run.config.rope_scaling
    if scaling is not None:
        seen.append(
            say(
                "This model scales its frequencies ({kind}, factor {factor:g}): it turns slower "
                "than plain RoPE, so that a longer text stays within the angles of its training.",
                kind=scaling.kind,
                factor=scaling.factor,
            )
        )
    return tuple(seen)
