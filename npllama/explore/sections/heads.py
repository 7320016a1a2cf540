"""4: queries, keys and values, and which heads share keys."""

from markupsafe import Markup

from npllama.config import LLAMA_2, LlamaConfig
from npllama.explore.figures.heads import (
    cache_bytes,
    heads_diagram,
    kind_of_attention,
    qkv_heads,
)
from npllama.explore.labels import bytes_label, count
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, piece, say, shape
from npllama.kv_cache import KVCache
from npllama.ops import Ops

FAMILY = ("7B", "70B")
_FAMILY_ITEMSIZE = 2  # float16 or bfloat16


def section(run: Record) -> Section:
    c, n = run.config, len(run.pieces)
    first = run.layers[0]
    return Section(
        slug="heads",
        title="Queries, keys and values: which heads share keys",
        idea=(
            say(
                "So far each token knows only itself. In attention a token reads from itself and "
                "from the tokens before it. Each head projects a token's vector to three shorter "
                "vectors of <var>C</var> = {c} elements: a <em>query</em>, what the token looks "
                "for; a <em>key</em>, by which it is found; and a <em>value</em>, what is read "
                "from it. The dot product of a query and a key says how well they match. Several "
                "heads look for several things at once.",
                c=c.head_dim,
            ),
            say(
                "The keys and values of all past tokens stay in memory while a text is written "
                "(section 7); queries do not. This memory, and the time to read it for each new "
                "token, are proportional to the number of key-value heads <var>K</var>. "
                "<em>Multi-head</em> attention has a key-value head for each query head "
                "(<var>K</var> = <var>H</var>). <em>Multi-query</em> attention has one for all "
                "(<var>K</var> = 1), which takes the least memory, but the model predicts worse."
            ),
            say(
                "<strong>Grouped-query attention (GQA)</strong> lies between: <var>G</var> = "
                "<var>H</var>/<var>K</var> query heads share a key-value head, so the cache is "
                "<var>G</var> times smaller. The heads of a group still have queries of their own, "
                "so they can look for different things among the same keys. Ainslie et al. (2023) "
                "measured that quality stays close to that of multi-head attention."
            ),
        ),
        equations=(
            r"h = \text{RMSNorm}(x)",
            r"q_j = h\,{W^Q_j}^{\top}, \qquad k_g = h\,{W^K_g}^{\top}, \qquad"
            r" v_g = h\,{W^V_g}^{\top}, \qquad g = \lfloor j / G \rfloor",
            r"\text{bytes of the cache} = 2 \cdot L \cdot K \cdot C \cdot N \cdot"
            r" \text{bytes per element}",
        ),
        functions=(
            Function(
                Ops.queries_keys_values,
                ("test_attention_block_is_norm_projections_rope_attention_and_residual",),
                "Vaswani et al. 2017, section 3.2.2; Ainslie et al. 2023 (GQA), section 2.2",
            ),
            Function(Ops.weighted_values, ("test_weighted_values_mix_those_of_a_heads_group",)),
        ),
        shapes=(
            shape("h", "T, D", n, c.dim),
            shape("q", "H, T, C", c.n_heads, n, c.head_dim),
            shape("k", "K, T, C", c.n_kv_heads, n, c.head_dim),
            shape("v", "K, T, C", c.n_kv_heads, n, c.head_dim),
        ),
        parts=(
            Picture(
                heads_diagram(c.n_heads, c.n_kv_heads, grouped_heads(c)),
                say("The query heads that share a key-value head, for each kind of attention."),
            ),
            Picture(
                qkv_heads(first.q[:, -1], first.k[:, -1], first.v[:, -1]),
                say(
                    "The query, key and value heads of {last} in layer 0, one strip per head; "
                    "queries and keys are shown after RoPE (section 5). Only the strips of keys "
                    "and values go into the cache.",
                    last=piece(run.pieces[-1]),
                ),
            ),
            Picture(
                cache_bytes(_cache_rows(run), per="of a full cache"),
                _cache_caption(run),
            ),
        ),
        see=_see(run),
    )


def _cache_caption(run: Record) -> Markup:
    c = run.config
    return say(
        "Bytes of the cache of one text that fills the context: {own} positions of {itemsize} "
        "bytes per element for this model, {positions} positions of {family} bytes for 7B and 70B. "
        "◀ marks the kind that the model has; the other bars show what it would need.{variants}",
        own=f"{run.context:,}",
        itemsize=run.cache_itemsize,
        positions=f"{LLAMA_2['7B'].context_length:,}",
        family=_FAMILY_ITEMSIZE,
        variants=""
        if kind_of_attention(c.n_heads, c.n_kv_heads) == "grouped" or grouped_heads(c) is None
        else f" Its grouped variant would have {grouped_heads(c)} key-value heads.",
    )


def cache_nbytes(config: LlamaConfig, n_kv_heads: int, context: int, itemsize: int) -> int:
    """Bytes of a cache of `context` positions if the model had `n_kv_heads` key-value heads."""
    return KVCache.nbytes(config.n_layers, n_kv_heads, config.head_dim, 1, context, itemsize)


def grouped_heads(config: LlamaConfig) -> int | None:
    """K of the grouped variant: the model's own; else 8, as in 70B, or the smallest possible; None
    if no group divides H."""
    if kind_of_attention(config.n_heads, config.n_kv_heads) == "grouped":
        return config.n_kv_heads
    divisors = [k for k in range(2, config.n_heads) if config.n_heads % k == 0]
    return 8 if 8 in divisors else next(iter(divisors), None)


def _cache_rows(run: Record) -> list[tuple[str, dict[str, int], str]]:
    models = [("this model", run.config, run.context, run.cache_itemsize)]
    models += [
        (name, LLAMA_2[name], LLAMA_2[name].context_length, _FAMILY_ITEMSIZE) for name in FAMILY
    ]
    rows = []
    for name, config, context, itemsize in models:
        heads = {"multi-head": config.n_heads, "grouped": grouped_heads(config), "multi-query": 1}
        sizes = {
            f"{kind} ({k})": cache_nbytes(config, k, context, itemsize)
            for kind, k in heads.items()
            if k is not None
        }
        own = kind_of_attention(config.n_heads, config.n_kv_heads)
        rows.append((name, sizes, f"{own} ({config.n_kv_heads})"))
    return rows


def _see(run: Record) -> tuple[Markup, ...]:
    c, large = run.config, LLAMA_2["70B"]
    per_token = cache_nbytes(c, c.n_kv_heads, 1, run.cache_itemsize)
    kind = kind_of_attention(c.n_heads, c.n_kv_heads).replace("grouped", "grouped-query")
    all_heads, few_heads = (
        cache_nbytes(large, k, large.context_length, _FAMILY_ITEMSIZE)
        for k in (large.n_heads, large.n_kv_heads)
    )
    return (
        say(
            "This model has {h} and {k}, which is {kind} attention: {g} one key-value head. A "
            "token takes {bytes} in the cache of all {layers}.",
            h=count(c.n_heads, "query head"),
            k=count(c.n_kv_heads, "key-value head"),
            kind=kind,
            g=count(c.n_heads // c.n_kv_heads, "query head reads", "query heads read"),
            bytes=bytes_label(per_token),
            layers=count(c.n_layers, "layer"),
        ),
        say(
            "70B has {h} query heads and {k} key-value heads. With {h} key-value heads its cache "
            "of {n} positions would take {all}; with {k} it takes {few}.",
            h=large.n_heads,
            k=large.n_kv_heads,
            n=f"{large.context_length:,}",
            all=bytes_label(all_heads),
            few=bytes_label(few_heads),
        ),
    )
