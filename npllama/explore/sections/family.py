"""12: the family, and the time of each operation of this run."""

from markupsafe import Markup

from npllama.config import LLAMA_2, LlamaConfig
from npllama.costs import attention_flops, forward_flops, parameters_by_part
from npllama.explore.figures.family import parameters_by_part as parts_picture
from npllama.explore.figures.family import time_by_operation
from npllama.explore.labels import bytes_label, count, quantity, seconds_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, Table, say, shape
from npllama.explore.sections.heads import cache_nbytes

_POSITIONS = 4096
_ITEMSIZE = 2  # of weights and cache in float16 or bfloat16
_BANDWIDTH = 100e9


def section(run: Record) -> Section:
    models = [("this model", run.config), *LLAMA_2.items()]
    c, times = run.config, run.times
    return Section(
        slug="family",
        title="The family, and where the time of this run went",
        idea=(
            say(
                "All LLaMA-2 models are this one with other sizes. Most of their parameters are in "
                "the feed-forward networks. A step that writes one token multiplies by each weight "
                "once, 2 FLOPs, and must first read it from memory, 2 bytes in 16 bits: one FLOP "
                "per byte. Processors compute far faster than they read, so a large model writes "
                "as fast as its memory is read, and smaller weights (int8) and smaller caches "
                "(GQA) make it faster. A small model fits into the processor's own caches, and the "
                "fixed cost of each operation then counts more."
            ),
        ),
        equations=(
            (r"\text{parameters} = VD" if c.tie_embeddings else r"\text{parameters} = 2VD")
            + r" + L\,(2D(H + K)C + 3DF + 2D) + D",
        ),
        functions=(
            Function(
                forward_flops,
                ("test_flops_are_two_a_number_and_row",),
                "Kaplan et al. 2020, section 2.1",
            ),
            Function(
                attention_flops,
                ("test_flops_of_attention_are_those_of_its_two_products",),
                "Kaplan et al. 2020, section 2.1",
            ),
        ),
        shapes=tuple(
            shape(", ".join(names), letters, *sizes) for names, letters, sizes in _matrices(c)
        ),
        parts=(
            _table(run),
            Picture(
                parts_picture([(name, parameters_by_part(config)) for name, config in models]),
                say("The share of the parameters in each part."),
            ),
            Picture(
                time_by_operation([operation(name, c) for name in times.names], times.seconds),
                say(
                    "Seconds per operation while this model read {read} and wrote {new} on "
                    "{backend} ({device}). The time of an operation excludes the operations that "
                    "it calls. <code>linear</code> is the product with the named matrix; + joins "
                    "matrices in one product, and <q>or</q> separates matrices of the same shape. "
                    "<code>outside of ops</code> is the Python code around the operations. The "
                    "backend's own versions of the functions ran here.",
                    read=count(times.n_read, "token"),
                    new=count(times.n_new, "token"),
                    backend=run.backend,
                    device=run.device,
                ),
            ),
        ),
        see=_see(run),
    )


def _matrices(c: LlamaConfig) -> list[tuple[tuple[str, ...], str, tuple[int, int]]]:
    """(names, shape in letters, shape) of the matrices."""
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return [
        (("embedding", "head"), "V, D", (c.vocab_size, c.dim)),
        (("wq",), "H*C, D", (heads, c.dim)),
        (("wk", "wv"), "K*C, D", (kv_heads, c.dim)),
        (("wo",), "D, H*C", (c.dim, heads)),
        (("w_gate", "w_up"), "F, D", (c.ffn_dim, c.dim)),
        (("w_down",), "D, F", (c.dim, c.ffn_dim)),
    ]


