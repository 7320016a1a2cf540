"""tools/benchmark.py: its results follow from the measured times and agree with each other."""

import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import benchmark
from benchmarking import measure, rivals
from benchmarking.figures import Program, Spread
from benchmarking.machine import n_threads
from benchmarking.measure import Sample, generate, make_task, open_model, roofline_run, side_by_side
from benchmarking.peak_memory import PeakMemory
from benchmarking.rivals import Command, Transformers, printed_speed
from benchmarking.roofline import Roofline, roofline_nbytes, roofline_of
from benchmarking.shapes import SHAPES, prompt_lengths, random_llama
from benchmarking.step_profile import OUTSIDE, profile
from benchmarking.table import COLUMNS
from conftest import ROOT, TINY, make_llama, make_ops
from model_directory import write_model
from npllama.backend import Backend
from npllama.errors import InputError, NpllamaError
from npllama.op_times import watched
from npllama.operating_system import resident_bytes
from npllama.ops import Ops
from npllama.threads import Threads

GB = 10**9


@pytest.fixture
def llama():
    """A tiny model on the reference, which has no fused operations."""
    return make_llama(Ops(Backend()))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Shorten the pauses, which only make measured speeds more accurate."""
    monkeypatch.setattr(measure, "PAUSE", 1e-6)


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock: each call returns one second more than the last."""
    now = iter(range(10**9))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("benchmark") / "model", TINY)


def report(*arguments):
    options = benchmark._parser().parse_args([str(a) for a in arguments])
    return benchmark.benchmark(options)


# -- results -----------------------------------------------------------------------------------


def test_tokens_a_second_are_tokens_over_the_librarys_own_time(llama, clock):
    """With this clock, prefill takes one second, and so does each decode step."""
    task = make_task([7, 6, 5], 9, 260)
    assert generate(llama, task) == Sample(prefill=18.0, decode=3.0, first_token=1.0)


def test_decode_goes_on_past_any_end_of_text():
    llama = make_llama(Ops(Backend()), replace(TINY, eos_ids=tuple(range(260))))
    counts = []
    compute = llama.compute
    llama.compute = lambda *args: counts.append(args[0].shape) or compute(*args)
    generate(llama, make_task([4, 3], 6, 260))
    assert counts == [(1, 4), (1, 3)] + 5 * [(2, 1)]


def test_all_figures_follow_from_the_times(directory, clock):
    """With this clock, prefill and decode steps take one second each, and a pass over the weights
    two: one for the layers and one for the head."""
    got = report(
        "--model", directory, "--prompt-tokens", 8, "--new-tokens", 5, "--batch", 2, "--runs", 2
    )  # fmt: skip
    ours, roof = got.programs
    llama = benchmark.npllama.load(directory)
    n_bytes = llama.parameters.nbytes - llama.parameters.embedding.nbytes
    assert ours.prefill_tokens_per_second.median == 8 + 7
    assert ours.decode_tokens_per_second.median == 2
    assert roof.prefill_tokens_per_second.median == (8 + 7) / 4  # one pass per prompt
    assert roof.decode_tokens_per_second.median == 2 / 2
    assert ours.prefill_of_roofline.median == 4
    assert ours.decode_of_roofline.median == 2
    assert roof.decode_of_roofline.median == 1
    assert ours.decode_gigabytes_per_second.median * GB == pytest.approx(n_bytes)
    assert roof.decode_gigabytes_per_second.median * GB == pytest.approx(roofline_nbytes(TINY) / 2)
    token = 2 * sum(m.values.size for m in matrices(llama))
    head = 2 * llama.parameters.head.lm_head.values.size
    assert ours.decode_gigaflops.median * GB == pytest.approx(2 * token)
    prefill = 15 * (token - head) + 2 * head
    assert ours.prefill_gigaflops.median * GB == pytest.approx(prefill)
    assert ours.first_token_seconds.median == 1
    assert ours.load_to_first_token_seconds == ours.load_seconds + 1
    assert got.task["prompt_tokens"] == [8, 7]


