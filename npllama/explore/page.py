"""The page: the sections of a run, put into page.html."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from markupsafe import Markup

import npllama
from npllama.config import LLAMA_2
from npllama.explore.colours import DARK, LIGHT
from npllama.explore.figures.overview import pipeline
from npllama.explore.labels import bytes_label, count, printable, quantity
from npllama.explore.record import Record
from npllama.explore.section import Picture, Section, Table, say
from npllama.explore.sections import (
    attention,
    cache,
    embedding,
    family,
    heads,
    lens,
    norm,
    residual,
    rope,
    sampling,
    swiglu,
    text,
)

SECTIONS: tuple[Callable[[Record], Section], ...] = tuple(
    module.section
    for module in (
        text,
        embedding,
        norm,
        heads,
        rope,
        attention,
        cache,
        swiglu,
        residual,
        lens,
        sampling,
        family,
    )
)
_FOLDER = Path(__file__).parent
_ENDS = {"eos": ", then the model ended the text"}
_LIGHT_CODE, _DARK_CODE = "default", "github-dark"


def page(run: Record, command: str = "npllama explore") -> str:
    """The page of a run as one HTML document that needs no other file.

    Args:
        command: the command that makes the page, for its footer.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"mathml": mathml, "highlighted": highlighted}
    return environment.get_template("page.html").render(
        sections=[section(run) for section in SECTIONS],
        prompt=_visible(run.prompt if run.prompt is not None else " ".join(map(str, run.ids))),
        new_text=_visible(_new_text(run)),
        notes=_notes(run),
        facts=_facts(run),
        letters=_letters(run),
        overview=_overview(run),
        reasons=_reasons(run),
        command=_visible(command),
        version=npllama.__version__,
        style=Markup(_style()),
        script=Markup((_FOLDER / "page.js").read_text(encoding="utf-8")),
    )


@lru_cache(maxsize=64)
def mathml(latex: str) -> Markup:
    """An equation as MathML, which browsers render without a script."""
    from latex2mathml.converter import convert

    return Markup(convert(latex, display="block"))


def highlighted(code: str) -> Markup:
    """Python code as HTML, coloured by the page's style."""
    from pygments import highlight
    from pygments.formatters.html import HtmlFormatter
    from pygments.lexers.python import PythonLexer

    return Markup(highlight(code, PythonLexer(), HtmlFormatter(nowrap=False)))


def _style() -> str:
    from pygments.formatters.html import HtmlFormatter

    def variables(colours: dict[str, str]) -> str:
        names = {
            "page": "paper",
            "page-ink": "ink",
            "soft-ink": "soft",
            "panel": "panel",
            "figure": "paper",
            "link": "1",
            "warn": "2",
            "good": "3",
            "rule": "fill",
        }
        return "".join(f"--{name}:{colours[key]};" for name, key in names.items())

    def code(style: str) -> str:
        made = HtmlFormatter(style=style).get_style_defs(".code .highlight")
        return "\n".join(line for line in made.splitlines() if "background:" not in line)

    light, dark = LIGHT | {"panel": "#f4f6f8"}, DARK | {"panel": "#1f2227"}
    return "\n".join(
        [
            f":root{{color-scheme:light dark;{variables(light)}}}",
            code(_LIGHT_CODE),
            "@media screen and (prefers-color-scheme:dark){",
            f":root{{{variables(dark)}}}",
            code(_DARK_CODE),
            "}",
            (_FOLDER / "page.css").read_text(encoding="utf-8"),
        ]
    )


def _visible(text: str) -> str:
    """The text with its line breaks; invisible characters are spelled out."""
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))


def _new_text(run: Record) -> str:
    if run.new_text is not None:
        return run.new_text
    return " " + " ".join(map(str, run.new_ids))


def _notes(run: Record) -> list[Markup]:
    notes = []
    if run.start:
        notes.append(
            say(
                "The prompt has {all} tokens, and the model read all of them. The pictures show "
                "the last {shown}, the <em>window</em>.",
                all=f"{len(run.ids):,}",
                shown=len(run.ids) - run.start,
            )
        )
    if not run.has_tokenizer:
        notes.append(
            say(
                "The model has no tokenizer, so a token appears as <code>#</code> and its id. A "
                "<code>tokenizer.model</code> or <code>tokenizer.json</code> in the model's "
                "directory gives the tokens their text."
            )
        )
    if len(run.ids) >= run.context:
        notes.append(
            say(
                "The prompt fills the context of {n} tokens, so the model wrote nothing after "
                "it. Section 11 shows the token that would come next.",
                n=f"{run.context:,}",
            )
        )
    return notes