def operation(name: str, c: LlamaConfig) -> str:
    """A name of `Times` with the roles of the matrix instead of its shape.

    Roles with equal shapes are all named: "linear gate+up or head".
    """
    method, *size = name.split(" ", 1)
    if not size:
        return name
    heads, kv_heads = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    roles = {
        "q+k+v": (heads + 2 * kv_heads, c.dim),
        "q": (heads, c.dim),
        "k or v": (kv_heads, c.dim),
        "wo": (c.dim, heads),
        "gate+up": (2 * c.ffn_dim, c.dim),
        "gate or up": (c.ffn_dim, c.dim),
        "down": (c.dim, c.ffn_dim),
        "head": (c.vocab_size, c.dim),
    }
    found = [role for role, (n, d) in roles.items() if size[0] == f"{n} x {d}"]
    return f"{method} {' or '.join(found)}" if found else name


def _table(run: Record) -> Table:
    c = run.config
    own = _column(c, run.weight_nbytes, run.cache_itemsize, run.context)
    columns = [own, *(_column(config, weights_read(config)) for config in LLAMA_2.values())]
    rows = tuple((label, *(column[label] for column in columns)) for label in own)
    return Table(
        ("", "this model", *LLAMA_2),
        rows,
        say(
            "Cache, bytes, and FLOPs are for one text. This model is as it ran: {dtype} weights "
            "and {itemsize} bytes per element of the cache. The others have 16-bit weights and "
            "cache. The cost of a token is that of the last one of a full context: {own} positions "
            "for this model, {n} for the others.",
            dtype=run.dtype,
            itemsize=run.cache_itemsize,
            own=f"{run.context:,}",
            n=f"{_POSITIONS:,}",
        ),
    )


def weights_read(config: LlamaConfig) -> int:
    """Bytes of 16-bit weights that a step reads: all but an embedding that is not also the head."""
    skipped = 0 if config.tie_embeddings else parameters_by_part(config)["embedding"]
    return (config.n_parameters - skipped) * _ITEMSIZE


def _column(
    config: LlamaConfig, weights: int, itemsize: int = _ITEMSIZE, n: int = _POSITIONS
) -> dict[str, str]:
    """One model: labels and values. `weights` are the bytes that a step reads."""
    part = parameters_by_part(config)
    cache = cache_nbytes(config, config.n_kv_heads, 1, itemsize)
    flops = forward_flops(config, 1, 1) + attention_flops(config, 1, n - 1)
    return {
        "layers L": f"{config.n_layers:,}",
        "width D": f"{config.dim:,}",
        "query heads H": f"{config.n_heads:,}",
        "key-value heads K": f"{config.n_kv_heads:,}",
        "head width C": f"{config.head_dim:,}",
        "ffn width F": f"{config.ffn_dim:,}",
        "vocabulary V": f"{config.vocab_size:,}",
        "parameters": quantity(config.n_parameters),
        **{f"· {name}": quantity(part[name]) if part[name] else "tied" for name in part},
        "cache per position": bytes_label(cache),
        "cache of a full context": bytes_label(cache * n),
        "FLOPs per token": quantity(flops),
        "bytes read per token": bytes_label(weights + cache * n),
    }


def _code(name: str) -> Markup:
    return say("<code>{name}</code>", name=name)


def _see(run: Record) -> tuple[Markup, ...]:
    times, large = run.times, LLAMA_2["70B"]
    top = [_code(operation(name, run.config)) for name in times.names[:3]]
    share = times.seconds[:3].sum() / max(times.total, 1e-30)
    read = weights_read(large) + cache_nbytes(large, large.n_kv_heads, _POSITIONS, _ITEMSIZE)
    per_token = times.total / max(times.n_new, 1)
    return (
        say(
            "This run took {total}{each}. {share:.0%} of it went to {first}, {second}, and "
            "{third}.",
            total=seconds_label(times.total),
            each=f", {seconds_label(per_token)} per new token, reading the prompt included"
            if times.n_new
            else "",
            first=top[0],
            second=top[1],
            third=top[2],
            share=share,
        ),
        say(
            "70B reads {read} for each token at a full context. A memory of {bandwidth:.0f} GB/s "
            "allows {rate:.2g} tokens per second, however fast the processor computes.",
            read=bytes_label(read),
            bandwidth=_BANDWIDTH / 1e9,
            rate=_BANDWIDTH / read,
        ),
    )
