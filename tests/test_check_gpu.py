"""tools/check_gpu.sh from start to end on the CuPy for tests. Only the speeds need a GPU."""

import itertools
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarking.device_weights import device_parameters
from benchmarking.shapes import SHAPES, prefill_flops
from checking_gpu import rival
from checking_gpu.decoding import Decoding, decode
from checking_gpu.results import BELOW, FAILED, OK, Results, markdown, why_it_ended
from checking_gpu.stage import Stage
from checking_gpu.unit_tests import FILES
from conftest import FAKE_CUPY, ROOT, STRICT_CUPY, TINY, make_llama, make_ops
from cuda_simulator import compiler
from npllama.costs import forward_flops
from npllama.initialization import random_parameters
from npllama.llama import Llama

SCRIPT = ROOT / "tools" / "check_gpu.sh"
STAGES = ["ids", "tests", "decode", "prompt", "rival", "equivalence", "sanitizer", "large"]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no g++ 12 on this machine")


def start(*arguments, folders=(FAKE_CUPY,)):
    path = os.pathsep.join(map(str, folders))
    return subprocess.Popen(
        [str(SCRIPT), *map(str, arguments)],
        env=dict(os.environ) | {"PYTHON": sys.executable, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process):
    stdout, stderr = process.communicate(timeout=100)
    return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)


def check_gpu(*arguments, **settings):
    return ended(start(*arguments, **settings))


@pytest.fixture(scope="module", autouse=True)
def whole_run(request, tmp_path_factory):
    """A run of all stages, and its directory; None if the test of this run is not selected.

    The run takes the longest. It therefore starts before the first test of this file and runs
    beside the tests, and its own test is the last.
    """
    judge = test_every_stage_runs_to_its_end_on_the_cupy_for_tests
    selected = any(getattr(item, "function", None) is judge for item in request.session.items)
    if not selected or compiler() is None:
        yield None
        return
    out = tmp_path_factory.mktemp("whole")
    process = start("--tiny", "--out", out)
    yield process, out
    process.terminate()  # if an earlier test ended the session
    process.communicate()


def table(text):
    """The cells of each row of the last table."""
    last = text[text.rindex("| stage |") :].splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in last]
    for before, row in itertools.pairwise(rows):
        row[0] = row[0] or before[0]
    return rows


BROKEN = """
import os, sys, time
if "checking_gpu.prompt" in sys.orig_argv:
    print("the driver is gone", file=sys.stderr)
    os._exit(3)
if "checking_gpu.equivalence" in sys.orig_argv:
    time.sleep(100)
__file__ = {path!r}
exec(open(__file__).read())
def max(x):
    raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
"""


@pytest.fixture
def broken_cupy(tmp_path):
    """A CuPy with which one stage crashes, one hangs, and one partly fails."""
    (tmp_path / "cupy").mkdir()
    path = str(FAKE_CUPY / "cupy" / "__init__.py")
    (tmp_path / "cupy" / "__init__.py").write_text(BROKEN.format(path=path))
    return tmp_path, FAKE_CUPY


@needs_compiler
def test_it_goes_on_after_a_failure(broken_cupy):
    done = check_gpu("--tiny", "--stage", "large", "--stage", "prompt", folders=broken_cupy)
    rows = table(done.stdout)
    assert done.returncode == 0
    assert rows[:2] == [
        ["prompt", "", "exit code 3: the driver is gone", "", FAILED],
        ["large", "read bandwidth", "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS", "", FAILED],
    ]
    # the speeds are reported even without a measured bandwidth
    assert len(rows) == 6 and all("tokens/s" in row[2] for row in rows[2:])


def test_a_stage_that_hangs_is_ended(broken_cupy):
    done = check_gpu("--stage", "equivalence", "--stage-seconds", 1, folders=broken_cupy)
    assert done.returncode == 0
    assert table(done.stdout) == [["equivalence", "", "timed out", "", FAILED]]


