"""12: the family, and where the time of this run went."""

from markupsafe import Markup

from npllama.config import LLAMA_2, LlamaConfig
from npllama.costs import attention_flops, forward_flops, parameters_by_part
from npllama.explore.figures.family import parameters_by_part as parts_picture
from npllama.explore.figures.family import time_by_operation
from npllama.explore.labels import bytes_label, quantity, seconds_label
from npllama.explore.record import Record
from npllama.explore.section import Function, Picture, Section, Table, count, say, shape
from npllama.explore.sections.heads import cache_nbytes

_POSITIONS = 4096
_ITEMSIZE = 2  # of weights and cache in float16 or bfloat16
_BARS = 12


def section(run: Record) -> Section:
    models = [("this model", run.config), *LLAMA_2.items()]
    c, times = run.config, run.times
    return Section(
        slug="family",
        title="The family, and where the time of this run went",
        idea=(
            say(
                "All LLaMA-2 models are this one with other numbers. Most of their parameters are "
                "in the feed-forward networks. A step that writes one token multiplies each "
                "weight once, 2 FLOPs, and must read it from memory first, 2 bytes in 16 bits: "
                "one FLOP per byte. Processors can multiply far faster than they can read, so "
                "writing is limited by memory, and both smaller weights (int8) and smaller caches "
                "(GQA) make it faster."
            ),
        ),
        equations=(r"\text{parameters} = 2VD + L\,(2D(H + K)C + 3DF + 2D) + D",),
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
        shapes=(
            shape("embedding, head", "V, D", c.vocab_size, c.dim),
            shape("wq", "H*C, D", c.n_heads * c.head_dim, c.dim),
            shape("wk, wv", "K*C, D", c.n_kv_heads * c.head_dim, c.dim),
            shape("wo", "D, H*C", c.dim, c.n_heads * c.head_dim),
            shape("w_gate, w_up", "F, D", c.ffn_dim, c.dim),
            shape("w_down", "D, F", c.dim, c.ffn_dim),
        ),
        parts=(
            _table(models),
            Picture(
                parts_picture([(name, parameters_by_part(config)) for name, config in models]),
                say("What share of the parameters each part has."),
            ),
            Picture(
                time_by_operation(list(times.names[:_BARS]), times.seconds[:_BARS]),
                say(
                    "Seconds per operation while this model read {read} and wrote {new} on "
                    "{backend} ({device}), without the operations that each one calls. These are "
                    "the backend's own versions of the functions above; "
                    "<code>outside of ops</code> "
                    "is the Python around them.",
                    read=count(times.n_read, "token"),
                    new=count(times.n_new, "token"),
                    backend=run.backend,
                    device=run.device,
                ),
            ),
        ),
        see=_see(run),
    )


def _code(name: str) -> Markup:
    return say("<code>{name}</code>", name=name)


def _table(models: list[tuple[str, LlamaConfig]]) -> Table:
    columns = [_column(config) for _name, config in models]
    names = [name for name, _ in models]
    rows = tuple((label, *(column[label] for column in columns)) for label in columns[0])
    return Table(
        ("", *names),
        rows,
        say(
            "Cache, bytes and FLOPs are those of one text. Bytes are for 16-bit weights and "
            "cache; the cost of a token counts a cache of {n} positions, or of the context where "
            "that is shorter.",
            n=f"{_POSITIONS:,}",
        ),
    )


def _column(config: LlamaConfig) -> dict[str, str]:
    part = parameters_by_part(config)
    n = min(_POSITIONS, config.longest_context)
    cache = cache_nbytes(config, config.n_kv_heads, 1, _ITEMSIZE)
    untied = not config.tie_embeddings
    read = config.n_parameters - (part["embedding"] if untied else 0)
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
        f"cache at {_POSITIONS:,} positions": bytes_label(cache * n)
        + ("" if n == _POSITIONS else f" (at {n:,})"),
        "FLOPs per token": quantity(flops),
        "bytes read per token": bytes_label(read * _ITEMSIZE + cache * n),
    }


def _see(run: Record) -> tuple:
    times, large = run.times, LLAMA_2
    top, places = times.names[:3], ("first", "second", "third")
    share = times.seconds[:3].sum() / max(times.total, 1e-30)
    read = (large["70B"].n_parameters - 32000 * 8192) * _ITEMSIZE
    per_token = times.total / max(times.n_new, 1)
    return (
        say(
            "This run took {total}{each}. {share:.0%} of it went to {first}, {second} and {third}.",
            total=seconds_label(times.total),
            each=f", {seconds_label(per_token)} for each new token" if times.n_new else "",
            **{place: _code(name) for place, name in zip(places, top, strict=True)},
            share=share,
        ),
        say(
            "70B reads {read} for each token that it writes. A memory of 100 GB/s would allow "
            "{rate:.2g} tokens per second, whatever the processor.",
            read=bytes_label(read),
            rate=100e9 / read,
        ),
    )
