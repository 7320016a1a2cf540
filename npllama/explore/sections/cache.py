"""7: the KV cache."""

import numpy as np
from markupsafe import Markup

from npllama.costs import forward_flops
from npllama.explore.figures.cache import cost_growth
from npllama.explore.labels import bytes_label, quantity, seconds_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, say, shape
from npllama.kv_cache import LayerCache
from npllama.ops import Ops


def section(run: Record) -> Section:
    c = run.config
    in_layers = (forward_flops(c, 2, 1) - forward_flops(c, 1, 1)) // 2
    return Section(
        slug="cache",
        title="The KV cache: nothing is computed twice",
        idea=(
            say(
                "A model writes one token at a time. The next token depends on the last token's "
                "query, and on the keys and values of <em>all</em> tokens so far. The keys and "
                "values of past tokens do not change, because the mask lets no later token reach "
                "them. So they are computed once and stored: the <strong>KV cache</strong>. Keys "
                "are stored after RoPE, because a token keeps its position."
            ),
            say(
                "With the cache a step computes one token, whatever the length of the text; only "
                "the scores with the past keys grow. Without it each step computes the whole text "
                "again. The price is memory (section 4) and the time to read it. In the "
                "equations <var>A</var> = {a} is the number of elements of the matrices in the "
                "layers, and <var>VD</var> that of the head, which runs for the last token only.",
                a=quantity(in_layers),
            ),
        ),
        equations=(
            r"\text{FLOPs of token } n \text{ with the cache} = 2A + 2VD + 4LHC\,n",
            r"\text{without} = 2A\,n + 2VD + 2LHC\,n\,(n + 1)",
        ),
        functions=(
            Function(
                Ops.cached_attention,
                ("test_decoding_with_the_cache_equals_recomputing_from_scratch",),
                "Shazeer 2019 (Fast Transformer Decoding), section 2.4",
            ),
            Function(
                LayerCache.write,
                ("test_a_row_writes_its_own_places_and_no_others",),
                "Shazeer 2019, section 2.4",
            ),
        ),
        shapes=(
            shape("k, v of a layer", "K, context, C", c.n_kv_heads, run.context, c.head_dim),
            shape("k, v of a new token", "K, 1, C", c.n_kv_heads, 1, c.head_dim),
        ),
        parts=_pictures(run),
        see=_see(run),
    )


def _pictures(run: Record) -> tuple[Picture, ...]:
    g = run.growth
    return (
        Picture(
            cost_growth(g.n, g.flops_with, g.flops_without, "FLOPs"),
            say(
                "FLOPs of the last token of a text, counted: 2 per element of a weight matrix and "
                "token, and 4<var>C</var> per query head, layer, and pair of tokens."
            ),
        ),
        Picture(
            cost_growth(g.n, g.bytes_with, g.bytes_without, "bytes"),
            say(
                "Bytes of weights and cache that a step reads. Without a cache a step reads only "
                "the weights: the cache saves arithmetic and costs memory."
            ),
        ),
        Picture(
            cost_growth(
                g.n,
                g.seconds_with,
                g.seconds_without,
                "seconds",
                g.measured_with,
                g.measured_without,
            ),
            say("Seconds per token on {device}.", device=run.device) + _extrapolation(run),
        ),
    )


def _extrapolation(run: Record) -> Markup:
    g = run.growth
    if g.measured_with.all() and g.measured_without.all():
        return say(" All points are measured.")
    return say(
        " Hollow points are extrapolated from the last measured one. With the cache the time is "
        "multiplied by the growth of the bytes, because such a step is limited by reading memory. "
        "Without the cache it is multiplied by the growth of the FLOPs, because such a step is "
        "limited by arithmetic."
    )


def _see(run: Record) -> tuple[Markup, ...]:
    g = run.growth
    n, i = int(g.n[-1]), len(g.n) - 1
    flops = g.flops_without[i] / g.flops_with[i]
    seconds = g.seconds_without[i] / g.seconds_with[i]
    return (
        say(
            "Token {n} of a text costs {few} FLOPs with the cache and {many} without, {ratio} "
            "times as many.",
            n=f"{n:,}",
            few=quantity(g.flops_with[i]),
            many=quantity(g.flops_without[i]),
            ratio=quantity(flops),
        ),
        say(
            "Its step takes {fast} with the cache {measured_with} and {slow} without it "
            "{measured_without}, {ratio} times as long.{why}",
            fast=seconds_label(g.seconds_with[i]),
            slow=seconds_label(g.seconds_without[i]),
            measured_with=_how(g.measured_with[i]),
            measured_without=_how(g.measured_without[i]),
            ratio=quantity(seconds),
            why=" The ratio of the times is smaller, because a step with the cache still reads all "
            "weights, for one token only, and calls every operation."
            if seconds < 0.8 * flops
            else "",
        ),
        say(
            "A full cache of {n} positions takes {bytes}; the weights that each step reads take "
            "{weights}.",
            n=f"{n:,}",
            bytes=bytes_label(g.bytes_with[i] - g.bytes_without[i]),
            weights=bytes_label(run.weight_nbytes),
        ),
    )


def _how(measured: np.bool_) -> str:
    return "(measured)" if measured else "(extrapolated)"
