"""6: attention maps of all heads."""

import numpy as np
from markupsafe import Markup

from npllama.explore.figures.attention import (
    MOST_MAPS,
    attention_map,
    attention_maps,
    first_token_share,
)
from npllama.explore.labels import window
from npllama.explore.record import Record
from npllama.explore.section import Choices, Function, Picture, Section, piece, say, shape
from npllama.ops import Ops

_FEW = 36
"""Heads that can be shown large."""


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    weights = run.stacked("attention")  # (L, H, T, T)
    total = len(run.ids)
    return Section(
        slug="attention",
        title="Attention: each token reads from the tokens up to itself",
        idea=(
            say(
                "A softmax turns the scores of one query with all keys into shares that sum to 1, "
                "and the output of the head is the sum of the values weighted by these shares. So "
                "each token decides by its content and by the distance what to read. A pronoun, "
                "for example, can find the name that it stands for. The outputs of the "
                "<var>H</var> heads are concatenated, {h} × {c} elements per token, and the matrix "
                "<var>W<sub>o</sub></var> mixes them into one vector of <var>D</var> = {d} "
                "elements.",
                h=c.n_heads,
                c=c.head_dim,
                d=f"{c.dim:,}",
            ),
            say(
                "The <em>mask</em> hides the tokens that come later. In training the model "
                "predicts each next token and must not see it. A second effect: no later token "
                "changes an earlier one, so keys and values can be stored (section 7). The "
                "division by √<var>C</var> gives the scores the same size at any head width. A sum "
                "of <var>C</var> products grows like √<var>C</var>, and a softmax of large scores "
                "picks one token and passes hardly any gradient to the others."
            ),
        ),
        equations=(
            r"P = \text{softmax}\left(\frac{q\,k^{\top}}{\sqrt{C}} + \text{mask}\right), \qquad"
            r" o = P\,v",
            r"\text{mask}_{t,s} = 0 \text{ for } s \le t, \qquad"
            r" \text{mask}_{t,s} = -\infty \text{ for } s > t",
        ),
        functions=(
            Function(
                Ops.attention_weights,
                (
                    "test_attention_is_each_query_over_the_keys_it_may_see",
                    "test_no_future_token_moves_a_past_output",
                ),
            ),
            Function(Ops.is_hidden, ("test_a_later_key_is_hidden",)),
            Function(Ops.softmax, ("test_softmax_is_safe_and_sums_to_one",)),
        ),
        shapes=(
            shape("q", "H, T, C", c.n_heads, n, c.head_dim),
            shape("k, v", "K, N, C", c.n_kv_heads, total, c.head_dim),
            shape("P", "H, T, N", c.n_heads, n, total),
            shape("o", "H, T, C", c.n_heads, n, c.head_dim),
        ),
        parts=(
            Picture(attention_maps(weights, run.pieces), _which(run)),
            _large(run, weights),
            Picture(
                first_token_share(run.stacked("to_first")),
                say(
                    "The share of attention that goes to the prompt's first token, in percent, "
                    "averaged over the other tokens."
                ),
            ),
        ),
        see=_see(run, weights),
    )


def _which(run: Record) -> Markup:
    c = run.config
    layers, heads = min(c.n_layers, MOST_MAPS), min(c.n_heads, MOST_MAPS)
    which = say("Every head of every layer.")
    if layers * heads < c.n_layers * c.n_heads:
        which = say(
            "{layers} of {all_layers} layers and {heads} of {all_heads} heads, evenly spaced.",
            layers=layers,
            all_layers=c.n_layers,
            heads=heads,
            all_heads=c.n_heads,
        )
    which += say(
        " A row is the token that reads, a column the token that is read; brighter is more. The "
        "colours follow the square root of the share, which makes small shares visible."
    )
    if run.start:
        which += say(
            " The columns are the window's tokens. Shares that go to the {earlier} tokens before "
            "the window are not shown.",
            earlier=f"{run.start:,}",
        )
    return which


