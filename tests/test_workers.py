"""Worker processes compute the same products, and end with the process that started them."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import npllama.ops.shared_products as shared_products
import npllama.ops.workers
from conftest import TINY, make_llama, run_script
from model_directory import write_model
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.errors import WorkerError
from npllama.generate import main
from npllama.ops import NumpyOps
from npllama.ops.chunks import MANY_ROWS
from npllama.ops.workers import _ASLEEP, _SPIN, MAX_ROWS, Workers, _of_worker, can_work
from npllama.parameters import Matrix
from npllama.sampling_options import Sampling
from npllama.shared_arrays import location_of, share
from npllama.threads import Threads

pytestmark = pytest.mark.skipif(not can_work(), reason="no worker processes on this machine")

DTYPES = ("float32", "float16", ml_dtypes.bfloat16, "int8")
SHAPES = ((1000, 700), (3, 64), (1, 5))
BIG = LlamaConfig(256, 2, 4, 2, 1100, 260)  # gate and up together have 563,200 elements


@pytest.fixture(scope="module")
def matrices():
    rng = np.random.default_rng(0)
    return [Matrix((30 * rng.standard_normal(s)).astype(d)) for d in DTYPES for s in SHAPES]


def shared(matrices):
    """The matrices in shared memory that nothing else uses."""
    return [Matrix(values) for values in share([w.values for w in matrices])]


@pytest.fixture(scope="module")
def workers(matrices):
    made = Workers(3, shared(matrices))
    yield made
    made.close()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def asleep(workers):
    return workers._counters[_of_worker(1, _ASLEEP)]


def ends(pid, seconds=60):
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.01)
    return not alive(pid)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 16, MAX_ROWS])
def test_their_products_are_those_of_one_process(workers, matrices, n_rows, rng):
    for i, w in enumerate(matrices):
        x = rng.standard_normal((n_rows, w.shape[1]), dtype="float32")
        truth = w.values.astype("float64") @ x.T.astype("float64")
        for n_parts in (1, 2, 3, 9):
            got = workers.product(x, w, i, n_parts)
            assert got.shape == truth.shape and got.dtype == np.float32
            assert np.abs(got - truth).max() <= 2e-6 * np.abs(truth).max()


def test_they_wake_up_from_sleep(workers, matrices, rng):
    x = rng.standard_normal((1, 700), dtype="float32")
    want = workers.product(x, matrices[0], 0, 3)
    for pause in (0, _SPIN, 1.01 * _SPIN, _SPIN + 1e-4, 3 * _SPIN, 0.3):
        for _ in range(20 if pause < 0.1 else 2):
            time.sleep(pause)
            assert np.array_equal(workers.product(x, matrices[0], 0, 3), want)


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def stopped_in_its_sleep(workers):
    """The first worker is marked as asleep, and stopped so that it cannot wake up."""
    (pid, *_) = workers.pids
    wait_until(lambda: asleep(workers))
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: state(pid) == "T")
    yield
    os.kill(pid, signal.SIGCONT)


def unread_bytes(workers):
    n = fcntl.ioctl(workers._processes[0].stdin, termios.FIONREAD, b"1234")
    return int.from_bytes(n, sys.byteorder)


@pytest.mark.parametrize("at", ["_compute", "_wake"])
def test_a_product_after_one_that_ctrl_c_ended_is_right(matrices, monkeypatch, rng, at):
    made = Workers(2, shared(matrices))
    x = [rng.standard_normal((64, w.shape[1]), dtype="float32") for w in matrices]
    want = [made.product(x[i], matrices[i], i, 2) for i in range(len(matrices))]
    owner = made if at == "_wake" else npllama.ops.workers
    right = getattr(owner, at)

    def interrupted(*args):
        raise KeyboardInterrupt

    for _ in range(5):
        for i in (0, 3, 6, 1):
            monkeypatch.setattr(owner, at, interrupted)
            asleep = stopped_in_its_sleep(made) if at == "_wake" else contextlib.nullcontext()
            with asleep, pytest.raises(KeyboardInterrupt):
                made.product(x[i], matrices[i], i, 2)
            monkeypatch.setattr(owner, at, right)
            assert np.array_equal(made.product(x[i - 1], matrices[i - 1], i - 1, 2), want[i - 1])
    made.close()


def test_surplus_bytes_wake_nobody(matrices):
    made = Workers(2, shared(matrices))
    x = np.ones((1, 700), dtype="float32")
    want = made.product(x, matrices[0], 0, 2)
    wait_until(lambda: asleep(made))
    for _ in range(20):
        made._wake(1)
        wait_until(lambda: unread_bytes(made) == 0)
        assert asleep(made)
    assert np.array_equal(made.product(x, matrices[0], 0, 2), want)
    made.close()


def test_waiting_for_one_that_does_not_run_fills_no_pipe(matrices, monkeypatch):
    made = Workers(2, shared(matrices))
    x = np.ones((1, 700), dtype="float32")
    want = made.product(x, matrices[0], 0, 2)
    looks, poll = [], subprocess.Popen.poll
    monkeypatch.setattr(subprocess.Popen, "poll", lambda self: looks.append(1) or poll(self))
    with ThreadPoolExecutor(1) as pool:
        with stopped_in_its_sleep(made):
            product = pool.submit(made.product, x, matrices[0], 0, 2)
            wait_until(lambda: len(looks) > 20)  # checks whether the worker sleeps
            assert 0 < unread_bytes(made) <= 2
        assert np.array_equal(product.result(), want)
    made.close()


def test_a_product_after_one_that_ended_before_it_was_handed_out_waits_for_nobody():
    """Part 3 took no share of the previous product, so it never reports that product as done."""
    code = (
        "import numpy as np\n"
        "from npllama.ops.workers import Workers\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.shared_arrays import share\n"
        "class Interrupted:\n"
        "    def __setitem__(self, *args): raise KeyboardInterrupt\n"
        "m = [Matrix(share([np.ones((96, 9), dtype='int8')])[0])]\n"
        "w = Workers(3, m)\n"
        "x = np.ones((1, 9), dtype='float32')\n"
        "for n_parts in (3, 2): w.product(x, m[0], 0, n_parts)\n"
        "right, w._x = w._x, Interrupted()\n"
        "try: w.product(x, m[0], 0, 3)\n"
        "except KeyboardInterrupt: w._x = right\n"
        "assert (w.product(x, m[0], 0, 3) == 9).all()\n"
    )
    run_script(code)


def test_a_fork_computes_by_itself_and_its_end_ends_no_worker():
    code = (
        "import numpy as np, os\n"
        "from npllama.ops.workers import Workers\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.shared_arrays import share\n"
        "m = [Matrix(share([np.ones((40, 9), dtype='int8')])[0])]\n"
        "w = Workers(2, m)\n"
        "x = np.ones((1, 9), dtype='float32')\n"
        "w.product(x, m[0], 0, 2)\n"
        "pid = os.fork()\n"
        "assert (w.product(x, m[0], 0, 2) == 9).all()\n"
        "if pid:\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    assert (w.product(x, m[0], 0, 2) == 9).all()\n"
    )
    run_script(code)


def test_a_second_model_of_the_same_ops_has_workers_that_know_it(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    ops = NumpyOps(Backend(threads=Threads(2)))
    got = []
    for seed in (0, 1, 0):
        llama = make_llama(ops, BIG, seed=seed, dtype="int8")
        got.append(llama.generate([1, 2, 3], max_new_tokens=5, temperature=0, ignore_eos=True).ids)
    assert got[0] == got[2]
    ops.shared.workers.close()


def test_ctrl_c_is_not_for_them(workers):
    assert all(os.getsid(pid) != os.getsid(0) for pid in workers.pids)


def test_closing_ends_them(matrices):
    made = Workers(2, shared(matrices[:1]))
    pids = made.pids
    made.close()
    assert pids and not any(map(alive, pids))


def test_they_leave_when_nobody_holds_them_any_more(matrices):
    pids = Workers(2, shared(matrices[:1])).pids
    assert all(map(ends, pids))


def test_they_leave_when_their_parent_is_killed():
    code = (
        "import numpy as np, time\n"
        "from npllama.ops.workers import Workers\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.shared_arrays import share\n"
        "m = [Matrix(share([np.ones((9, 9), dtype='int8')])[0])]\n"
        "w = Workers(3, m)\n"
        "w.product(np.ones((1, 9), dtype='float32'), m[0], 0, 3)\n"
        "print(*w.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert all(map(ends, pids))


def test_they_leave_when_their_parent_is_killed_and_a_fork_of_it_lives_on():
    code = (
        "import numpy as np, os, time\n"
        "from npllama.ops.workers import Workers\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.shared_arrays import share\n"
        "m = [Matrix(share([np.ones((9, 9), dtype='int8')])[0])]\n"
        "w = Workers(2, m)\n"
        "w.product(np.ones((1, 9), dtype='float32'), m[0], 0, 2)\n"
        "if not os.fork(): print(os.getpid(), *w.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, text=True
    )
    fork, worker = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        assert ends(worker) and alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)


def test_they_work_for_a_program_without_standard_streams():
    code = (
        "import numpy as np, sys\n"
        "from npllama.ops.workers import Workers\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.shared_arrays import share\n"
        "m = [Matrix(share([np.ones((40, 9), dtype='int8')])[0])]\n"
        "w = Workers(2, m)\n"
        "assert (w.product(np.ones((1, 9), dtype='float32'), m[0], 0, 2) == 9).all()\n"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(command, timeout=60).returncode == 0


def test_one_that_was_stopped_ends_as_well(matrices):
    made = Workers(2, shared(matrices[:1]))
    (pid,) = made.pids
    os.kill(pid, signal.SIGSTOP)
    made.close()
    assert not alive(pid)


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_worker_is_one_clear_line(matrices, kill):
    made = Workers(2, shared(matrices[:1]))
    x = np.ones((1, 700), dtype="float32")
    made.product(x, matrices[0], 0, 2)
    os.kill(made.pids[0], kill)
    with pytest.raises(WorkerError, match=rf"killed by signal {kill.value}.*--threads 1") as error:
        for _ in range(100):
            made.product(x, matrices[0], 0, 2)
            time.sleep(0.01)
    assert "\n" not in str(error.value)
    made.close()


def test_they_need_no_folder_that_can_be_written(matrices, monkeypatch):
    def no_folder(*args, **kwargs):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", no_folder)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", no_folder)
    monkeypatch.setattr(tempfile, "tempdir", None)
    made = Workers(2, shared(matrices))
    assert (made.product(np.zeros((1, 700), dtype="float32"), matrices[0], 0, 2) == 0).all()
    made.close()


def test_a_worker_that_cannot_be_started_is_one_clear_line(matrices, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(WorkerError, match=r"could not be started.*--threads 1"):
        Workers(2, shared(matrices[:1]))


# -- the model with workers


def big_llama(dtype, n_threads):
    ops = NumpyOps(Backend(threads=Threads(n_threads)))
    return make_llama(ops, BIG, dtype=dtype), ops


def wait_until_ready(ops):
    wait_until(lambda: ops.shared.workers.are_ready)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_narrow_model_generates_with_workers_what_it_does_without(dtype, monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    prompts = [[1, 5, 6, 7], [1, 8], [1, *range(3, 200)]]
    got = []
    for n_threads in (1, 2):
        llama, ops = big_llama(dtype, n_threads)
        batch = llama.generate_batch(
            prompts, max_new_tokens=8, sampling=Sampling(temperature=0), ignore_eos=True
        )
        got.append(([c.ids for c in batch], np.array([c.log_probs for c in batch])))
        assert (ops.shared.workers is not None) == (n_threads == 2)
        if ops.shared.workers is not None:
            ops.shared.workers.close()
    assert got[0][0] == got[1][0]
    assert np.abs(got[0][1] - got[1][1]).max() < 1e-4


def test_a_small_float32_model_generates_with_workers_once_they_have_started(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    products = []
    product = Workers.product
    monkeypatch.setattr(Workers, "product", lambda *a: products.append(a) or product(*a))

    def run(llama):
        products.clear()
        batch = llama.generate_batch(
            [[1, 5, 6, 7], [1, 8], [1, *range(3, 100)]],
            max_new_tokens=8,
            sampling=Sampling(temperature=0),
            ignore_eos=True,
        )
        return [c.ids for c in batch], np.array([c.log_probs for c in batch]), len(products)

    alone = run(big_llama("float32", 1)[0])
    llama, ops = big_llama("float32", 2)
    with monkeypatch.context() as starting:
        starting.setattr(Workers, "are_ready", False)
        before = run(llama)
    wait_until_ready(ops)
    after = run(llama)
    ops.shared.workers.close()
    assert (alone[2], before[2]) == (0, 0) and after[2] > 0
    for ids, log_probs, _n in (before, after):
        assert ids == alone[0]
        assert np.abs(log_probs - alone[1]).max() < 1e-4


def test_of_a_small_float32_model_they_share_what_is_not_cut_up_among_threads(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    alone, (llama, ops) = big_llama("float32", 1)[0], big_llama("float32", 2)
    llama.logits([1])
    wait_until_ready(ops)
    rows = []
    product = Workers.product
    monkeypatch.setattr(
        Workers, "product", lambda s, x, *a: rows.append(len(x)) or product(s, x, *a)
    )
    for n in (1, 2, MANY_ROWS - 1, MANY_ROWS, MAX_ROWS, MAX_ROWS + 1):
        ids = list(range(3, 3 + n))
        rows.clear()
        got, want = llama.logits(ids), alone.logits(ids)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
        assert set(rows) == ({n} if n < MANY_ROWS else set())
    ops.shared.workers.close()


def test_a_fork_of_a_small_float32_model_computes_by_itself():
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "from test_workers import big_llama, shared_products, wait_until_ready\n"
        "shared_products.SHARED_SMALL_SIZE = shared_products.CACHED_SIZE = 1000\n"
        "llama, ops = big_llama('float32', 2)\n"
        "ids = lambda: llama.generate([1, 5], max_new_tokens=5, temperature=0).ids\n"
        "want = ids()\n"
        "wait_until_ready(ops)\n"
        "assert ids() == want\n"
        "pid = os.fork()\n"
        "assert ids() == want\n"
        "if pid:\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "    assert ids() == want\n"
    )
    run_script(code)


def test_threads_that_begin_at_once_start_them_once(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    llama, ops = big_llama("int8", 2)
    made = []
    start = Workers._start
    monkeypatch.setattr(Workers, "_start", lambda *a: made.append(a) or start(*a))
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda _: llama.logits([1, 5]), range(8)))
    assert len(made) == 1
    assert all(np.array_equal(logits, got[0]) for logits in got)
    ops.shared.workers.close()


def test_a_float32_model_does_without_workers_that_cannot_be_started(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    got = []
    for n_threads in (1, 2):
        llama, ops = big_llama("float32", n_threads)
        got.append(llama.generate([1, 5], max_new_tokens=5, temperature=0, ignore_eos=True).ids)
        assert ops.shared.workers is None
    assert got[0] == got[1]


def test_a_float32_model_goes_on_without_workers_that_end(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    llama, ops = big_llama("float32", 2)
    want = llama.logits([1, 5])
    wait_until_ready(ops)
    assert np.abs(llama.logits([1, 5]) - want).max() <= 1e-5 * np.abs(want).max()
    (pid,) = ops.shared.workers.pids
    os.kill(pid, signal.SIGKILL)
    for _ in range(3):
        assert np.abs(llama.logits([1, 5]) - want).max() <= 1e-5 * np.abs(want).max()
    assert ops.shared.workers is None and not ops.backend.threads.helpers


def test_a_part_that_is_prepared_twice_is_shared_once(monkeypatch):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    llama, ops = big_llama("int8", 2)
    ops.prepare(llama.parameters.head)
    more = make_llama(ops, BIG, seed=1, dtype="int8")
    alone = make_llama(big_llama("int8", 1)[1], BIG, seed=1, dtype="int8")
    got, want = more.logits([1, 5]), alone.logits([1, 5])
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    ops.shared.workers.close()


def test_one_thread_from_some_moment_on_means_no_workers(monkeypatch):
    """As in training, where each core computes its own micro-batch."""
    monkeypatch.setattr(shared_products, "SHARED_SMALL_SIZE", 1000)
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    ops = NumpyOps(Backend(threads=Threads(2)))
    ops.backend.threads = Threads(1)
    llama = make_llama(ops, BIG)
    llama.logits([1, 5])
    assert ops.shared.workers is None
    assert not any(location_of(array) for array in llama.parameters.layers[0].arrays())


@pytest.mark.parametrize(
    ("dtype", "n_rows", "n_threads"),
    [("float32", 1, 2), ("float32", MANY_ROWS - 1, 2), ("float32", MANY_ROWS, 1), ("int8", 1, 1)],
)
def test_blas_has_one_thread_beside_workers_and_where_many_rows_are_cut_up(
    dtype, n_rows, n_threads, monkeypatch
):
    monkeypatch.setattr(shared_products, "SHARED_SIZE", 1000)
    _, ops = big_llama(dtype, 2)
    with ops.forward_context(n_rows):
        libraries = ThreadpoolController().select(user_api="blas").lib_controllers
        assert {library.get_num_threads() for library in libraries} == {n_threads}
    if ops.shared.workers is not None:
        ops.shared.workers.close()


def test_models_without_use_for_workers_have_none(monkeypatch):
    def check(config, dtype):
        ops = NumpyOps(Backend(threads=Threads(2)))
        make_llama(ops, config, dtype=dtype).generate([1, 2, 3], max_new_tokens=3)
        assert ops.shared.workers is None

    check(TINY, "int8")
    check(BIG, "float32")  # small enough for the CPU cache
    monkeypatch.setattr(shared_products, "CACHED_SIZE", 1000)
    check(LlamaConfig(704, 1, 2, 2, 700, 260), "float32")  # uses BLAS threads instead


def test_a_script_needs_no_main_guard_and_leaves_nobody_behind(tmp_path):
    model = write_model(tmp_path / "model", BIG, dtype="bfloat16")
    script = tmp_path / "script.py"
    script.write_text(
        "import npllama\n"
        f"llama = npllama.load({str(model)!r}, backend='numpy', threads=2)\n"
        "llama.generate([1, 2, 3], max_new_tokens=4, ignore_eos=True)\n"
        "print(*llama.ops.shared.workers.pids)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 1 and ends(pids[0])


def test_the_command_line_tells_of_a_dead_worker_and_exits_2(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path / "model", BIG, dtype="bfloat16")
    made = []
    start = Workers._start

    def start_and_kill(self, job):
        start(self, job)
        self._processes[-1].kill()
        made.append(self)

    monkeypatch.setattr(Workers, "_start", start_and_kill)
    command = ["--model", str(model), "--backend", "numpy", "--threads", "2", "--prompt", "a"]
    assert main([*command, "--no-echo"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("npllama: error: a worker process ended") and error.count("\n") == 1
    made[0].close()