SANITIZER = """#!/bin/sh
echo "$@" > {told}
shift 4
[ {n} -eq 0 ] && "$@"
echo "========= ERROR SUMMARY: {n} errors"
exit {code}
"""


@needs_compiler
@pytest.mark.parametrize(("n", "verdict"), [(0, OK), (3, FAILED)])
def test_launches_run_under_a_sanitizer_where_there_is_one(tmp_path, monkeypatch, n, verdict):
    program, told = tmp_path / "compute-sanitizer", tmp_path / "told"
    program.write_text(SANITIZER.format(told=told, n=n, code=9 if n else 0))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (row,) = table(check_gpu("--tiny", "--stage", "sanitizer").stdout)
    assert row == ["sanitizer", "memcheck", f"ERROR SUMMARY: {n} errors", "0 errors", verdict]
    assert told.read_text().startswith("--tool memcheck --error-exitcode 9 ")


def fake_worker(monkeypatch, answers):
    """Replace transformers_worker.py by one with these answers. Returns the list of its jobs."""
    jobs = []

    def run(command, **settings):
        jobs.append(json.loads(command[-1]))
        answer = answers[jobs[-1]["way"]]
        if answer is None:
            raise subprocess.TimeoutExpired(command, settings["timeout"])
        if isinstance(answer, str):
            return SimpleNamespace(returncode=1, stdout="", stderr=f"Traceback\n{answer}\n")
        said = json.dumps({"seconds": answer, "versions": "5.17, torch 2.11"})
        return SimpleNamespace(returncode=0, stdout=f"a warning\n{said}\n", stderr="")

    monkeypatch.setattr(rival.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(rival.subprocess, "run", run)
    return jobs


def test_transformers_is_a_row_and_a_ratio_for_each_way(tmp_path, monkeypatch):
    jobs = fake_worker(monkeypatch, {"eager": 0.01, "compiled": 0.002})
    stage = Stage("rival", Results(tmp_path), tiny=False, seconds=100)
    stage.results.keep(rival.OURS, 450.0)
    rival.run(stage)
    cells = [row[1:] for row in stage.results.rows()]
    name = "1.1b float16 (5.17, torch 2.11)"
    assert cells == [
        [f"transformers eager, {name}", "100.0 tokens/s, 10,000 us per token", "", ""],
        ["npllama to transformers eager", "4.50", "at least 4", OK],
        [f"transformers compiled, {name}", "500.0 tokens/s, 2,000 us per token", "", ""],
        ["npllama to transformers compiled", "0.90", "at least 1", BELOW],
    ]
    assert jobs[0]["config"]["hidden_size"] == 2048 and jobs[0]["dtype"] == "float16"
    assert (jobs[0]["context"], jobs[0]["new_tokens"]) == (512, 64)  # as npllama's own case
    assert f"{rival.SHAPE} {rival.DTYPE}, context {rival.CONTEXT}" == rival.OURS


def test_a_transformers_that_fails_is_a_row(tmp_path, monkeypatch):
    fake_worker(monkeypatch, {"eager": "RuntimeError: no kernel image", "compiled": None})
    stage = Stage("rival", Results(tmp_path), tiny=False, seconds=100)
    stage.results.keep(rival.OURS, 450.0)
    rival.run(stage)
    figures = [(row[2], row[-1]) for row in stage.results.rows()]
    assert figures == [
        ("RuntimeError: no kernel image", FAILED),
        ("timed out", FAILED),
    ]


def test_without_cupy_it_ends_in_one_line(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('no CuPy here')")
    done = check_gpu("--tiny", folders=(tmp_path,))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("check_gpu: error: backend cupy cannot be used (")


def test_the_list_names_the_stages_in_their_order():
    done = check_gpu("--list")
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == STAGES
    seconds = [int(line.split("\t")[1].split()[0]) for line in done.stdout.splitlines()]
    assert all(0 < n <= 120 for n in seconds)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage", "decoding"), "there is no stage decoding"),
        (("--stage",), "--stage needs a value"),
        (("--seconds", "6m"), "--seconds is 6m: expected a whole number"),
        (("--stage-seconds", "0"), "--stage-seconds is 0: expected a whole number"),
        (("--fast",), "unknown option --fast"),
    ],
)
def test_wrong_options_are_one_line(arguments, message):
    done = check_gpu(*arguments)
    assert done.returncode == 2
    assert done.stderr == f"check_gpu: error: {message} (--help lists all options)\n"