def test_a_spread_is_median_least_and_largest_run_by_run():
    """The ratio is computed per run, so its median is not the ratio of the medians."""
    task = make_task([1], 2, 260)
    ours = [Sample(10.0, 2.0, 1.0), Sample(20.0, 9.0, 2.0), Sample(30.0, 4.0, 3.0)]
    roof = [Sample(10.0, 4.0, 1.0), Sample(10.0, 10.0, 2.0), Sample(60.0, 4.0, 3.0)]
    got = benchmark.program("x", ours, roof, task, TINY, None)
    assert asdict(got.decode_tokens_per_second) == {"median": 4, "min": 2, "max": 9}
    assert asdict(got.decode_of_roofline) == {"median": 0.9, "min": 0.5, "max": 1}
    assert asdict(got.prefill_of_roofline) == {"median": 1, "min": 0.5, "max": 2}
    silent = benchmark.program("x", [Sample(None, 2.0, None)] * 3, roof, task, None, None)
    assert silent.prefill_of_roofline is silent.prefill_tokens_per_second is None
    assert silent.decode_gigaflops is silent.decode_gigabytes_per_second is None
    assert silent.decode_of_roofline.median == 0.5


def test_shapes_are_those_that_speeds_are_published_for():
    assert SHAPES["1.1b"].n_parameters == 1_100_048_384  # TinyLlama
    assert SHAPES["7b"].n_parameters == 6_738_415_616
    n_15m, n_110m = (SHAPES[name].n_parameters for name in ("15m", "110m"))
    assert (n_15m - 32000 * 288, n_110m - 32000 * 768) == (15_191_712, 109_529_856)  # llama2.c ties


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_random_weights_are_no_zeros_in_their_dtype(dtype):
    llama = random_llama(TINY, Backend(), dtype, 32)
    assert llama.dtype == dtype
    assert llama.context == 32
    assert all((m.values != 0).mean() > 0.9 for m in matrices(llama))


def test_a_batch_is_ragged_where_it_can_be():
    assert prompt_lengths(3, 5) == [3, 2, 1, 1, 1]


# -- roofline ----------------------------------------------------------------------------------


def matrices(llama):
    layers = [
        getattr(layer, field)
        for layer in llama.parameters.layers
        for field in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")
    ]
    return [*layers, llama.parameters.head.lm_head]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_rows", [1, 2, 16, 17])
def test_a_pass_touches_each_matrix_once_in_the_order_of_a_forward(tied, n_rows):
    llama = make_llama(Ops(Backend()), replace(TINY, tie_embeddings=tied))
    forward = []
    linear = llama.ops.linear
    llama.ops.linear = lambda x, w: forward.append(w.values) or linear(x, w)
    llama.logits([1, 2])
    roofline, remark = roofline_of(llama, 1, 64)
    assert remark is None
    assert roofline.scale == 1
    products = []

    def dot(a, b, out):
        np.dot(a, b, out=out)
        products.append((a, b, out.copy()))

    roofline.backend = Backend(SimpleNamespace(dot=dot, zeros=np.zeros))
    assert roofline.seconds(n_rows, 1) > 0
    assert len(products) == len(forward)
    for i, ((a, b, out), w) in enumerate(zip(products, forward, strict=True)):
        assert np.shares_memory(a, w) != np.shares_memory(b, w)
        x, y = (b, out) if np.shares_memory(a, w) else (a.T, out.T)
        assert x.size == w.shape[1] * (1 if i == len(forward) - 1 else n_rows)
        assert np.abs(x).min() > 0
        assert np.abs(y - w @ x).max() < 1e-4
    assert len({w.ctypes.data for w in forward}) == len(forward)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_beside_narrow_weights_the_roofline_is_float32_of_the_same_shapes(dtype):
    llama = make_llama(Ops(Backend()), dtype=dtype)
    roofline, remark = roofline_of(llama, 1, 64)
    made = [*roofline.layers, roofline.head]
    assert [w.shape for w in made] == [m.shape for m in matrices(llama)]
    assert all(w.dtype == np.float32 and (w != 0).mean() > 0.9 for w in made)
    assert sum(w.nbytes for w in made) == roofline_nbytes(TINY)
    assert (roofline.scale, remark) == (1, None)


