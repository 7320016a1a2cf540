"""The pictures of a run: complete, readable, escaped, reproducible, small, and true to the data."""

import base64
import re
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest

from npllama.backend import Backend
from npllama.explore.axes import Scale, labels_fit, log_ticks, ticks
from npllama.explore.colours import (
    DARK,
    DIVERGING,
    LIGHT,
    VIRIDIS,
    contrast,
    ink_on,
    luminance,
    png,
    ramp,
)
from npllama.explore.figures.attention import attention_map, attention_maps, first_token_share
from npllama.explore.figures.cache import cost_growth
from npllama.explore.figures.dials import rope_dials
from npllama.explore.figures.embedding import embedding_rows
from npllama.explore.figures.family import parameters_by_part, time_by_operation
from npllama.explore.figures.heads import cache_bytes, heads_diagram, qkv_heads
from npllama.explore.figures.lens import logit_lens
from npllama.explore.figures.norm import norm_kinds, norm_sizes
from npllama.explore.figures.overview import pipeline
from npllama.explore.figures.residual import block_shares, residual_norms
from npllama.explore.figures.rope import (
    rope_clock,
    rope_difference,
    rope_distance,
    rope_frequencies,
)
from npllama.explore.figures.sampling import cumulative_choice, sampling_stages
from npllama.explore.figures.swiglu import gate_on_silu, gate_rows
from npllama.explore.figures.text import pieces_strip
from npllama.explore.heat_map import heat_map, magnitude, signed
from npllama.explore.labels import (
    bytes_label,
    percent,
    piece_label,
    quantity,
    seconds_label,
    shorten,
    text_width,
)
from npllama.explore.svg import STYLE_ELEMENT
from npllama.ops import Ops
from npllama.ops.rope_frequencies import Rotation

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "<s>", "</svg><script>alert(1)</script>", '"', "'", "&amp;", "\x00", "\n", "\u0301",
    "\u202eabc", "שלום", "日本語", "👩", "\ud800", "\uffff", "", "   ", "a" * 90, "▁play",
]  # fmt: skip
WORDS = ["<s>", "▁Once", "▁upon", "▁a", "▁time", ",", "▁there", "▁was", "▁an", "▁elephant"]
GROUPED = {"multi-head": 9216, "grouped": 3072, "multi-query": 1536}
MODEL = {
    "embedding": 196608,
    "attention": 589824,
    "feed-forward": 1769472,
    "head": 0,
    "norms": 2496,
}
SHAPE = {"vocab_size": 32000, "dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8}


def rng():
    return np.random.default_rng(0)


def causal(*shape):
    """Attention weights whose rows sum to 1, none of them above the diagonal."""
    weights = np.tril(rng().random(shape) ** 4 + 1e-9)
    return weights / weights.sum(-1, keepdims=True)


def silu(x):
    return x / (1 + np.exp(-x))


def hands(angle, n, length):
    """(n, 2): a hand that points up, and turns by an angle per position."""
    turned = np.pi / 2 + angle * np.arange(n)
    return length * np.stack([np.cos(turned), np.sin(turned)], axis=1)


def pictures(pieces, n_layers, n_heads, n_kv_heads, scale):
    """Every picture once, for a run of the given sizes; elements are about `scale` large."""
    n, width, r = len(pieces), 6 * n_heads, rng()
    x = scale * r.standard_normal((n, width))
    theta = 10000.0 ** -(np.arange(8) / 8)
    p = r.dirichlet(np.ones(n))
    positions = np.array([2.0**i for i in range(10)])
    curve = np.linspace(-6, 6, 61)
    scores = np.subtract.outer(np.arange(n), np.arange(n)) * scale
    deep = (n_layers + 1, n)
    return {
        "pieces": lambda: pieces_strip("".join(pieces), pieces, list(range(n))),
        "embedding": lambda: embedding_rows(pieces, x),
        "norm": lambda: norm_sizes(scale * (1 + r.random((n_layers, n))), np.ones((n_layers, n))),
        "norm kinds": lambda: norm_kinds(x[0], x[0] / scale, x[0] / scale - 1),
        "heads": lambda: heads_diagram(n_heads, n_kv_heads),
        "cache": lambda: cache_bytes([("this model", GROUPED, "grouped")]),
        "qkv": lambda: qkv_heads(
            scale * r.standard_normal((n_heads, 4)), *np.zeros((2, n_kv_heads, 4))
        ),
        "clock": lambda: rope_clock(theta, 2, hands(float(theta[2]), n, scale)),
        "difference": lambda: rope_difference(
            hands(0.6, 20, scale), hands(0.6, 20, scale), 0.6, [(5, 2), (15, 12)]
        ),
        "dials": lambda: rope_dials(theta, 40 * n),
        "frequencies": lambda: rope_frequencies(theta),
        "scaled frequencies": lambda: rope_frequencies(theta / 4, theta),
        "distance": lambda: rope_distance(scores),
        "maps": lambda: attention_maps(causal(n_layers, n_heads, n, n), pieces),
        "map": lambda: attention_map(causal(n, n), pieces, n_layers - 1, n_heads - 1),
        "first token": lambda: first_token_share(np.ones((n_layers, n_heads))),
        "FLOPs": lambda: cost_growth(positions, 1e9 + positions, 1e9 * positions, "FLOPs"),
        "seconds": lambda: cost_growth(
            positions,
            1e-3 + 0 * positions,
            1e-3 * positions,
            "seconds",
            positions > 0,
            positions < 99,
        ),
        "gate": lambda: gate_on_silu(
            x[0] / scale, silu(x[0] / scale), curve, silu(curve), np.maximum(curve, 0), pieces[-1]
        ),
        "gates": lambda: gate_rows(pieces, x),
        "residual": lambda: residual_norms(scale * r.random(deep), pieces),
        "shares": lambda: block_shares(r.random(n_layers), 20 * r.random(n_layers)),
        "lens": lambda: logit_lens([pieces] * deep[0], r.random(deep), 9 * r.random(deep), pieces),
        "sampling": lambda: sampling_stages(
            pieces, [("softmax", p), ("temperature 0.6", p), ("top-k 40", p), ("top-p", p)], 0.3, 0
        ),
        "choice": lambda: cumulative_choice(pieces, p, 0.0001, 0),
        "parameters": lambda: parameters_by_part([("stories", MODEL), ("7B", MODEL)]),
        "time": lambda: time_by_operation(pieces, r.random(n)),
        "pipeline": lambda: pipeline(**SHAPE, head_dim=128, ffn_dim=28672, n_tokens=4096),
    }


USUAL = pictures(WORDS, 6, 6, 2, 1.0)
LARGE = pictures((HOSTILE * 4)[:64], 80, 64, 8, 1e30)
SMALL = pictures([""], 1, 1, 1, 1e-30)
CASES = {
    f"{kind}, {name}": draw
    for kind, drawn in (("usual", USUAL), ("large", LARGE), ("small", SMALL))
    for name, draw in drawn.items()
}
FIGURES = {}


@pytest.fixture(params=CASES, ids=str)
def drawn(request):
    """A figure and its element tree."""
    if request.param not in FIGURES:
        FIGURES[request.param] = CASES[request.param]()
    figure = FIGURES[request.param]
    return figure, ET.fromstring(figure.svg)


def labels(tree):
    return [element.text or "" for element in tree.iter(SVG + "text")]


def tips(tree):
    return [element.text for element in list(tree.iter(SVG + "title"))[1:]]


def test_a_figure_is_one_complete_element(drawn):
    figure, tree = drawn
    assert tree.tag == SVG + "svg" and tree.get("role") == "img"
    assert tree.get("viewBox") == f"0 0 {figure.width:g} {figure.height:g}" or np.allclose(
        [float(side) for side in tree.get("viewBox").split()[2:]],
        [figure.width, figure.height],
        atol=0.01,
    )
    assert tree[0].tag == SVG + "title" and tree[0].text
    assert tree[1].tag == SVG + "desc" and len(tree[1].text) > 30
    assert figure._repr_svg_() == figure.svg
    figure.svg.encode()  # no lone surrogate


def test_a_figure_asks_for_nothing_and_holds_no_id_or_script(drawn):
    figure, tree = drawn
    for element in tree.iter():
        assert element.tag != SVG + "script" and "id" not in element.attrib
        assert element.get("href", "data:image/png;").startswith("data:image/png;")
        assert not [name for name in element.attrib if name.startswith("on")]
    assert "url(" not in figure.svg and figure.svg.count("http") == 1  # the namespace


def text_box(element):
    """(left, right, top, bottom) of a label, by the estimate of its width."""
    mono, bold = ("m" in element.get("class", "").split()), "b" in element.get("class", "").split()
    width = text_width(element.text or "", mono=mono) * (1.1 if bold and not mono else 1)
    shift = {None: 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor")] * width
    turned = re.fullmatch(r"translate\((\S+) (\S+)\)rotate\(-90\)", element.get("transform", ""))
    if turned:  # reads upwards
        x, y = map(float, turned.groups())
        return x - 11, x + 3, y + shift - width, y + shift
    x, y = float(element.get("x")), float(element.get("y"))
    return x - shift, x - shift + width, y - 11, y + 3


def test_no_label_is_cut_and_none_overlap(drawn):
    figure, tree = drawn
    boxes = [(text_box(element), element.text) for element in tree.iter(SVG + "text")]
    for (left, right, top, bottom), label in boxes:
        assert left >= -1 and right <= figure.width + 1, label
        assert top >= -1 and bottom <= figure.height + 1, label
    for i, (a, first) in enumerate(boxes):
        for b, second in boxes[i + 1 :]:
            across = min(a[1], b[1]) - max(a[0], b[0])
            down = min(a[3], b[3]) - max(a[2], b[2])
            assert across <= 2 or down <= 2, (first, second)


def test_labels_are_at_least_11_pixels_at_400(drawn):
    figure, tree = drawn
    least = float(re.search(r"min-width:([\d.]+)px", tree.get("style")).group(1))
    shown_at = max(least, 368)  # 400 less the page's margins
    assert 14 * shown_at / figure.width >= 10.9
    assert figure.width <= 460 or least < figure.width  # the usual ones do not scroll
    assert "font-size:14px" in STYLE_ELEMENT and "font-size=" not in figure.svg


@pytest.mark.parametrize("name", USUAL)
def test_a_figure_is_reproducible_and_small(name):
    first, second = (pictures(WORDS, 6, 6, 2, 1.0)[name]().svg for _ in range(2))
    assert first == second
    assert len(first.encode()) < 45_000


def test_attention_of_six_layers_by_six_heads_and_64_tokens_fits_the_page():
    pieces = ["▁elephant"] * 64
    small = attention_maps(causal(6, 6, 64, 64), pieces)
    large = attention_map(causal(64, 64), pieces, 0, 0)
    assert len(small.svg) + 36 * len(large.svg.replace(STYLE_ELEMENT, "")) < 1_000_000


@pytest.mark.parametrize("piece", HOSTILE)
def test_pieces_of_every_kind_are_shown(piece):
    tree = ET.fromstring(pieces_strip(piece, [piece], [7]).svg)
    label = piece_label(piece)
    assert label.strip() and shorten(label, 444, mono=True) in labels(tree)
    assert "7" in labels(tree)


def test_what_is_invisible_is_spelled_out():
    assert piece_label("\n") == "<0x0A>"
    assert piece_label(" a") == "▁a"
    assert piece_label("\u200e") == "<U+200E>"
    assert piece_label("\u0301") == "◌\u0301"
    assert piece_label("") == "∅"
    assert text_width("◌\u0301", mono=True) == text_width("◌", mono=True)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_are_readable_on_their_paper(theme):
    for name in ("ink", "soft"):
        assert contrast(theme[name], theme["paper"]) >= 4.5
        assert contrast(theme[name], theme["fill"]) >= 4.5
    for name in "12345":
        assert contrast(theme[name], theme["paper"]) >= 3


# Full dichromacy in linear RGB: Machado et al. 2009, table 1.
DICHROMATS = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}  # fmt: skip


def seen_lab(colour, kind):
    """CIE L*a*b* of `#rrggbb` as a dichromat sees it."""
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DICHROMATS[kind]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    f = np.cbrt(np.maximum(to_xyz @ seen / [0.9505, 1.0, 1.089], 0.0089))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", DICHROMATS)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_dichromats_tell_the_colours_of_a_figure_apart(theme, kind):
    """The two curves of a figure, and the two ends of the map of signed values."""
    pairs = [(theme["1"], theme["2"]), ("#" + DIVERGING[1], "#" + DIVERGING[-2])]
    for a, b in pairs:
        assert np.linalg.norm(seen_lab(a, kind) - seen_lab(b, kind)) > 30
    assert (
        np.linalg.norm(seen_lab("#c04040", "deuteranopia") - seen_lab("#707030", "deuteranopia"))
        < 30
    )


def test_the_colour_maps_say_what_they_are_for():
    falling = [luminance("#" + bytes(rgb).hex()) for rgb in ramp(VIRIDIS, 32)]
    assert falling == sorted(falling)  # the brighter, the more
    signed_map = [luminance("#" + bytes(rgb).hex()) for rgb in ramp(DIVERGING, 65)]
    assert max(signed_map) == signed_map[32]  # pale at 0, darker on both sides
    for rgb in ramp(VIRIDIS, 64):
        assert contrast(ink_on("#" + bytes(rgb).hex()), "#" + bytes(rgb).hex()) >= 4.5


def decoded(image):
    """(rows, columns, 4) uint8: RGBA of a PNG with a palette, by the specification."""
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(image):
        (length,) = struct.unpack(">I", image[at : at + 4])
        name, data = image[at + 4 : at + 8], image[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack(">I", image[at + 8 + length : at + 12 + length])
        assert checksum == zlib.crc32(name + data)
        chunks[name] = data
        at += 12 + length
    width, height, depth, kind, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, kind) == (8, 3)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()  # no filter
    colours = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    alpha = np.full(len(colours), 255, np.uint8)
    alpha[: len(chunks.get(b"tRNS", b""))] = np.frombuffer(chunks.get(b"tRNS", b""), np.uint8)
    return np.concatenate([colours, alpha[:, None]], axis=1)[rows[:, 1:]]


@pytest.mark.parametrize("levels", [[[0, 1], [128, 255]], [[5]], [[9, 9, 9]], [list(range(256))]])
def test_a_png_has_the_colours_of_its_levels(levels):
    pixels = decoded(png(np.array(levels), VIRIDIS))
    for row, levels_of_row in zip(pixels, levels, strict=True):
        for pixel, level in zip(row, levels_of_row, strict=True):
            assert pixel[3] == (0 if level == 0 else 255)
            if level:
                assert (pixel[:3] == ramp(VIRIDIS, 255)[level - 1]).all()


def image_of(svg):
    tree = ET.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{svg}</svg>')
    return next(tree.iter(SVG + "image"))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_heat_map_carries_its_values(scale):
    values = scale * rng().standard_normal((3, 5))
    image = image_of(heat_map(values, signed(values), (0, 0, 9, 9), ["a", '"', "<"]))
    assert image.get("data-shape") == "3 5" and image.get("data-rows") == '["a","\\"","<"]'
    halves = np.frombuffer(base64.b64decode(image.get("data-values")), "<f2").astype(float)
    back = float(image.get("data-scale")) * halves.reshape(3, 5)
    np.testing.assert_allclose(back, values, atol=1e-3 * np.abs(values).max())


def test_a_heat_map_shows_the_smallest_the_largest_and_zero():
    values = np.array([[-2.0, 0.0, 1.0, 2.0]])
    encoded = image_of(heat_map(values, signed(values), (0, 0, 9, 9))).get("href")
    pixels = decoded(base64.b64decode(encoded.removeprefix("data:image/png;base64,")))[0]
    expected = [ramp(DIVERGING, 255)[i] for i in (0, 127, 190, 254)]
    assert np.abs(pixels[:, :3].astype(int) - np.array(expected, dtype=int)).max() <= 2
    assert magnitude(np.zeros((2, 2))).levels(np.zeros((2, 2))).tolist() == [[1, 1], [1, 1]]


def test_a_masked_cell_is_transparent():
    figure = attention_map(causal(4, 4), WORDS[:4], 0, 0)
    image = next(ET.fromstring(figure.svg).iter(SVG + "image"))
    encoded = image.get("href").removeprefix("data:image/png;base64,")
    alpha = decoded(base64.b64decode(encoded))[..., 3]
    assert (alpha == np.where(np.tril(np.ones((4, 4))), 255, 0)).all()
    halves = np.frombuffer(base64.b64decode(image.get("data-lower")), "<f2").astype(float)
    lower = causal(4, 4)[np.tril_indices(4)]
    np.testing.assert_allclose(float(image.get("data-scale")) * halves, lower, atol=1e-3)


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-3.2, 17), (1e-30, 3e-30), (-1e30, 2e38), (5, 5.01)]
)
@pytest.mark.parametrize("most", [2, 4, 7])
def test_ticks_are_round_inside_and_few(low, high, most):
    values = ticks(low, high, most)
    assert 1 <= len(values) <= most
    margin = 1e-6 * (high - low)
    assert all(low - margin <= value <= high + margin for value in values)
    steps = np.diff(values)
    assert np.allclose(steps, steps[:1])
    for step in steps[:1]:
        assert float(f"{step:.3e}".split("e")[0]) in (1, 2, 5)


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (1, 1000, [1, 10, 100, 1000]),
        (0.9, 7, [1, 2, 5]),
        (1e-3, 1e12, [1e-3, 1, 1e3, 1e6, 1e9, 1e12]),
        (3, 4, [3, 4]),
    ],
)
def test_logarithmic_ticks(low, high, expected):
    np.testing.assert_allclose(log_ticks(low, high, 6), expected)


