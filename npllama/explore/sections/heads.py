"""4: queries, keys and values, and which heads share keys."""

from npllama.config import LLAMA_2, LlamaConfig
from npllama.explore.figures.heads import cache_bytes, heads_diagram, qkv_heads
from npllama.explore.labels import bytes_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, count, piece, say, shape
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
                "So far each token knows only itself. In attention a token reads from the tokens "
                "before it. Each head projects a token's vector to three shorter ones of "
                "<var>C</var> = {c} elements: a <em>query</em>, what the token looks for; a "
                "<em>key</em>, by which it is found; and a <em>value</em>, what is read from it. "
                "The dot product of a query and a key says how well they match. Several heads "
                "look for several things at once.",
                c=c.head_dim,
            ),
            say(
                "Keys and values of all past tokens stay in memory while a text is written "
                "(section 7); queries do not. That memory, and the time to read it at each new "
                "token, grows with the number of key-value heads <var>K</var>. "
                "<em>Multi-head</em> attention has a key-value head for each query head "
                "(<var>K</var> = <var>H</var>). <em>Multi-query</em> attention has one for all "
                "(<var>K</var> = 1), which is smallest and costs quality. "
                "<strong>Grouped-query attention (GQA)</strong> lies between: <var>G</var> = "
                "<var>H</var>/<var>K</var> query heads share a key-value head. It keeps nearly "
                "the quality of multi-head attention with a cache that is <var>G</var> times "
                "smaller."
            ),
        ),
        equations=(
            r"q_h = W^Q_h\, x, \qquad k_j = W^K_j\, x, \qquad v_j = W^V_j\, x, \qquad"
            r" j = \lfloor h / G \rfloor",
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
            shape("h = RMSNorm(x)", "T, D", n, c.dim),
            shape("q", "H, T, C", c.n_heads, n, c.head_dim),
            shape("k", "K, T, C", c.n_kv_heads, n, c.head_dim),
            shape("v", "K, T, C", c.n_kv_heads, n, c.head_dim),
        ),
        parts=(
            Picture(
                heads_diagram(c.n_heads, c.n_kv_heads, grouped_heads(c)),
                say("Which query heads share a key-value head."),
            ),
            Picture(
                qkv_heads(first.q[:, -1], first.k[:, -1], first.v[:, -1]),
                say(
                    "Query, key and value heads of {last} in layer 0, one strip per head.",
                    last=piece(run.pieces[-1]),
                ),
            ),
            Picture(
                cache_bytes(_cache_rows(run), per="of a full cache"),
                say(
                    "Bytes of the cache for one text that fills the context: {own} positions of "
                    "{itemsize} bytes per element for this model, 4,096 positions of 2 bytes for "
                    "7B and 70B.",
                    own=f"{run.context:,}",
                    itemsize=run.cache_itemsize,
                ),
            ),
        ),
        see=_see(run),
    )


def cache_nbytes(config: LlamaConfig, n_kv_heads: int, context: int, itemsize: int) -> int:
    """Bytes of a cache of the whole context, if the model had so many key-value heads."""
    return KVCache.nbytes(config.n_layers, n_kv_heads, config.head_dim, 1, context, itemsize)


def _kind(config: LlamaConfig) -> str:
    if config.n_kv_heads == config.n_heads:
        return "multi-head"
    return "multi-query" if config.n_kv_heads == 1 else "grouped"


def grouped_heads(config: LlamaConfig) -> int | None:
    """K of the grouped variant: the model's own, or 8 as 70B has it, or any; None for none."""
    if _kind(config) == "grouped":
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
            kind: cache_nbytes(config, k, context, itemsize)
            for kind, k in heads.items()
            if k is not None
        }
        rows.append((name, sizes, _kind(config)))
    return rows


def _see(run: Record) -> tuple:
    c = run.config
    per_token = cache_nbytes(c, c.n_kv_heads, 1, run.cache_itemsize)
    kinds = {
        "multi-head": "which is multi-head attention",
        "grouped": "which is grouped-query attention",
        "multi-query": "which is multi-query attention",
    }
    large = LLAMA_2["70B"]
    both = [cache_nbytes(large, k, 4096, _FAMILY_ITEMSIZE) for k in (large.n_heads, 8)]
    return (
        say(
            "This model has {h} and {k}, {kind}: {g} one key-value head. A token takes "
            "{bytes} in the cache of all {layers}.",
            h=count(c.n_heads, "query head"),
            k=count(c.n_kv_heads, "key-value head"),
            kind=kinds[_kind(c)],
            g=count(c.n_heads // c.n_kv_heads, "query head reads", "query heads read"),
            bytes=bytes_label(per_token),
            layers=count(c.n_layers, "layer"),
        ),
        say(
            "70B has 64 query heads and 8 key-value heads. With 64 key-value heads its cache of "
            "4,096 positions would take {all}, with 8 it takes {few}.",
            all=bytes_label(both[0]),
            few=bytes_label(both[1]),
        ),
    )