def test_where_memory_is_short_some_layers_are_timed_and_scaled(monkeypatch, clock):
    llama = make_llama(Ops(Backend()), dtype="bfloat16")
    needs = [None]

    def held(free):
        monkeypatch.setattr(Backend, "free_bytes", lambda self: free)
        needs[:] = roofline_of(llama, 1, 64)
        return 0 if needs[0] is None else len(needs[0].layers) // 7

    all_free = next(free for free in range(0, 2_000_000, 5000) if held(free) == 2)
    assert held(all_free - 5000) == 1
    roofline, remark = needs
    assert roofline.scale == 2
    assert roofline.seconds(1, 1) == 1 * 2 + 1  # two times the layers, and the head
    assert "1 of 2 layers and scaled" in remark
    assert held(50_000) == 0
    assert "no roofline" in needs[1]


def test_passes_bracket_the_run_that_they_are_compared_with(llama):
    order = []

    class Passes:
        def seconds(self, n_tokens, n_logits):
            order.append((n_tokens, n_logits))
            return 2.0

    task = make_task([9, 8], 6, 260)
    sample = roofline_run(Passes(), task, lambda: order.append("run"), task.decode_steps)
    assert order == [(2, 2), (2, 2), (9, 1), (8, 1), "run", (2, 2), (2, 2), (2, 2)]
    assert sample == Sample(prefill=17 / 4, decode=2 / 2, first_token=4)


def test_programs_take_turns_in_each_run_and_pause_between(llama, monkeypatch):
    order = []
    monkeypatch.setattr(llama.backend, "threads", Threads(2))  # does not observe other programs
    monkeypatch.setattr(time, "sleep", lambda seconds: order.append(seconds))
    roofline, _ = roofline_of(llama, 1, 64)
    llama.new_generation = lambda *args, original=llama.new_generation, **kwargs: (
        order.append("npllama") or original(*args, **kwargs)
    )
    rival = SimpleNamespace(run=lambda: order.append("rival") or Sample(None, 1.0, None))
    runs = side_by_side(llama, make_task([3], 3, 260), roofline, [rival], 3)
    assert order == 3 * [measure.PAUSE, "npllama", measure.PAUSE, "rival", measure.PAUSE]
    assert len(runs.npllama) == len(runs.roofline) == len(runs.rivals[0]) == 3
    assert runs.threads == [2, 2, 2]


# -- memory ------------------------------------------------------------------------------------


def test_the_peak_is_seen_though_it_has_passed():
    with PeakMemory() as peak:
        before = resident_bytes()
        block = np.ones(50 * 10**6, dtype="uint8")
        until = time.monotonic() + 60
        while (peak.nbytes or 0) < before + 45 * 10**6 and time.monotonic() < until:
            time.sleep(0.01)  # wait until the thread has measured
        del block
    assert peak.nbytes > before + 45 * 10**6


# -- profile -----------------------------------------------------------------------------------


def test_shares_of_a_profile_sum_to_one_and_all_ops_are_counted(llama):
    lines = profile(llama, make_task([5, 4], 6, 260))
    assert abs(sum(line.share for line in lines) - 1) < 1e-9
    assert all(line.share >= 0 for line in lines)
    calls = {line.op: line.calls for line in lines}
    assert calls["rms_norm"] == 2 * TINY.n_layers + 1
    assert calls[f"linear {TINY.ffn_dim} x {TINY.dim}"] == 2 * TINY.n_layers
    assert calls["attention"] == 2 * TINY.n_layers  # once per row
    assert calls["next_token"] == 1
    assert lines[-1].op == OUTSIDE
    assert not {"linear", "rms_norm"} & vars(llama.ops).keys()  # unchanged