def previous_share(weights: np.ndarray) -> np.ndarray:
    """The attention to the token just before, averaged over the window: (L, H, T, T) -> (L, H)."""
    if weights.shape[-1] < 2:
        return np.zeros(weights.shape[:2])
    return weights.diagonal(-1, axis1=2, axis2=3).mean(axis=-1)


def _large(run: Record, weights: np.ndarray) -> Choices:
    layers, heads = (window(n, MOST_MAPS).tolist() for n in weights.shape[:2])
    pairs = [(layer, head) for layer in layers for head in heads]
    before = previous_share(weights)
    pairs = sorted(sorted(pairs, key=lambda p: -before[p])[:_FEW])
    best = max(pairs, key=lambda p: before[p])
    figures = tuple(
        (f"{layer}.{head}", attention_map(weights[layer, head], run.pieces, layer, head))
        for layer, head in pairs
    )
    caption = say(
        "One head at a time: choose <var>layer</var>.<var>head</var>. The head that is shown "
        "first gives the largest share to the token just before. The mask hides the hatched half."
    )
    return Choices("head", figures, caption + _example(run, weights, best), pairs.index(best))


def _example(run: Record, weights: np.ndarray, best: tuple[int, int]) -> Markup:
    """One cell of the map that is shown first, in words."""
    below = np.tril(weights[best], -1)
    if not below.any():
        return Markup()
    row, column = np.unravel_index(below.argmax(), below.shape)
    return say(
        " For example, in head {layer}.{head} the token {reader} gives {share:.0%} of its "
        "attention to {read}.",
        layer=best[0],
        head=best[1],
        reader=piece(run.pieces[row]),
        read=piece(run.pieces[column]),
        share=float(below[row, column]),
    )


def even_share(run: Record) -> float:
    """The mean share of the first token if each token read all tokens up to itself equally."""
    positions = np.arange(max(run.start, 1), len(run.ids))
    return float((1 / (positions + 1)).mean())


def _see(run: Record, weights: np.ndarray) -> tuple[Markup, ...]:
    if len(run.ids) == 1:
        return (
            say(
                "The prompt is one token, which can read nothing but itself: every share is 1. A "
                "longer prompt shows what the heads look for."
            ),
        )
    seen = [_first_token(run)]
    if weights.shape[-1] > 1:
        before = previous_share(weights)
        layer, head = np.unravel_index(before.argmax(), before.shape)
        seen.append(
            say(
                "Head {head} of layer {layer} gives {share:.0%} of its attention to the token just "
                "before, the most of all heads.",
                head=head,
                layer=layer,
                share=float(before.max()),
            )
        )
    if run.start:
        seen.append(
            say(
                "{share:.0%} of the window's attention goes to tokens before the window.",
                share=float(run.stacked("to_earlier").mean()),
            )
        )
    return tuple(seen)


def _first_token(run: Record) -> Markup:
    first, even = run.stacked("to_first"), even_share(run)
    share = float(first.mean())
    said = say(
        "On average {share:.1%} of the attention goes to the prompt's first token, {token}. It "
        "would be {even:.1%} if each token read all tokens up to itself equally. Head {head} of "
        "layer {layer} gives it most, {most:.0%}. ",
        share=share,
        token=piece(run.piece(run.ids[0])),
        even=even,
        head=int(first.argmax() % first.shape[1]),
        layer=int(first.argmax() // first.shape[1]),
        most=float(first.max()),
    )
    if share > 2 * even:
        return said + say(
            "That is an <em>attention sink</em> (Xiao et al. 2023): shares sum to 1, so a head "
            "that finds nothing to read still has to put them somewhere."
        )
    return said + say(
        "Many large models put most of their attention there, an <em>attention sink</em> (Xiao et "
        "al. 2023), because shares sum to 1 and a head that finds nothing to read still has to "
        "put them somewhere. This run shows {how}.",
        how="little of that" if share > even else "nothing of that kind",
    )