def test_scales_map_their_ends_and_refuse_an_empty_range():
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(-1e38, 1e38, 10, 0)(0) == pytest.approx(5)
    assert Scale(0, 1, 0, 10, power=0.5)(0.25) == pytest.approx(5)
    assert Scale(0, 1, 0, 10)(7) == 10
    with pytest.raises(ValueError, match="expected low < high"):
        Scale(1, 1, 0, 10)
    assert labels_fit([0, 100], ["a", "b"]) and not labels_fit([0, 10], ["long", "longer"])


def test_numbers_in_few_characters():
    shown = [quantity(x) for x in (0, 0.5, -1234.4, 6_738_415_616, 1.25e-7, 3e20, 999.9)]
    assert shown == ["0", "0.5", "−1,234", "6.74B", "1.25e−7", "3e20", "1,000"]
    assert [bytes_label(x) for x in (12, 3072, 999_999)] == ["12 B", "3.07 kB", "1 MB"]
    assert [seconds_label(x) for x in (2, 0.0031, 4e-5, 0)] == ["2 s", "3.1 ms", "40 µs", "0 s"]
    assert [percent(x) for x in (0, 0.1234, 12.34)] == ["0%", "12.3%", "1,234%"]


ONES = np.ones((2, 2))
BAD = {
    "rows": lambda x: embedding_rows(["a", "b"], x),
    "before": lambda x: norm_sizes(x, ONES),
    "x": lambda x: norm_kinds(x[0], ONES[0], ONES[0]),
    "q": lambda x: qkv_heads(x, ONES, ONES),
    "theta": lambda x: rope_frequencies(x[0]),
    "scores": rope_distance,
    "weights": lambda x: attention_map(x, ["a", "b"], 0, 0),
    "shares": first_token_share,
    "without": lambda x: cost_growth([1, 2], [1, 2], x[0], "FLOPs"),
    "gate": lambda x: gate_rows(["a", "b"], x),
    "norms": lambda x: residual_norms(x, ["a", "b"]),
    "feed_forward": lambda x: block_shares(ONES[0], x[0]),
    "entropy": lambda x: logit_lens([["a", "b"]] * 2, ONES, x, ["a", "b"]),
    "probabilities": lambda x: cumulative_choice(["a", "b"], x[0] / 2, 0.5, 0),
    "seconds": lambda x: time_by_operation(["a", "b"], x[0]),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", BAD)
def test_what_is_not_finite_is_refused_by_name(name, value):
    BAD[name](ONES)
    with pytest.raises(
        ValueError, match=rf"^{name} has 1 elements of \d+ that are NaN or infinite"
    ):
        BAD[name](np.array([[value, 1], [1, 1]]))


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: embedding_rows(["a"], ONES), "pieces has 1 entries: expected 2"),
        (lambda: embedding_rows([], np.ones((0, 4))), "none of length 0"),
        (lambda: pieces_strip("", [], []), "expected at least 1"),
        (lambda: heads_diagram(6, 4), "6 query heads and 4 key-value heads"),
        (lambda: cost_growth([1, 2], [0, 1], [1, 2], "FLOPs"), "must be positive"),
        (lambda: rope_distance(np.ones((2, 3))), "expected a square"),
        (lambda: rope_clock([1.0], 1, [[1, 0]]), "pair 1: expected 0 to 0"),
        (lambda: cumulative_choice(["a"], [1.0], 1.5, 0), "the uniform is 1.5"),
        (lambda: cumulative_choice(["a"], [1.0], 0.5, 1), "chosen is 1"),
        (lambda: sampling_stages(["a"], [("softmax", [2.0])]), "softmax has elements"),
        (lambda: parameters_by_part([("7B", {"head": 1}), ("8B", {"norms": 1})]), "8B"),
        (lambda: cache_bytes([("7B", {"grouped": 0}, "grouped")]), "expected a positive"),
    ],
)
def test_wrong_input_is_refused_in_one_line(draw, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        draw()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("h, k, titles", [(6, 2, 3), (6, 6, 2), (6, 1, 2), (1, 1, 1)])
def test_the_diagram_of_heads_has_a_line_per_query_head(h, k, titles):
    tree = ET.fromstring(heads_diagram(h, k).svg)
    own = [label for label in labels(tree) if "this model" in label]
    assert len(own) == 1 and f"{k} key-value head" in own[0]
    lines = [path.get("d") for path in tree.iter(SVG + "path")]
    assert [line.count("M") for line in lines] == [h] * titles
    ends = [[end.split()[0] for end in line.split("L")[1:]] for line in lines]
    assert [len(set(of_line)) for of_line in ends] == sorted({h, k, 1}, reverse=True)
    for of_line in ends:  # neighbours share a head, the same number of them each
        assert of_line == [
            end for end in dict.fromkeys(of_line) for _ in range(h // len(set(of_line)))
        ]


def test_extrapolated_costs_are_hollow_and_dashed():
    known = np.array([True, True, False, False])
    figure = cost_growth([1, 2, 4, 8], [1, 1, 1, 1], [1, 2, 4, 8], "seconds", known, known)
    tree = ET.fromstring(figure.svg)
    assert sum("extrapolated" in tip for tip in tips(tree)) == 4
    assert len([p for p in tree.iter(SVG + "path") if p.get("stroke-dasharray")]) == 2
    marks = [m for m in tree.iter() if m.find(SVG + "title") is not None and m.get("fill")]
    hollow = [m.get("fill") == "var(--paper)" for m in marks]
    assert hollow == ["extrapolated" in m.find(SVG + "title").text for m in marks]
    assert "8 times as much" in figure.alt and "hollow: extrapolated" in labels(tree)
    sure = cost_growth([1, 2], [1, 1], [1, 2], "seconds")
    assert "extrapolated" not in sure.svg


def test_bars_of_sampling_are_as_long_as_their_probabilities():
    figure = sampling_stages(
        ["a", "b", "c"], [("softmax", [0.5, 0.25, 0.25]), ("top-k", [1, 0, 0])], 0.1, 0
    )
    tree = ET.fromstring(figure.svg)
    widths = [float(r.get("width")) for g in tree.iter(SVG + "g") for r in g.iter(SVG + "rect")]
    assert widths == pytest.approx(
        [widths[3] / 2, widths[3] / 4, widths[3] / 4, widths[3], 0, 0], abs=0.02
    )
    assert labels(tree).count("cut") == 2 and "50%" in labels(tree)
    assert "a was chosen" in figure.alt


def test_the_uniform_points_into_the_interval_of_the_chosen_token():
    figure = cumulative_choice(["a", "b", "c"], [0.2, 0.5, 0.3], 0.4, 1)
    assert "b has 0.2000 to 0.7000" in labels(ET.fromstring(figure.svg))
    chosen = re.search(
        r'<rect x="([\d.]+)" y="62" width="([\d.]+)"[^>]*stroke="var\(--2\)"', figure.svg
    )
    x, width = map(float, chosen.groups())
    assert (x, width) == (pytest.approx(10 + 0.2 * 440), pytest.approx(0.5 * 440))


def test_a_vocabulary_of_32000_is_merged():
    p = np.full(32000, 1 / 32000)
    figure = cumulative_choice([f"w{i}" for i in range(32000)], p, 0.5, 16000)
    assert len(figure.svg) < 10_000 and "32,000 tokens" in figure.alt


def test_shares_of_time_add_up():
    figure = time_by_operation([f"op{i}" for i in range(40)], np.ones(40))
    tree = ET.fromstring(figure.svg)
    assert "25 others" in labels(tree)
    shares = [float(re.search(r"([\d.]+)%", tip).group(1)) for tip in tips(tree)]
    assert len(shares) == 16 and sum(shares) == pytest.approx(100)


def test_parts_of_a_bar_are_as_wide_as_their_shares():
    tree = ET.fromstring(parameters_by_part([("m", {"embedding": 30, "head": 10})]).svg)
    assert tips(tree) == ["embedding: 30, 75%", "head: 10, 25%"]
    first, second = (
        float(next(group.iter(SVG + "rect")).get("width"))
        for group in tree.iter(SVG + "g")
        if group.find(SVG + "title") is not None
    )
    assert first == pytest.approx(3 * second, abs=0.05)


def test_the_lens_shows_its_window_with_probability_and_entropy():
    top = [[f"x{layer}{t}" for t in range(12)] for layer in range(3)]
    figure = logit_lens(top, np.full((3, 12), 0.5), np.full((3, 12), 1.5), ["p"] * 12)
    shown = labels(ET.fromstring(figure.svg))
    assert "x07" in shown and "x211" in shown and "x06" not in shown
    assert "The last 5 of 12" in figure.alt
    assert tips(ET.fromstring(figure.svg))[0] == "embedding, after p: x07 50%, entropy 1.5 bit"


def test_the_distance_names_the_largest_difference_along_a_diagonal():
    scores = np.subtract.outer(np.arange(4.0), np.arange(4.0))
    assert "differ by at most 0." in rope_distance(scores).alt
    scores[0, 0] = 0.5
    assert "differ by at most 0.5." in rope_distance(scores).alt


def test_the_hands_of_the_clock_stand_at_their_angles():
    tree = ET.fromstring(rope_clock([np.pi / 2], 0, [[3.0, 0.0], [0.0, 3.0]]).svg)
    ends = [(float(e.get("x2")), float(e.get("y2"))) for e in tree.iter(SVG + "line")][2:]
    (x0, y0), (x1, y1) = ends  # to the right, then up
    assert x0 > 340 and y0 == pytest.approx(176, abs=0.1)
    assert x1 == pytest.approx(230, abs=0.1) and y1 < 70
    assert tips(tree)[1] == "position 1: turned by 90°"


def test_the_dials_stand_at_the_position_of_the_rotary_table():
    frequencies, position = 10000.0 ** -(np.arange(16) / 16), 13
    table = Ops(Backend()).rope_table(position + 1, Rotation(frequencies, 1.0))
    tree = ET.fromstring(rope_dials(frequencies, position).svg)
    drawn = [e.get("transform") for e in tree.iter(SVG + "line") if e.get("class") == "hand"]
    degrees = [float(re.search(r"rotate\((\S+)", turn).group(1)) for turn in drawn]
    for got, cos, sin in zip(degrees, *(part[position] for part in table), strict=True):
        np.testing.assert_allclose(np.exp(-1j * np.radians(got)), cos + 1j * sin, atol=2e-3)


def test_more_heads_and_columns_than_fit_are_a_part_that_says_so():
    maps = attention_maps(causal(32, 32, 2, 2), ["a", "b"])
    tree = ET.fromstring(maps.svg)
    groups = [(g.get("data-layer"), g.get("data-head")) for g in tree.iter(SVG + "g")]
    assert len(groups) == 64 and groups[0] == ("0", "0") and groups[-1] == ("31", "31")
    assert "a part is drawn" in maps.alt
    wide = embedding_rows(["a"], np.ones((1, 4096)))
    assert "the first 512 of 4,096" in wide.svg and "Only the first 512" in wide.alt


def points(path):
    """(n, 2): the ends of the segments of a path's data."""
    return np.array(re.findall(r"[ML]?(-?[\d.]+) (-?[\d.]+)", path.get("d")), dtype=float)


def test_gates_lie_on_the_curve():
    x = np.linspace(-4, 4, 81)
    figure = gate_on_silu(x[::10], silu(x[::10]), x, silu(x), np.maximum(x, 0), "a")
    paths = list(ET.fromstring(figure.svg).iter(SVG + "path"))
    curve, gates = paths[-2], paths[-1]
    np.testing.assert_allclose(points(gates), points(curve)[::10], atol=0.02)
    assert "44.4% are negative" in figure.alt


def test_the_residual_stream_is_drawn_in_decades():
    figure = residual_norms([[1, 5], [10, 5], [100, 5]], ["a", "b"])
    first, last = list(ET.fromstring(figure.svg).iter(SVG + "path"))[-2:]
    heights = points(first)[:, 1]
    assert (
        heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
        and heights[0] > heights[1]
    )
    assert len(set(points(last)[:, 1])) == 1
    assert first.get("stroke-dasharray") and not last.get("stroke-dasharray")
    assert "grows from 3 to 52.5, the first token's ends at 100" in figure.alt


def test_the_norm_shows_each_token_before_and_after():
    figure = norm_sizes([[0.1, 0.1], [1.0, 10.0]], [[1.0, 1.0], [1.0, 1.0]])
    tree = ET.fromstring(figure.svg)
    assert tips(tree) == [
        "layer 0: before 0.1 to 0.1, after 1 to 1",
        "layer 1: before 1 to 10, after 1 to 1",
    ]
    layers = [g for g in tree.iter(SVG + "g") if g.find(SVG + "title") is not None]
    before, after = zip(
        *([starts(p)[:, 0] for p in g.iter(SVG + "path")] for g in layers), strict=True
    )
    decade = before[1][1] - before[1][0]
    assert before[1][0] - before[0][0] == pytest.approx(decade, abs=0.05)
    assert np.allclose(np.concatenate(after), before[1][0], atol=0.05)


def starts(path):
    """(n, 2): the points to which a path's data moves."""
    return np.array(re.findall(r"M([\d.]+) ([\d.]+)", path.get("d")), dtype=float)


def test_the_difference_shows_the_same_angle_at_the_same_distance():
    q, k = hands(0.6, 20, 1.0), hands(0.6, 20, 2.0) @ [[0.0, 1.0], [-1.0, 0.0]]
    tree = ET.fromstring(rope_difference(q, k, 0.6, [(5, 2), (15, 12), (5, 4)]).svg)
    ends = [[float(e.get(a)) for a in ("x1", "y1", "x2", "y2")] for e in tree.iter(SVG + "line")]
    angles = [np.arctan2(y1 - y2, x2 - x1) for x1, y1, x2, y2 in ends]  # k, q, k, q ...
    between = np.exp(1j * (np.array(angles[1::2]) - angles[0::2]))
    assert abs(between[0] - between[1]) < 1e-3 < abs(between[0] - between[2])
    assert between[0] == pytest.approx(np.exp(1j * (3 * 0.6 - np.pi / 2)), abs=1e-3)


def test_the_norms_differ_by_the_mean():
    x = np.array([1.0, 2.0, 3.0])
    figure = norm_kinds(x, x / 2, (x - 2) / 2)
    assert "mean is 2" in figure.alt and "differ by at most 1." in figure.alt
    drawn = list(ET.fromstring(figure.svg).iter(SVG + "path"))[-2:]  # triangles, then discs
    layer_norm, rms_norm = (starts(path)[:, 1] for path in drawn)
    assert (layer_norm > rms_norm + 20).all()  # the mean lower


def test_the_attention_of_the_last_token_is_described():
    weights = [[1, 0, 0], [0.75, 0.25, 0], [0.125, 0.5, 0.375]]
    alt = attention_map(np.array(weights), ["a", "b", "c"], 3, 1).alt
    assert "layer 3, head 1" in alt
    assert "gives 12.5% to the first token and 37.5% to itself" in alt
    assert "75%, from b to a" in alt
    shares = ET.fromstring(first_token_share([[0.2, 0.7]]).svg)
    assert {"20", "70"} <= set(labels(shares))