def test_attention_has_its_line_with_numpys_overrides_too():
    llama = make_llama(make_ops("numpy"))
    calls = {line.op: line.calls for line in profile(llama, make_task([5, 4], 6, 260))}
    assert calls["attention"] == 2 * TINY.n_layers


def test_an_op_that_calls_another_counts_its_own_time_alone(clock):
    class Pair(Ops):
        def silu(self, x):
            return self.sigmoid(x)

        def sigmoid(self, x):
            return x

    ops = Pair(Backend())
    with watched(ops, lambda: None) as watch:
        ops.silu(1)
        ops.sigmoid(1)
    assert watch.calls == {"sigmoid": 2, "silu": 1}
    assert watch.seconds == {"sigmoid": 2.0, "silu": 2.0}  # silu: 3 seconds, minus 1 in sigmoid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_everything_is_measured_on_a_device_too(ops, dtype):
    llama = make_llama(ops, dtype=dtype)
    task = make_task([6, 5], 5, 260)
    assert open_model(llama, task).first_token > 0
    roofline, _ = roofline_of(llama, 2, 20)
    runs = side_by_side(llama, task, roofline, [], 2)
    assert all(s.prefill > 0 and s.decode > 0 for s in (*runs.npllama, *runs.roofline))
    lines = profile(llama, task)
    assert abs(sum(line.share for line in lines) - 1) < 1e-9
    assert next(line.calls for line in lines if line.op == "next_token") == 1


# -- printed reports ---------------------------------------------------------------------------