def test_help_is_the_scripts_own_heading():
    said = check_gpu("--help").stdout
    assert said.startswith("Checks this checkout on a machine with a GPU")
    options = ("--stage", "--list", "--seconds", "--stage-seconds", "--out", "--tiny", "PYTHON")
    for option in options:
        assert option in said
    assert "set -u" not in said


def test_the_test_files_of_the_stage_exist():
    """Checks the files that are listed by name, and not those that match a pattern."""
    named = [name for name in FILES if "*" not in name]
    assert not [name for name in named if not (ROOT / "tests" / name).exists()]


# -- results -----------------------------------------------------------------------------------


def test_a_bar_is_met_or_not(tmp_path):
    results = Results(tmp_path)
    results.bar("decode", "7b", "0.80", 0.8, 0.8)
    results.bar("decode", "7b", "0.79", 0.79, 0.8)
    results.add("prompt", "a|b", "two\nlines")
    assert [row[-1] for row in results.rows()] == [OK, BELOW, ""]
    assert markdown(results.rows()).splitlines()[2:] == [
        "| decode | 7b | 0.80 | at least 0.8 | ok |",
        "|  | 7b | 0.79 | at least 0.8 | below |",
        "| prompt | a\\|b | two lines |  |  |",
    ]


def test_numbers_are_kept_for_later_stages(tmp_path):
    Results(tmp_path).keep("read bandwidth", 4e12)
    Results(tmp_path).keep("other", 1.0)
    assert Results(tmp_path).number("read bandwidth") == 4e12
    assert Results(tmp_path).number("none") is None


def test_how_a_stage_ended(tmp_path):
    log = tmp_path / "log"
    log.write_text("a\nlast line\n\n")
    assert why_it_ended(1, log) == "exit code 1: last line"
    assert why_it_ended(124, log) == "timed out"
    assert why_it_ended(9, tmp_path / "none") == "exit code 9"


def test_a_part_without_time_is_a_row(tmp_path):
    stage = Stage("decode", Results(tmp_path), tiny=False, seconds=3)
    assert stage.attempt("7b", lambda: 1, needs=10) is None
    assert stage.attempt("1b", lambda: 1, needs=1) == 1
    assert stage.results.rows() == [["decode", "7b", "no time left", "", ""]]


def test_a_step_reads_the_weights_and_the_live_cache():
    """The middle step of 8 reads 24 positions. A position has keys and values of 3 heads with 8
    float32 elements in each of 2 layers, for each of 2 rows."""
    llama = make_llama(make_ops("numpy"), TINY)
    found = decode(llama, context=28, batch=2, new_tokens=8, runs=1)
    a_position = 2 * 2 * 3 * 8 * 4
    assert found.nbytes == llama.bytes_per_forward + 2 * 24 * a_position
    assert found.seconds > 0
    assert Decoding(4, 0.5, 100).tokens_per_second == 8
    assert Decoding(4, 0.5, 100).bytes_per_second == 200


def test_decoding_ends_at_the_context_and_reads_the_prompts_once():
    llama = make_llama(make_ops("numpy"), TINY)
    read, compute = [], llama.compute

    def watched(tokens, cache, place, *rest):
        read.append((tokens.shape[1], max(place.starts) + tokens.shape[1]))
        return compute(tokens, cache, place, *rest)

    llama.compute = watched
    decode(llama, context=28, batch=1, new_tokens=8, runs=2)
    prompts, steps = [n for n, _ in read if n > 1], [end for n, end in read if n == 1]
    assert prompts == [20]
    assert max(steps) == 27 and steps.count(27) == 3  # the last token is not an input