def _facts(run: Record) -> Table:
    c = run.config
    rows = [
        ("model", run.model),
        ("parameters", quantity(c.n_parameters)),
        ("weights", f"{run.dtype}, {bytes_label(run.weight_nbytes)} read per step"),
        ("computed on", f"{run.backend}, {run.device}"),
        ("prompt", count(len(run.ids), "token")),
        ("written", count(len(run.new_ids), "token") + _ENDS.get(run.finish_reason, "")),
        ("seed", str(run.seed)),
    ]
    return Table((), tuple(rows), say("This run."))


def _letters(run: Record) -> Table:
    c = run.config
    shown = f"{run.start:,}, {len(run.pieces):,}, {len(run.ids):,}"
    rows = [
        ("B", "texts that are computed together", "1"),
        ("S, T, N", "tokens before the window, in it, and in the prompt: N = S + T", shown),
        ("D", "width of the residual stream", f"{c.dim:,}"),
        ("L", "layers", f"{c.n_layers:,}"),
        ("H", "query heads", f"{c.n_heads:,}"),
        ("K", "key-value heads", f"{c.n_kv_heads:,}"),
        ("G", "query heads per key-value head, H/K", f"{c.n_heads // c.n_kv_heads:,}"),
        ("C", "width of a head", f"{c.head_dim:,}"),
        ("F", "width of the feed-forward network", f"{c.ffn_dim:,}"),
        ("V", "pieces of the vocabulary", f"{c.vocab_size:,}"),
    ]
    return Table(
        (),
        tuple(rows),
        say(
            "These letters have the same meaning in all sections and in the code. The window is "
            "the part of the prompt that the pictures show{all}. Layers, heads, and positions "
            "count from 0.",
            all="" if run.start else ", here all of it",
        ),
    )


def _reasons(run: Record) -> list[tuple[str, Markup]]:
    c, growth = run.config, run.growth
    shared = c if c.n_kv_heads < c.n_heads else LLAMA_2["70B"]
    ratio = growth.flops_without[-1] / growth.flops_with[-1]
    return [
        (
            "The residual stream",
            say(
                "Each layer adds to the stream instead of replacing it. So earlier results remain "
                "in the sum, and the gradient reaches every layer along the sum."
            ),
        ),
        (
            "RMSNorm",
            say(
                "The stream grows from layer to layer. RMSNorm gives every layer input of the same "
                "size. That keeps softmax inputs moderate and training stable, with less work "
                "than LayerNorm."
            ),
        ),
        (
            "RoPE",
            say(
                "A dot product does not depend on positions. RoPE rotates queries and keys, so "
                "that their score depends on what they contain and on the distance between the "
                "two tokens. It needs no parameters."
            ),
        ),
        (
            "Grouped-query attention",
            say(
                "The cache has to be stored, and to be read for each new token. With {k} instead "
                "of {h}, as in {name}, it is {g} times smaller, at nearly the same quality.",
                k=count(shared.n_kv_heads, "key-value head"),
                h=shared.n_heads,
                g=shared.n_heads // shared.n_kv_heads,
                name="this model" if shared is c else "70B",
            ),
        ),
        (
            "The KV cache",
            say(
                "Keys and values of past tokens never change. They are computed once and stored, "
                "instead of computing the whole text again for each token. Token {n} then costs "
                "{ratio} times fewer FLOPs.",
                ratio=quantity(ratio),
                n=f"{int(growth.n[-1]):,}",
            ),
        ),
        (
            "SwiGLU",
            say(
                "Each token opens and closes the elements of the feed-forward network with gates "
                "of its own. The gates are smooth, so a closed gate still learns. At an equal "
                "number of parameters this predicts better than ReLU."
            ),
        ),
        (
            "Sampling",
            say(
                "The likeliest token alone gives dull text, and the whole softmax sometimes "
                "gives nonsense. Temperature and filters are a compromise, and a seed makes the "
                "choice reproducible."
            ),
        ),
    ]


def _overview(run: Record) -> Picture:
    c = run.config
    figure = pipeline(
        vocab_size=c.vocab_size,
        dim=c.dim,
        n_layers=c.n_layers,
        n_heads=c.n_heads,
        n_kv_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        ffn_dim=c.ffn_dim,
        n_tokens=len(run.ids),
    )
    return Picture(figure, say("The whole model, with the shapes of this run."))