def test_table_and_json_tell_the_same(directory, tmp_path, capsys, monkeypatch):
    command = program_that(tmp_path, "print('12.5 tok/s')")
    options = ["--model", str(directory), "--prompt-tokens", "20", "--new-tokens", "4"]
    options += ["--runs", "2", "--dtype", "int8", "--profile", "--compare-command", command]
    fixed = report(*options)
    monkeypatch.setattr(benchmark, "benchmark", lambda _options: fixed)
    assert benchmark.main([*options, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert benchmark.main([*options, "--markdown"]) == 0
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row]
    by_name = {row[0]: row[1:] for row in rows}
    assert [p["name"] for p in figures["programs"]] == [
        "npllama int8", "roofline: float32 BLAS", command,
    ]  # fmt: skip
    for one in figures["programs"]:
        cells = by_name[one["name"]]
        fields = [name for name in Program.__dataclass_fields__ if name != "name"]
        assert len(cells) == len(fields)
        units = [1, 1, 1, 1, 1, 1, 1, 1e3, 1, 1, 1e-6]
        for cell, name, unit in zip(cells, fields, units, strict=True):
            value = one[name]
            if value is None:
                assert cell == "–"
                continue
            value = unit * (value["median"] if isinstance(value, dict) else value)
            told = float(cell.split(" ")[0].replace(",", ""))
            least = 0.006 if "of_roofline" in name else 0.0006
            assert abs(told - value) <= max(least, 0.006 * value)
    for line in figures["profile"]:
        assert by_name[line["op"]][-1] == f"{line['share']:.1%}"
    ratio = figures["ratios"][0]
    assert ratio["to"] == command
    ours = figures["programs"][0]["decode_tokens_per_second"]
    assert ratio["decode"]["max"] == pytest.approx(ours["max"] / 12.5)
    assert f"Of {command}: decode {ratio['decode']['median']:,.2f} (" in text
    peak = figures["programs"][0]["peak_bytes"]
    assert peak is None or peak > figures["model"]["bytes"]


def test_text_has_the_figures_of_the_table_in_80_columns(directory, capsys, monkeypatch):
    options = ["--model", str(directory), "--prompt-tokens", "20", "--new-tokens", "4"]
    options += ["--runs", "2", "--profile", "--context", "48"]
    report_ = report(*options)
    wide = Spread(123456.0, 101234.0, 145678.0)
    long = replace(report_.programs[0], name="./run stories110M.bin -t 0 " * 3)
    programs = [*report_.programs, long, replace(long, name="w" * 90, decode_gigaflops=wide)]
    programs.append(replace(long, name="wide", prefill_tokens_per_second=wide))
    ratio = replace(benchmark.ratio("x", *2 * [[Sample(1.0, 2.0, 3.0)]]), to=long.name)
    remarks = ["other programs kept cores busy " * 5]
    report_ = replace(report_, programs=programs, ratios=[ratio], remarks=remarks)
    monkeypatch.setattr(benchmark, "benchmark", lambda _options: report_)
    assert benchmark.main(options) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert text.isascii()
    shown = {title: [] for title, _ in COLUMNS}
    for line in lines:
        title = next((title for title in shown if line.startswith(f"{title}  ")), None)
        if title is not None:
            shown[title] += re.split("  +", line.removeprefix(title).strip())
    for title, cell in COLUMNS:
        assert shown[title] == [cell(p).replace("–", "-") for p in programs], title
    for p in programs:  # long names continue on further lines
        assert all(word[:24] in text for word in p.name.split())
    assert all(any(line.startswith(one.op) for line in lines) for one in report_.profile)


def test_the_readme_names_every_option():
    readme = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Measure speed\n")[1].split("\n## ")[0]
    options = {o for action in benchmark._parser()._actions for o in action.option_strings}
    assert not [o for o in options - {"-h", "--help"} if o not in section]


# -- threads -----------------------------------------------------------------------------------


def test_threads_are_limited_for_everything_and_given_back(monkeypatch, capsys):
    seen = []

    def look(_options):
        seen.append(n_threads())
        raise InputError("enough")

    monkeypatch.setattr(benchmark, "benchmark", look)
    with threadpool_limits(2, user_api="blas"):
        if n_threads() != 2:
            pytest.skip("this BLAS has one thread")
        for options in (["--threads", "1"], []):
            assert benchmark.main(["--shape", "15m", *options]) == 2
        assert n_threads() == 2
    assert seen == [1, 2]


def test_the_roofline_has_as_many_threads_as_npllama(monkeypatch):
    seen = []
    dot = np.dot
    monkeypatch.setattr(np, "dot", lambda *a, **out: seen.append(n_threads()) or dot(*a, **out))
    w = np.ones((3, 2), dtype="float32")
    with threadpool_limits(2, user_api="blas"):
        if n_threads() != 2:
            pytest.skip("this BLAS has one thread")
        for n in (1, 2):
            Roofline(Backend(threads=Threads(n)), [w], w).seconds(1, 1)
        assert n_threads() == 2
    assert seen == [1, 1, 2, 2]


# -- other programs ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "speed"),
    [
        ("decode: 61.25 tokens/s", 61.25),
        ("prefill 900 tok/s\ndecode 61 tok/s, 10 s", 61),
        ("achieved tok/s: 69.5\n", 69.5),
        ("eval time = 5 ms ( 16.4 ms per token, 1,061.0 tokens per second)", 1061),
        ("12Tokens/s", 12),
        ("61.25 token/sec", 61.25),
        ("took 5 s", None),
        ("tokens/s", None),
        ("5 tok/step", None),
    ],
)
def test_the_last_speed_that_a_program_prints_counts(text, speed):
    assert printed_speed(text) == speed


def program_that(tmp_path, *lines):
    path = tmp_path / "rival.py"
    path.write_text("\n".join(["import os, sys", *lines]))
    return f"{sys.executable} {path}"


