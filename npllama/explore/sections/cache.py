"""7: the KV cache."""

import numpy as np

from npllama.explore.figures.cache import cost_growth
from npllama.explore.labels import bytes_label, quantity, seconds_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, say, shape
from npllama.kv_cache import LayerCache
from npllama.ops import Ops


def section(run: Record) -> Section:
    c, g = run.config, run.growth
    every = np.ones(len(g.n), dtype=bool)
    return Section(
        slug="cache",
        title="The KV cache: nothing is computed twice",
        idea=(
            say(
                "A model writes one token at a time. The next token depends on the last token's "
                "query, and on the keys and values of <em>all</em> tokens so far. Those of the "
                "past do not change: the mask lets no later token reach them. So they are "
                "computed once and kept. That is the <strong>KV cache</strong>."
            ),
            say(
                "With it a step computes one token, whatever the length of the text; only the "
                "scores with the past keys grow. Without it each step computes the whole text "
                "again. The price is memory, which section 4 counts, and the time to read it. In "
                "the equations <var>P</var> is the number of weights that a token is multiplied by."
            ),
        ),
        equations=(
            r"\text{FLOPs of token } n \text{ with the cache} = 2P + 4LHC\,n",
            r"\text{without} \approx 2P\,n + 2LHC\,n^2",
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
        parts=(
            Picture(
                cost_growth(g.n, g.flops_with, g.flops_without, "FLOPs", every, every),
                say(
                    "FLOPs of the token at each position, counted: 2 per element of a weight "
                    "matrix and token, and 4<var>C</var> per head, layer and pair of tokens."
                ),
            ),
            Picture(
                cost_growth(g.n, g.bytes_with, g.bytes_without, "bytes", every, every),
                say(
                    "Bytes of weights and cache that a step reads. Without a cache only the "
                    "weights are read: the cache saves arithmetic and costs memory."
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
                say(
                    "Seconds per token on {device}. Hollow points are not measured: they are the "
                    "last measured time multiplied by the ratio of the FLOPs.",
                    device=run.device,
                ),
            ),
        ),
        see=_see(run),
    )


def _see(run: Record) -> tuple:
    g = run.growth
    n, i = int(g.n[-1]), len(g.n) - 1
    return (
        say(
            "At position {n} a token costs {few} FLOPs with the cache and {many} without, {ratio} "
            "times as many.",
            n=f"{n:,}",
            few=quantity(g.flops_with[i]),
            many=quantity(g.flops_without[i]),
            ratio=f"{g.flops_without[i] / g.flops_with[i]:,.0f}",
        ),
        say(
            "There a step takes {fast} with the cache {measured_with} and {slow} without it "
            "{measured_without}.",
            fast=seconds_label(g.seconds_with[i]),
            slow=seconds_label(g.seconds_without[i]),
            measured_with=_how(g.measured_with[i]),
            measured_without=_how(g.measured_without[i]),
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