def test_a_prompts_operations_are_two_a_weight_and_token():
    config = SHAPES["7b"]
    n_weights = config.n_parameters - 2 * 32000 * 4096 - 65 * 4096  # of the matrices in the layers
    assert forward_flops(config, 2048, 0) == 2 * n_weights * 2048
    assert prefill_flops(config, [2048]) == 2 * (n_weights * 2048 + 32000 * 4096)


def test_the_large_shapes_are_those_of_the_papers():
    assert SHAPES["13b"].n_parameters == 13_015_864_320
    assert SHAPES["34b"].n_parameters == 33_743_970_304
    assert SHAPES["70b"].n_parameters == 68_976_648_192


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("which", ["strict", STRICT_CUPY])
def test_weights_made_on_the_device_are_as_large_as_those_of_the_host(which, dtype):
    ops = make_ops(which)
    ours, theirs = device_parameters(TINY, ops, dtype), random_parameters(TINY, ops, 0, dtype)

    def of(parameters):
        layer = parameters.layers[1]
        matrices = (parameters.embedding, layer.wq, layer.wv, layer.wo, layer.w_up, layer.w_down)
        for w in (*matrices, parameters.head.lm_head):
            scale = 1 if w.scale is None else ops.backend.to_host(w.scale)[:, None]
            yield ops.backend.to_host(w.values).astype("float32") * scale

    for mine, theirs_ in zip(of(ours), of(theirs), strict=True):
        assert mine.shape == theirs_.shape
        assert abs(mine.std() / theirs_.std() - 1) < 0.1
        assert abs(mine.mean()) < 0.1 * mine.std()
    assert ours.layers[0].wq.format.name == dtype
    first, second = (ops.backend.to_host(layer.wq.values) for layer in ours.layers)
    assert (first != second).mean() > 0.9  # all layers have different weights


def test_matrices_made_in_parts_are_those_made_at_once(monkeypatch):
    ops = make_ops("strict")
    whole = device_parameters(TINY, ops, "float32").layers[0].wq.values
    monkeypatch.setattr("benchmarking.device_weights.CHUNK", 48 * 5)
    parts = device_parameters(TINY, ops, "float32").layers[0].wq.values
    assert np.array_equal(ops.backend.to_host(whole), ops.backend.to_host(parts))


@needs_compiler
def test_a_model_of_such_weights_generates():
    ops = make_ops("strict-kernels")
    llama = Llama(TINY, device_parameters(TINY, ops, "float16"), ops)
    ids = llama.generate([1, 2], max_new_tokens=3, temperature=0, ignore_eos=True).ids
    assert len(ids) == 3


@needs_compiler
def test_every_stage_runs_to_its_end_on_the_cupy_for_tests(whole_run):
    process, out = whole_run
    done = ended(process)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = table(done.stdout)
    assert list(dict.fromkeys(row[0] for row in rows)) == STAGES
    assert not [row for row in rows if row[-1] not in ("", OK)]
    by_stage = {stage: [row for row in rows if row[0] == stage] for stage in STAGES}
    assert all("sampled 3 of 3" in row[2] and row[-1] == OK for row in by_stage["ids"])
    assert re.search(r"^\d+ passed", by_stage["tests"][0][2])
    figures = " ".join(row[1] + row[2] for row in by_stage["decode"])
    for part in ("read bandwidth", "shipped model", "1.1b float16", "7b int8", " us "):
        assert part in figures
    assert all("not run" in by_stage[stage][0][2] for stage in ("rival", "sanitizer"))
    assert {row[1] for row in by_stage["equivalence"]} >= {"cupy reference, float16"}
    # one table after each stage and one at the end, each below the GPU, the date and the command
    assert done.stdout.count("| stage |") == len(STAGES) + 1
    heading = done.stdout[: done.stdout.rindex("| stage |")].splitlines()[-2]
    for part in (f"--tiny --out {out}", "CuPy for tests", "UTC", "driver", "tiny models"):
        assert part in heading
    assert "numpy reference" in (out / "equivalence.txt").read_text()