def test_a_commands_speed_is_read_from_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    line = "print('warm-up 3 tok/s'); print(os.environ['OMP_NUM_THREADS'], 'tok/s')"
    command = Command(program_that(tmp_path, line), 7)
    assert command.run() == Sample(None, 7.0, None)
    command = Command(program_that(tmp_path, "print('achieved tok/s: 8', file=sys.stderr)"), 7)
    assert command.run() == Sample(None, 8.0, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("print('done')", 'before "tok/s" or "tokens/s"; its last line is: done'),
        ("print('0 tok/s')", "printed no speed"),
        ("print('9 tok/s'); sys.exit('no such file')", "ended with code 1: no such file"),
    ],
)
def test_a_command_without_a_speed_is_an_error(tmp_path, line, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Command(program_that(tmp_path, line), 1).run()


WORKER = """
import json, sys
job = json.loads(sys.stdin.readline())
print(json.dumps({"versions": job["dtype"]}), flush=True)
for count, _ in enumerate(sys.stdin):
    if count == 3: sys.exit("worn out")
    print(json.dumps({"prefill_seconds": 2, "decode_seconds": job["threads"]}), flush=True)
"""


def test_transformers_answers_each_run_until_it_fails(tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(rivals, "WORKER", worker)
    task = make_task([8, 7], 5, 260)
    with Transformers(TINY, "int8", task, n_threads=4) as rival:  # after one warm-up run
        assert rival.name == "transformers float32"
        assert rival.versions == "float32"
        for _ in range(2):
            assert rival.run() == Sample(prefill=15 / 2, decode=2 * 4 / 4, first_token=2)
        with pytest.raises(InputError, match="transformers failed: worn out"):
            rival.run()


@pytest.mark.parametrize("batch", [1, 3])
def test_the_real_transformers_runs_where_it_is_installed(batch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    task = make_task(prompt_lengths(6, batch), 4, 260)
    with Transformers(TINY, "bfloat16", task, n_threads=1) as rival:
        sample = rival.run()
    assert min(sample.prefill, sample.decode, sample.first_token) > 0
    assert "torch" in rival.versions


def test_the_tool_imports_no_framework():
    code = (
        "import sys; sys.path.insert(0, 'tools'); import benchmark; "
        "print([m for m in ('torch', 'transformers', 'cupy') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "0"], "--runs is 0: expected at least 1"),
        (["--new-tokens", "1"], "--new-tokens is 1: expected at least 2"),
        (["--prompt-tokens", "0"], "--prompt-tokens is 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--threads", "0"], "--threads is 0"),
        (["--context", "0"], "--context is 0"),
        (["--context", "9999"], "--context is 9999"),
        (["--context", "90"], "do not fit the context of 90"),
        (["--compare-command", ""], "--compare-command is empty"),
        (["--compare-command", "'"], "No closing quotation"),
        (["--compare-command", "no-such-program -x"], "program 'no-such-program' was not found"),
        (["--compare", "hf"], "needs torch, which is not installed here"),
    ],
)
def test_wrong_input_ends_in_one_line_before_weights_are_made(
    arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(benchmark, "random_llama", None)
    assert benchmark.main(["--shape", "15m", "--prompt-tokens", "50", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmark: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --shape is required"),
        (["--shape", "15m", "--model", "x"], "not allowed with"),
        (["--shape", "3b"], "invalid choice"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_directory_ends_in_one_line(capsys):
    assert benchmark.main(["--model", "none"]) == 2
    assert "none does not exist" in capsys.readouterr().err


def test_a_shape_that_does_not_fit_is_refused_before_it_is_made(monkeypatch, capsys):
    monkeypatch.setattr(Backend, "free_bytes", lambda self: 10 * GB)
    assert benchmark.main(["--shape", "7b", "--dtype", "bfloat16", "--context", "512"]) == 2
    assert "weights 13.48 GB" in capsys.readouterr().err


def test_a_second_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(Backend, "free_bytes", lambda self: 4 * TINY.n_parameters - 1)
    with pytest.raises(NpllamaError, match="a second model"):
        Transformers(TINY, "float32", make_task([1], 2, 260), 1)


def test_ctrl_c_ends_with_130(monkeypatch, capsys):
    def interrupted(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "benchmark", interrupted)
    assert benchmark.main(["--shape", "15m"]) == 130
    assert capsys.readouterr().err == "benchmark: interrupted\n"
