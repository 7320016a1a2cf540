"""The page about a run in a real Chromium: what it draws, says and asks for."""

import importlib.util

import pytest

import npllama
from chromium import browser, find_chromium
from conftest import needed
from npllama.explore.__main__ import NEEDED
from npllama.explore.colours import LIGHT
from npllama.explore.record import record

WIDE, NARROW = 1280, 400
PROMPT = "Once upon a time there was a cat named Lily."

# Elements that reach beyond the window, but for those inside of a box that scrolls by itself.
_TOO_WIDE = """
[...document.querySelectorAll('main *, nav *')].filter((e) => {
  if (e.getBoundingClientRect().right <= innerWidth + 1) return false;
  for (let up = e; up !== document.body; up = up.parentElement)
    if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(up).overflowX)) return false;
  return true;
}).map((e) => e.outerHTML.slice(0, 120))
"""
# Of each section its id, whether it has a size, and its pictures and formulas that have none.
_SECTIONS = """
[...document.querySelectorAll('section')].map((s) => {
  const size = (e) => { const r = e.getBoundingClientRect(); return r.width > 20 && r.height > 8; };
  const shown = (e) => e.checkVisibility();
  return {
    id: s.id,
    visible: shown(s) && size(s) && size(s.querySelector('h2')),
    pictures: [...s.querySelectorAll('svg')].filter(shown).length,
    flat: [...s.querySelectorAll('svg, math')].filter((e) => shown(e) && !size(e)).length,
    formulas: [...s.querySelectorAll('math')].filter(size).length,
    code: size(s.querySelector('.code')),
  };
})
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    needed(f"{', '.join(missing)} cannot be imported: the extra [explore]" if missing else None)
    from npllama.explore.page import page

    run = record(npllama.load(), PROMPT, budget=0.1)
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(run), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    needed(None if find_chromium() else "there is no Chromium here (Debian's package: chromium)")
    with browser(find_chromium(), tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_every_section_is_drawn_and_nothing_leaves_the_page(window, file, width, scheme):
    check(window, file, width, scheme)


def check(window, file, width, scheme):
    window.open(file, width, scheme=scheme)
    assert window.complaints() == []
    asked = [url for url in window.requests() if not url.startswith("data:")]
    assert asked == [file.resolve().as_uri()]
    sections = window.evaluate(_SECTIONS)
    assert len(sections) == 12
    for section in sections:
        assert section["visible"] and section["code"], section
        assert section["pictures"] >= 1 and section["formulas"] >= 1 and section["flat"] == 0, (
            section
        )
    assert window.evaluate("document.documentElement.scrollWidth") == width
    assert window.evaluate(_TOO_WIDE) == []
    paper = window.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 380) == (scheme == "light")


def test_formulas_are_drawn_as_formulas(window, file):
    """A fraction is higher than a letter, and a root is as wide as what is under it."""
    window.open(file, WIDE)
    heights = "[...document.querySelectorAll('{}')].map((e) => e.getBoundingClientRect().height)"
    fractions = window.evaluate(heights.format("#norm mfrac"))
    letters = window.evaluate(heights.format("#norm math > mrow > mi"))
    assert fractions and letters and max(fractions) > 1.5 * max(letters)


def test_it_is_read_without_its_script(window, file):
    window.open(file, WIDE, script=False)
    assert window.complaints() == []
    assert window.evaluate("document.getElementById('tip') === null")  # so no script has run
    for section in window.evaluate(_SECTIONS):
        assert section["visible"] and section["pictures"] >= 1 and section["flat"] == 0, section
    assert window.evaluate("[...document.querySelectorAll('.control')].every((e) => e.hidden)")
    window.evaluate("document.getElementById('head-0').click()")  # this choice is CSS alone
    assert window.evaluate("document.querySelector('.choice').checkVisibility()")


def test_it_is_printed_whole_and_light(window, file):
    window.open(file, WIDE, scheme="dark")
    hidden = "[...document.querySelectorAll('.code')].filter((e) => !e.checkVisibility())"
    assert window.evaluate(f"{hidden}.length") > 5  # folded on a screen
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    window.call("Emulation.setEmulatedMedia", media="print", features=dark)
    assert window.evaluate(f"{hidden}.length") == 0
    assert not window.evaluate("document.querySelector('nav').checkVisibility()")
    colours = "getComputedStyle(document.querySelector('{}')).getPropertyValue('{}')"
    assert window.evaluate(colours.format("svg.nf", "--paper")) == LIGHT["paper"]
    assert window.evaluate(colours.format(":root", "--page")) == LIGHT["paper"]
    window.call("Emulation.setEmulatedMedia", media="", features=[])


FAULTS = {
    "a request": ("</footer>", '<img src="http://localhost:9/x.png" alt=""></footer>'),
    "a request of the style": ("</style>", "body{background:url(http://localhost:9/x)}</style>"),
    "an error": ('"use strict";', '"use strict"; nothing();'),
    "too wide": ("</footer>", '<div style="width:2000px;height:3px"></div></footer>'),
    "hidden": ('<section id="lens"', '<section hidden id="lens"'),
    "no formula": ("<math", "<maths"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_page_with_a_fault_does_not_pass(window, file, tmp_path, fault):
    text, (right, wrong) = file.read_text(encoding="utf-8"), FAULTS[fault]
    assert right in text
    faulty = tmp_path / "page.html"
    faulty.write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(AssertionError):
        check(window, faulty, NARROW, "light")


def test_sliders_and_hover_show_numbers(window, file):
    window.open(file, WIDE)
    turn = """(() => {{
      const slider = document.querySelector('{0} input[type=range]');
      slider.value = '{1}';
      slider.dispatchEvent(new Event('input'));
      return document.querySelector('{0} output').textContent;
    }})()"""
    assert window.evaluate(turn.format("#rope", 7)) == "position 7"
    hand = "document.querySelector('#rope .hand').getAttribute('transform')"
    degrees = float(window.evaluate(hand).split("(")[1].split()[0])
    assert abs(degrees + 7 * 180 / 3.14159265) < 1e-3
    assert window.evaluate(turn.format("#sampling", 2)) == "temperature 2.00"
    spans = "[...document.querySelectorAll('#sampling .bars span')]"
    shares = window.evaluate(spans + ".map((e) => parseFloat(e.textContent))")
    assert len(shares) == 10 and shares == sorted(shares, reverse=True) and sum(shares) < 100
    trace = npllama.load().trace(npllama.load().encode(PROMPT))
    said = pointed_at(window, "#embedding image[data-values]", 0, 0)
    assert said.startswith("<s>, 0: ") and number_in(said) == near(trace.hidden[0, 0, 0])
    window.evaluate("document.getElementById('head-7').click()")  # layer 1, head 1
    said = pointed_at(window, ".choices input:checked + label + .choice image[data-lower]", 5, 2)
    assert number_in(said) == near(trace.attention[1, 1, 5, 2])
    assert pointed_at(window, ".choices :checked + label + .choice image[data-lower]", 2, 5) is None


def near(value):
    return pytest.approx(float(value), rel=3e-3, abs=1e-4)


def number_in(said):
    return float(said.rsplit(" ", 1)[1])


def pointed_at(window, selector, row, column):
    """What the page says of an element of a map; None where it says nothing."""
    x, y = window.evaluate(
        f"""(() => {{
          const image = document.querySelector({selector!r});
          image.scrollIntoView({{block: 'center', behavior: 'instant'}});
          const r = image.getBoundingClientRect();
          const [rows, columns] = image.dataset.shape.split(' ');
          return [r.left + (({column} + 0.5) * r.width) / columns,
                  r.top + (({row} + 0.5) * r.height) / rows];
        }})()"""
    )
    window.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tip = "document.getElementById('tip')"
    return window.evaluate(f"{tip}.hidden ? null : {tip}.textContent")


def test_one_head_at_a_time_is_large(window, file):
    window.open(file, WIDE)
    shown = "[...document.querySelectorAll('.choice')].filter((e) => e.checkVisibility()).length"
    assert window.evaluate(shown) == 1
    window.evaluate("document.getElementById('head-0').click()")
    assert window.evaluate(shown) == 1
    assert window.evaluate("document.querySelector('.choice').checkVisibility()")
