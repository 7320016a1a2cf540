"""6: attention maps of all heads."""

import numpy as np

from npllama.explore.figures.attention import attention_map, attention_maps, first_token_share
from npllama.explore.record import Record
from npllama.explore.section import Choices, Function, Picture, Section, say, shape
from npllama.ops import Ops

MOST = 8
"""Layers, and heads of each, that are shown of a large model."""
_FEW = 36
"""Heads that are shown large at most."""


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    layers, heads = spaced(c.n_layers), spaced(c.n_heads)
    weights = run.stacked("attention")  # (L, H, T, T)
    total = len(run.ids)
    return Section(
        slug="attention",
        title="Attention: how each token divides its view of the past",
        idea=(
            say(
                "A softmax turns the scores of one query with all keys into shares that sum to 1, "
                "and the head's output is the values mixed by these shares. So each token decides "
                "for itself, by its content and by distance, what to read: that is how <q>She</q> "
                "can find the name it stands for."
            ),
            say(
                "The <em>mask</em> hides the tokens that come later. The model is trained to "
                "predict each next token, and must not see it; and since no later token changes "
                "an earlier one, keys and values can be kept (section 7). The division by "
                "√<var>C</var> keeps the scores at the same size for any head width: a sum of "
                "<var>C</var> products grows with √<var>C</var>, and a softmax of large scores "
                "would pick one token and pass no gradient to the others."
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
            Picture(
                attention_maps(weights, run.pieces),
                _which(run, layers, heads),
            ),
            _large(run, weights, layers, heads),
            Picture(
                first_token_share(run.stacked("to_first")),
                say("The share of attention that goes to the first token, in each head."),
            ),
        ),
        see=_see(run, weights),
    )


def spaced(n: int) -> list[int]:
    """All of n, or MOST of them, evenly spaced, the first and the last included."""
    return sorted({round(x) for x in np.linspace(0, n - 1, min(n, MOST))})


def _which(run: Record, layers: list[int], heads: list[int]):
    c = run.config
    text = say(
        "Every head of every layer: a row is the token that reads, a column the token that is "
        "read, and brighter is more."
    )
    if len(layers) * len(heads) < c.n_layers * c.n_heads:
        text = say(
            "{layers} of {all_layers} layers and {heads} of {all_heads} heads, evenly spaced: a "
            "row is the token that reads, a column the token that is read, and brighter is more.",
            layers=len(layers),
            all_layers=c.n_layers,
            heads=len(heads),
            all_heads=c.n_heads,
        )
    if run.start:
        text += say(
            " The columns are the window's tokens; what goes to the {earlier} tokens before it is "
            "not shown.",
            earlier=f"{run.start:,}",
        )
    return text


def previous_share(weights: np.ndarray) -> np.ndarray:
    """(L, H): the attention that goes to the token just before, averaged over the window."""
    if weights.shape[-1] < 2:
        return np.zeros(weights.shape[:2])
    return weights.diagonal(-1, axis1=2, axis2=3).mean(axis=-1)


def _large(run: Record, weights: np.ndarray, layers: list[int], heads: list[int]) -> Choices:
    pairs = [(layer, head) for layer in layers for head in heads]
    before = previous_share(weights)
    pairs = sorted(sorted(pairs, key=lambda p: -before[p])[:_FEW])
    best = max(pairs, key=lambda p: before[p])
    figures = tuple(
        (f"{layer}.{head}", attention_map(weights[layer, head], run.pieces, layer, head))
        for layer, head in pairs
    )
    caption = say(
        "One head at a time: choose <var>layer</var>.<var>head</var>. The first one shown is the "
        "head, of those above, that gives most to the token just before. The mask hides the "
        "hatched half."
    )
    return Choices("head", figures, caption, pairs.index(best))


def _even_share(run: Record) -> float:
    """The mean share of the first token, if every token divided its attention evenly."""
    positions = np.arange(max(run.start, 1), len(run.ids))
    return float((1 / (positions + 1)).mean())


def _see(run: Record, weights: np.ndarray) -> tuple:
    first, before = run.stacked("to_first"), previous_share(weights)
    if len(run.ids) == 1:
        return (
            say(
                "The prompt is one token, which can read nothing but itself: every share is 1. A "
                "longer prompt shows what the heads look for."
            ),
        )
    layer, head = np.unravel_index(before.argmax(), before.shape)
    seen = [
        say(
            "On average {share:.1%} of the attention goes to the first token; it would be "
            "{even:.1%} if every token looked at all tokens before it alike. Head {head} of layer "
            "{layer} gives it most, {most:.0%}. Shares sum to 1, so a head that finds nothing to "
            "read must still put them somewhere, in many models on the first token: an "
            "<em>attention sink</em> (Xiao et al. 2023).",
            share=float(first.mean()),
            even=_even_share(run),
            head=int(first.argmax() % first.shape[1]),
            layer=int(first.argmax() // first.shape[1]),
            most=float(first.max()),
        ),
        say(
            "Head {head} of layer {layer} gives {share:.0%} of its attention to the token just "
            "before, the most of all heads.",
            head=head,
            layer=layer,
            share=float(before.max()),
        ),
    ]
    if run.start:
        earlier = run.stacked("to_earlier")
        seen.append(
            say(
                "{share:.0%} of the window's attention goes to tokens before the window.",
                share=float(earlier.mean()),
            )
        )
    return tuple(seen)
