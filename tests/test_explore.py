"""The page about a run: its elements are the model's, and it holds for any model and prompt."""

import ast
import base64
import html.parser
import importlib.util
import inspect
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest

import npllama
from conftest import FIXTURES, ROOT, TINY, make_llama, make_ops, needed
from model_directory import write_model
from npllama.errors import NpllamaError
from npllama.explore.__main__ import NEEDED, main
from npllama.explore.labels import bytes_label, quantity
from npllama.explore.record import MAX_WINDOW, record
from npllama.ops import Ops
from npllama.rope_scaling import RopeScaling
from npllama.sampling_options import Sampling
from npllama.uniforms import uniforms

FIXTURE_NAMES = ["gqa", "head-dim", "mha", "mqa", "tied"]
IDS = [1, 7, 3, 3, 19, 5, 2, 11]


@pytest.fixture(scope="module")
def shipped():
    return npllama.load()


@pytest.fixture(scope="module")
def shipped_run(shipped):
    return record(shipped, "Once upon a time there was a cat named Lily.", budget=0.05)


@pytest.fixture(scope="module")
def pages():
    """The module that makes pages, where its packages are installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    needed(f"{', '.join(missing)} cannot be imported: the extra [explore]" if missing else None)
    from npllama.explore import page

    return page


def load(name):
    return npllama.load(FIXTURES / "hf" / name, backend="numpy", dtype="float32")


def assert_close(got, expected):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * max(1.0, np.abs(expected).max())


# -- the elements


@pytest.mark.parametrize("name", FIXTURE_NAMES)
@pytest.mark.parametrize("window", [len(IDS), 3])
def test_what_the_reference_records_is_what_the_overrides_compute(name, window):
    llama = load(name)
    run = record(llama, IDS, window=window, max_new_tokens=3, budget=0)
    trace, start = llama.trace(IDS), len(IDS) - window
    assert run.start == start
    assert_close(run.hidden, trace.hidden[:, start:])
    assert_close(run.stacked("attention"), trace.attention[:, :, start:, start:])
    rows = trace.attention[:, :, max(start, 1) :]
    assert_close(run.stacked("to_first"), rows[:, :, :, 0].mean(axis=2))
    assert_close(
        run.stacked("to_earlier"), trace.attention[:, :, start:, :start].sum(3).mean(axis=2)
    )
    logits = llama.logits(IDS)[start:]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert_close(run.lens.probability[-1], -np.sort(-p, axis=1)[:, : run.lens.ids.shape[-1]])
    entropy = -(p * np.log2(np.maximum(p, 1e-30))).sum(axis=1)
    assert_close(run.lens.entropy[-1], entropy)


@pytest.mark.array_calls
def test_every_backend_records_the_same(ops):
    options = {"budget": 0, "max_new_tokens": 3, "sampling": Sampling(top_k=20, min_p=0.01)}
    run = record(make_llama(ops), IDS, **options)
    expected = record(make_llama(make_ops("numpy")), IDS, **options)
    assert_close(run.hidden, expected.hidden)
    assert_close(run.stacked("attention"), expected.stacked("attention"))
    assert_close(run.lens.entropy, expected.lens.entropy)
    assert_close(run.rotations.scores, expected.rotations.scores)
    assert (run.choice.id, run.new_ids) == (expected.choice.id, expected.new_ids)
    assert run.choice.id == run.new_ids[run.choice.step]


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_each_recorded_equation_is_what_its_override_computes(name):
    llama = load(name)
    run = record(llama, IDS, max_new_tokens=1, budget=0)
    ops, weights, first = llama.ops, llama.parameters.layers[0], run.layers[0]
    assert type(ops).rms_norm is not Ops.rms_norm and type(ops).rope is not Ops.rope
    normed = ops.rms_norm(run.embedded[None], weights.attention_norm, weights.norm_eps)
    assert_close(first.normed, normed[0])
    cos, sin = (part[None] for part in ops.rope_table(len(IDS), llama.rotation))  # (1, T, C/2)
    for plain, turned in ((first.q_plain, first.q), (first.k_plain, first.k)):
        x = plain.swapaxes(0, 1)[None].copy()  # (heads, T, C) -> (1, T, heads, C)
        assert_close(turned, ops.rope(x, cos, sin)[0].swapaxes(0, 1))
    for at_positions, plain in ((run.rotations.q, first.q_plain), (run.rotations.k, first.k_plain)):
        assert_close(at_positions[: len(IDS)], _turned(ops, plain[0, -1], cos, sin))
    assert_close(first.attention, ops.attention_weights(first.q, first.k))
    h = ops.rms_norm(first.after_attention[None], weights.ffn_norm, weights.norm_eps)
    gate, up = ops.linear(h, weights.w_gate), ops.linear(h, weights.w_up)
    assert_close(first.gate, gate[0])
    assert_close(first.opened, ops.swiglu(gate.copy(), np.ones_like(gate))[0])
    assert_close(first.gated, ops.swiglu(gate.copy(), up)[0])
    x, silu = first.silu_curve
    assert_close(silu, ops.swiglu(x.copy(), np.ones_like(x)))


def _turned(ops, query, cos, sin):
    """(T, C): one query at the T positions of the table."""
    same = np.tile(query, (1, cos.shape[1], 1, 1))  # (1, T, 1, C)
    return ops.rope(same, cos, sin)[0, :, 0]


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_layers_hold_what_the_equations_pass_on(name):
    """Against the definitions, written out for the last token."""
    run = record(load(name), IDS, max_new_tokens=1, budget=0)
    c, first = run.config, run.layers[0]
    groups = c.n_heads // c.n_kv_heads
    for head in range(c.n_heads):
        q, k = first.q[head, -1], first.k[head // groups]
        scores = np.array([q @ key for key in k]) / np.sqrt(c.head_dim)
        share = np.exp(scores - scores.max())
        assert_close(first.attention[head, -1], share / share.sum())
    length = np.linalg.norm(first.q_plain, axis=-1)
    assert_close(np.linalg.norm(first.q, axis=-1), length)  # RoPE turns, and changes no length
    assert_close(first.q[:, 0], first.q_plain[:, 0])  # position 0 is turned by nothing
    assert first.gated.shape == first.gate.shape == (len(IDS), c.ffn_dim)
    centred = run.embedded - run.embedded.mean(axis=1, keepdims=True)
    deviation = np.sqrt(run.embedded.var(axis=1, keepdims=True) + c.norm_eps)
    weight = load(name).parameters.layers[0].attention_norm
    assert_close(run.layer_normed, centred / deviation * weight)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 7, "top_p": 1.0, "min_p": 0.02},
        {"repetition_penalty": 1.4, "temperature": 1.0},
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_the_chosen_token_is_the_one_that_generate_chooses(shipped, changes, seed):
    sampling = Sampling(**changes)
    run = record(shipped, "Once upon a time", seed=seed, sampling=sampling, budget=0)
    ids = shipped.generate("Once upon a time", seed=seed, sampling=sampling, max_new_tokens=24).ids
    choice = run.choice
    assert list(run.new_ids) == ids
    assert choice.id == ids[choice.step]
    assert list(choice.before) == shipped.encode("Once upon a time") + ids[: choice.step]
    methods = [stage.method for stage in choice.stages]
    expected = [method for method, _ in sampling.filters()] if sampling.temperature else []
    assert [m for m in methods if m.startswith("keep")] == expected
    assert all(abs(stage.probability.sum() - 1) < 1e-5 for stage in choice.stages + choice.alone)
    if sampling.temperature == 0:
        assert choice.uniform is None
        return
    assert choice.uniform == uniforms(seed, [0], [choice.step])[0, 0]
    cumulative = np.cumsum(choice.stages[-1].probability, dtype="float64")
    assert np.flatnonzero(cumulative > choice.uniform)[0] == choice.id


def test_the_choice_that_is_shown_is_the_least_certain_one(shipped):
    run = record(shipped, "Once upon a time", budget=0, sampling=Sampling(temperature=1.0))
    ids = [*run.ids, *run.new_ids]
    logits = shipped.logits(ids)[len(run.ids) - 1 : -1].astype("float64")
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert run.choice.step == (-(p * np.log(p)).sum(axis=1)).argmax()


def test_a_record_is_short_in_a_notebook(shipped_run):
    assert repr(shipped_run).startswith("<Record of ") and len(repr(shipped_run)) < 100


def test_scores_of_the_same_distance_are_equal_and_others_are_not(shipped_run):
    r = shipped_run.rotations
    assert r.spread < 1e-5
    assert np.ptp(r.scores) > 0.1
    for d in range(-5, 6):
        assert np.allclose(r.scores.diagonal(d), r.scores.diagonal(d)[0], atol=1e-5)


def test_a_scaled_rope_is_shown_beside_the_plain_one(pages):
    scaling = RopeScaling("linear", 4.0)
    llama = make_llama(make_ops("numpy"), replace(TINY, rope_scaling=scaling))
    run = record(llama, "ab", budget=0)
    assert np.allclose(run.rotations.plain, 4 * run.rotations.frequencies)
    assert "linear, factor 4): slow pairs turn slower" in pages.rope.section(run).see[-1]


def test_a_scaling_that_changes_nothing_yet_says_so(pages):
    scaling = RopeScaling("dynamic", 2.0)
    run = record(make_llama(make_ops("numpy"), replace(TINY, rope_scaling=scaling)), "ab", budget=0)
    assert np.allclose(run.rotations.plain, run.rotations.frequencies)
    assert "dynamic, factor 2): it changes no frequency" in pages.rope.section(run).see[-1]


def test_costs_beyond_the_budget_are_extrapolated_and_marked(shipped):
    growth = record(shipped, "a", budget=0, max_new_tokens=1).growth
    assert growth.n[-1] == shipped.context
    for seconds, measured, cost in (
        (growth.seconds_with, growth.measured_with, growth.bytes_with),
        (growth.seconds_without, growth.measured_without, growth.flops_without),
    ):
        assert measured.tolist() == [True] + [False] * (len(growth.n) - 1)
        assert np.allclose(seconds / cost, seconds[0] / cost[0])
    assert (growth.flops_without > growth.flops_with).all()
    cache = 2 * 6 * 2 * 32 * 4 * growth.n  # k and v, L, K, C, bytes of float32
    assert np.array_equal(growth.bytes_with - growth.bytes_without, cache)


def test_the_time_of_a_run_is_divided_among_its_operations(shipped_run):
    times = shipped_run.times
    assert np.isclose(times.seconds.sum(), times.total)
    assert (np.diff(times.seconds) <= 0).all()
    assert {"rms_norm", "rope", "next_token"} <= {*times.names}
    assert times.n_new == len(shipped_run.new_ids)


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"window": MAX_WINDOW + 1}, {"budget": -1}, {"budget": 6}]
)
def test_numbers_out_of_range_are_refused(shipped, wrong):
    with pytest.raises(NpllamaError, match="expected"):
        record(shipped, "a", **wrong)


# -- the page


class Outline(html.parser.HTMLParser):
    """What a page consists of: tags that fit together, ids, addresses, text."""

    VOID = ("meta", "br", "input", "link", "img", "hr")
    NO_PROSE = ("pre", "style", "script")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.text = [], [], [], []
        self.count = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes, closed=False):
        self.count[tag] = self.count.get(tag, 0) + 1
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset"):
                self.addresses.append(value)
        if not closed and tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {*self.NO_PROSE} & {*self.open}:
            self.text.append(data)


def outlined(pages, run):
    """The page of a run, checked for what holds for every page."""
    text = pages.page(run)
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in outline.addresses)
    assert {a[1:] for a in outline.addresses if a[0] == "#"} <= {*outline.ids}
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|WebSocket", text)
    assert outline.count["section"] == 12
    assert outline.count["math"] >= 12
    pictures = text.count('<svg xmlns="http://www.w3.org/2000/svg"')
    assert pictures >= 20
    assert text.count("<desc>") == text.count('role="img"') == pictures
    assert not re.search(r"\bnan\b|\binf\b|\bNone\b|Markup", " ".join(outline.text))
    return text, outline


def test_the_page_of_the_shipped_model_is_whole(pages, shipped_run):
    text, outline = outlined(pages, shipped_run)
    assert len(text.encode()) < 1_500_000
    shown = "".join(outline.text)
    assert "Once upon a time there was a cat named Lily." in shown
    assert shipped_run.new_text in shown


@pytest.mark.parametrize("name", FIXTURE_NAMES)
def test_a_model_without_a_tokenizer_says_what_is_missing(pages, name):
    text, _ = outlined(pages, record(load(name), IDS, max_new_tokens=2, budget=0))
    assert "The model has no tokenizer" in text


def test_a_prompt_of_one_token(pages, shipped):
    text, _ = outlined(pages, record(shipped, "", budget=0))
    assert "which can read nothing but itself" in text


def test_a_long_prompt_shows_a_window_and_says_so(pages, shipped):
    words = "An extraordinary misunderstanding of Lily's quixotic zebra <b> 🦙. "
    run = record(shipped, words * 9, budget=0, max_new_tokens=1, window=MAX_WINDOW)
    text, _ = outlined(pages, run)
    assert "The pictures show the last 48" in text
    assert len(text.encode()) < 1_500_000
    assert run.window_text.endswith("zebra <b> 🦙. ") and len(run.window_text) < 200
    assert run.piece(run.config.bos_id) == "<s>"


def test_each_token_that_the_page_names_has_its_piece(pages, shipped):
    """With a window of one token, the text before the choice lies outside of the window."""
    run = record(shipped, "Once upon a time there was", budget=0, window=1, max_new_tokens=2)
    assert run.choice.step == 1
    text, _ = outlined(pages, run)
    assert not re.search(r">#\d", text)
    assert run.piece(shipped.config.vocab_size) == f"#{shipped.config.vocab_size}"


def test_a_prompt_that_fills_the_context(pages):
    llama = make_llama(make_ops("numpy"), replace(TINY, context_length=5))
    run = record(llama, [1, 4, 5, 6, 7], budget=0)
    assert run.new_ids == ()
    text, _ = outlined(pages, run)
    assert "fills the context of 5 tokens" in text


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"top_k": 3, "min_p": 0.1, "top_p": 1.0}])
def test_every_way_of_sampling_has_its_page(pages, shipped, changes):
    run = record(shipped, "a", budget=0, sampling=Sampling(**changes), max_new_tokens=2)
    text, _ = outlined(pages, run)
    is_greedy = changes.get("temperature") == 0
    assert ("No random number is drawn" in text) == is_greedy
    assert ("The uniform of seed 0" in text) != is_greedy
    if is_greedy:  # the distribution before the choice of the likeliest, and after it
        first, last = run.choice.stages[0].probability, run.choice.stages[-1].probability
        assert first.max() < 0.99 and last.max() == last[run.choice.id] == 1


def test_the_slider_of_a_penalized_run_starts_at_its_probabilities(pages, shipped):
    changes = {"repetition_penalty": 1.5, "temperature": 1.0, "top_p": 1.0}
    options = {"sampling": Sampling(**changes), "max_new_tokens": 1, "budget": 0}
    run = record(shipped, "Tom had a ball. He liked the ball. He liked the", **options)
    section = pages.sampling.section(run)
    encoded = re.search(r'data-logits="(.*?)"', section.parts[0].extra).group(1)
    logits = np.frombuffer(base64.b64decode(encoded), "<i2") / 512
    p = np.exp(logits) / np.exp(logits).sum()
    assert np.abs(p - run.choice.stages[-1].probability).max() < 0.001
    assert np.abs(p - run.choice.stages[0].probability).max() > 0.02
    assert "repetition penalty</strong> of 1.5" in section.idea[-1]
    assert Ops.penalize_repetition in [function.function for function in section.functions]


def test_a_divided_word_is_named(pages):
    from npllama.explore.sections.text import divided_word

    assert divided_word(["<s>", "▁He", "▁li", "ked", "▁to", "."]) == ["▁li", "ked"]
    assert divided_word(["▁a", ".", "b", "▁x"]) == []
    assert divided_word(["▁ru", "n"]) == ["▁ru", "n"]


def test_operations_have_the_roles_of_their_matrices(pages, shipped):
    from npllama.explore.sections.family import operation

    c = shipped.config
    names = ("linear 320 x 192", "linear 1024 x 192", "linear 192 x 512", "rope", "linear 9 x 9")
    shown = ["linear q+k+v", "linear gate+up or head", "linear down", "rope", "linear 9 x 9"]
    assert [operation(name, c) for name in names] == shown


def test_numbers_that_occur_twice_agree(pages, shipped_run):
    """The costs of this model in the table of the family are those of the section on the cache."""
    own = {row[0]: row[1] for row in pages.family.section(shipped_run).parts[0].rows}
    growth, c = shipped_run.growth, shipped_run.config
    assert own["bytes read per token"] == bytes_label(growth.bytes_with[-1])
    assert own["FLOPs per token"] == quantity(growth.flops_with[-1])
    in_layers = c.n_layers * (
        2 * c.dim * (c.n_heads + c.n_kv_heads) * c.head_dim + 3 * c.dim * c.ffn_dim
    )
    n, width = growth.n, c.n_layers * c.n_heads * c.head_dim
    head = 2 * c.vocab_size * c.dim
    assert np.array_equal(growth.flops_with, 2 * in_layers + head + 4 * width * n)
    assert np.array_equal(growth.flops_without, 2 * in_layers * n + head + 2 * width * n * (n + 1))


def test_the_uniform_lies_in_the_interval_of_the_chosen_token(pages, shipped):
    from npllama.explore.sections.sampling import intervals

    for changes in ({}, {"top_p": 1.0, "temperature": 1.5}, {"top_k": 2}):
        for seed in range(2):
            options = {"seed": seed, "sampling": Sampling(**changes), "max_new_tokens": 4}
            run = record(shipped, "The", budget=0, **options)
            labels, shares, place = intervals(run)
            ends = np.cumsum(shares)
            assert labels[place] == run.piece(run.choice.id)
            assert ends[place] - shares[place] <= run.choice.uniform < ends[place]
            assert abs(ends[-1] - 1) < 1e-9 and len(labels) <= 23


def test_the_example_for_a_notebook_runs(pages):
    text = (ROOT / "npllama" / "explore" / "README.md").read_text(encoding="utf-8")
    example = inspect.cleandoc("\n" + re.search("```python\n(.*?)```", text, re.S).group(1))
    assert eval_last(example)._repr_svg_().startswith("<svg")


def eval_last(code):
    """The value of the last line of a script, as a notebook shows it."""
    *before, last = ast.parse(code).body
    names = {}
    exec(compile(ast.Module(before, []), "README", "exec"), names)
    return eval(compile(ast.Expression(last.value), "README", "eval"), names)


@pytest.mark.parametrize("name, kinds", [("mha", 3), ("gqa", 3), ("mqa", 3)])
def test_all_three_kinds_of_attention_are_drawn_for_any_model(pages, name, kinds):
    run = record(load(name), IDS, max_new_tokens=1, budget=0)
    heads = pages.heads.section(run)
    drawn = heads.parts[0].figure.svg
    assert sum(f"{kind}: " in drawn for kind in ("multi-head", "grouped", "multi-query")) == kinds
    assert drawn.count("this model") >= 1


def test_any_text_is_escaped(pages):
    evil = "</script><script>alert(1)</script>\x01\x1b\u202e\"'<b>&amp; {{7*7}} ]]> </svg>é🦙"
    llama = make_llama(make_ops("numpy"), replace(TINY, context_length=100))
    run = record(llama, evil, budget=0, window=MAX_WINDOW)
    run = replace(run, model="<script>alert(2)</script>")
    text, outline = outlined(pages, run)
    assert outline.count["script"] == 1
    assert "alert(1)</script>" not in text and "alert(2)</script>" not in text
    assert "49" not in re.search(r'<span class="prompt">(.*?)</span>', text, re.S).group(1)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text.replace("\r", ""))


def functions(pages, run):
    return [function for section in pages.SECTIONS for function in section(run).functions]


def test_each_function_is_shown_as_it_stands_with_its_source_and_tests(pages, shipped_run):
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    table = (ROOT / "npllama" / "ops" / "README.md").read_text(encoding="utf-8")
    shown = html.unescape(re.sub(r"<[^>]*>", "", pages.page(shipped_run)))
    for function in functions(pages, shipped_run):
        assert function.reference and function.tests
        assert all(f"def {test}(" in tests for test in function.tests), function.name
        name = function.function.__name__
        assert f"def {name}(" in function.code
        assert inspect.cleandoc("\n" + inspect.getsource(function.function)) in shown
        row = re.search(rf"^.*`Ops\.{name}`.*$", table, re.M)
        if row is not None:
            assert any(f"`{test}`" in row.group() for test in function.tests), name
        path, line = function.place.split(":")
        assert f"def {name}(" in "\n".join(
            (ROOT / path).read_text().splitlines()[int(line) - 1 : int(line) + 3]
        )


@pytest.mark.parametrize("folder", ["sections", "figures"])
def test_drawing_computes_nothing_that_the_model_computes(folder):
    """Sections name functions of Ops, and neither they nor the figures call or repeat one."""
    for path in (ROOT / "npllama" / "explore" / folder).glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        called = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert not [
            name for name in called if re.match(r"Ops\b|ops\.|(np|math)\.(exp|cos|sin)$", name)
        ]


def test_no_number_belongs_to_one_prompt_or_model(pages):
    """Sentences with numbers are made from the run: another model has others."""
    first = record(make_llama(make_ops("numpy")), "ab", budget=0)
    other = make_llama(make_ops("numpy"), replace(TINY, n_heads=4, n_kv_heads=1, head_dim=12))
    second = record(other, "ab", budget=0)
    for section in pages.SECTIONS:
        assert section(first).see != section(second).see or section(first).slug in (
            "text",
            "embedding",
        )


# -- the command


def call(capsys, *words):
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_writes_the_page_and_says_how_to_make_it_again(pages, tmp_path, capsys):
    out = tmp_path / "page.html"
    out.write_text("old")
    words = ["--prompt", "It's <b>", "--out", str(out), "--measure", "0", "--max-new-tokens", "2"]
    code, said, error = call(capsys, *words)
    assert (code, said, error.count("\n")) == (0, "", 1)
    assert str(out) in error
    text = out.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.rstrip().endswith("</html>")
    shown = html.unescape(text)
    assert """python -m npllama.explore --prompt 'It'"'"'s <b>'""" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    "words, what",
    [
        (["--prompt", "a", "--out", "."], "is a directory"),
        (["--prompt", "a", "--out", ""], "--out is empty"),
        (["--prompt", "a", "--out", "/dev/null"], "not a regular file"),
        (["--prompt", "a", "--out", "nowhere/page.html"], "is not a directory"),
        (["--prompt", "a", "--out", "p.html", "--model", ""], "--model is empty"),
        (["--prompt", "a", "--out", "p.html", "--model", "/nowhere"], "does not exist"),
        (["--prompt", "a", "--out", "p.html", "--measure", "9"], "expected 0 to 5 seconds"),
        (["--prompt", "a", "--out", "p.html", "--window", "0"], "expected 1 to"),
        (["--prompt", "a", "--out", "p.html", "--top-p", "7"], "top_p is 7"),
        (["--prompt", "a", "--out", "p.html", "--seed", "-1"], "seed is -1"),
        (["--prompt", "a" * 9999, "--out", "p.html"], "do not fit the context"),
        (["--ids", "1,5000", "--out", "p.html"], "outside the vocabulary"),
        (["--ids", "one", "--out", "p.html"], "not a list of token ids"),
        (["--ids", "", "--out", "p.html"], "there are no token ids"),
        (["--out", "p.html"], "required"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    pages, tmp_path, capsys, monkeypatch, words, what
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *words)
    assert (code, out) == (2, "")
    assert what in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_text_for_a_model_without_a_tokenizer_is_refused(pages, tmp_path, capsys):
    model = write_model(tmp_path / "model", TINY, tokenizer=False)
    out = tmp_path / "page.html"
    code, _, err = call(capsys, "--model", str(model), "--prompt", "a", "--out", str(out))
    assert code == 2 and "--ids" in err and not out.exists()


def test_a_path_that_cannot_be_written_is_refused_before_the_work(capsys, monkeypatch):
    monkeypatch.setattr("npllama.explore.__main__.load_model", None)  # a call would raise TypeError
    code, _, err = call(capsys, "--prompt", "a", "--out", "a" * 300)
    assert code == 2 and "File name too long" in err and err.count("\n") == 1


def test_what_is_missing_is_named_with_the_extra_that_brings_it(tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pygments" else found(name)
    )
    code, _, err = call(capsys, "--prompt", "a", "--out", str(tmp_path / "page.html"))
    assert code == 2 and "pygments" in err and "npllama[explore]" in err
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_the_old_one(pages, tmp_path, capsys, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    words = ["--prompt", "a", "--out", str(out), "--measure", "0", "--max-new-tokens", "1"]
    code, _, err = call(capsys, *words)
    assert code == 2 and "No space left" in err and err.count("\n") == 1
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_same_command_makes_the_same_page_but_for_times(pages, shipped):
    def made():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run = record(shipped, "Once upon", budget=0, max_new_tokens=4)
        return run

    first, second = made(), made()
    second = replace(second, growth=first.growth, times=first.times)
    assert pages.page(first) == pages.page(second)
