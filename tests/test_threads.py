"""The number of threads, the division of work among them, and the restored state of BLAS."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import npllama.threads
from conftest import make_llama, run_script
from npllama.backend import Backend
from npllama.operating_system import process_seconds, usable_cores
from npllama.ops import NumpyOps
from npllama.parameters import Matrix
from npllama.threads import Threads


def blas_threads():
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    return [library.get_num_threads() for library in libraries]


def test_all_items_are_computed_in_order_by_different_slots():
    both = threading.Barrier(2, timeout=60)

    def square(item, slot):
        if item < 2:  # opens the barrier only if two run at once
            both.wait()
        return item * item, slot

    got = Threads(2).map(square, list(range(50)))
    assert [value for value, _ in got] == [i * i for i in range(50)]
    assert {got[0][1], got[1][1]} == {0, 1}


def test_blas_has_one_thread_within_a_map_and_as_many_as_before_after_it():
    threads = Threads(2)
    with threads.blas(2):
        got = threads.map(lambda _item, _slot: blas_threads(), range(4))
        assert all(n == 1 for inner in got for n in inner)
        assert all(n == 2 for n in blas_threads())


def test_contexts_of_one_thread_nest():
    threads = Threads(2)
    before = blas_threads()
    with threads.blas(1):
        with threads.blas(2):
            assert set(blas_threads()) == {2}
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def in_a_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def test_blas_obeys_any_thread_whichever_was_first():
    """threadpoolctl 3.8 lets only the first thread that sets the number control it."""
    threads = Threads(2)

    def inside(n):
        with threads.blas(n):
            return set(blas_threads())

    def main_and_others():
        for n in (1, 2, 1):
            assert inside(n) == {n}
            assert in_a_thread(lambda n=n: inside(n)) == {n}

    main_and_others()
    in_a_thread(main_and_others)


def test_a_thread_that_has_computed_leaves_control_of_blas_to_the_program():
    with ThreadPoolExecutor(1) as pool:  # the thread of the pool stays alive
        with Threads(2).blas(2):
            pass
        pool.submit(lambda: Threads(2).map(lambda item, _slot: item, range(4))).result()
        with threadpool_limits(1, user_api="blas"):
            assert set(blas_threads()) == {1}


def test_threads_take_turns():
    threads, inside, most = Threads(2), [], []

    def work(i):
        with threads.blas(1 + i % 2):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.001)
            assert set(blas_threads()) == {1 + i % 2}
            inside.remove(i)

    before = blas_threads()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))
    assert max(most) == 1 and blas_threads() == before


def test_a_turn_knows_who_waits_and_gives_way():
    threads, order = Threads(2), []

    def work(name):
        for _ in range(3):
            with threads.turn():
                order.append(name)
                while name == "first" and len(order) == 1 and not npllama.threads._turn.waiting:
                    time.sleep(0.001)  # until the other thread waits
            threads.give_way()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, "first")
        while not order:
            time.sleep(0.001)
        pool.submit(work, "second").result(timeout=60)
        first.result(timeout=60)
    assert sorted(order) == ["first"] * 3 + ["second"] * 3
    assert not npllama.threads._turn.waiting


def test_generations_in_several_threads_are_what_they_are_alone(monkeypatch):
    monkeypatch.setattr("npllama.generation.TURN", 0.001)
    llama = make_llama(NumpyOps(Backend(threads=Threads(2))))
    prompts = [[1, 5, i] for i in range(6)]
    options = {"max_new_tokens": 20, "seed": 1, "ignore_eos": True}
    want = [llama.generate(prompt, **options).ids for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(lambda prompt: llama.generate(prompt, **options).ids, prompts))
    assert got == want


def test_forwards_of_one_thread_each_run_at_once():
    both, before = threading.Barrier(2, timeout=60), blas_threads()
    threads = Threads(1)

    def work(_):
        with threads.blas_alone():
            both.wait()  # opens only if two are inside
            assert set(blas_threads()) == {1}

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert blas_threads() == before


@pytest.mark.parametrize("first", [0, 1])
def test_contexts_of_both_kinds_that_overlap_leave_blas_as_it_was(first):
    before = blas_threads()
    contexts = [Threads(2).blas(2), Threads(1).blas_alone()]
    with ThreadPoolExecutor(1) as pool:
        one, other = contexts[first], contexts[1 - first]
        pool.submit(one.__enter__).result()
        other.__enter__()
        pool.submit(one.__exit__, None, None, None).result()
        other.__exit__(None, None, None)
    assert blas_threads() == before


@pytest.mark.parametrize("context", [Threads(2).blas(1), Threads(1).blas_alone()])
def test_an_interrupted_context_leaves_blas_as_it_was(monkeypatch, context):
    before, right = blas_threads(), npllama.threads._set_blas

    def interrupted(numbers):
        right(numbers)
        monkeypatch.setattr(npllama.threads, "_set_blas", right)
        raise KeyboardInterrupt

    monkeypatch.setattr(npllama.threads, "_set_blas", interrupted)
    with pytest.raises(KeyboardInterrupt), context:
        pass
    assert blas_threads() == before
    assert npllama.threads._n_inside == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_forks_while_another_thread_computes_hang_nobody():
    """The fork handler of OpenBLAS waits forever for a product that is running."""
    code = (
        "import os, threading\n"
        "import numpy as np\n"
        "from npllama.backend import Backend\n"
        "from npllama.ops import NumpyOps\n"
        "from npllama.parameters import Matrix\n"
        "from npllama.threads import Threads\n"
        "ops = NumpyOps(Backend(threads=Threads(2)))\n"
        "w = Matrix(np.ones((900, 700), dtype='float32'))\n"
        "done = threading.Event()\n"
        "def compute(n_rows):\n"
        "    x = np.ones((1, n_rows, 700), dtype='float32')\n"
        "    with ops.forward_context(n_rows): return (ops.linear(x, w) == 700).all()\n"
        "def go_on():\n"
        "    while not done.is_set(): assert compute(30) and compute(100)\n"
        "compute(1)\n"
        "other = threading.Thread(target=go_on)\n"
        "other.start()\n"
        "for _ in range(30):\n"
        "    pid = os.fork()\n"
        "    if not pid: os._exit(not (compute(30) and compute(100)))\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "done.set()\n"
        "other.join()\n"
    )
    run_script(code)


def test_a_fork_has_locks_of_its_own():
    code = (
        "import os\n"
        "from npllama.threads import Threads\n"
        "threads = Threads(2)\n"
        "with threads.blas(1):\n"
        "    pid = os.fork()\n"
        "    with threads.blas(2), threads.blas_alone(): pass\n"
        "with threads.blas(2): pass\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
    )
    run_script(code)


def test_a_map_within_a_map_is_computed_by_the_thread_that_asks():
    threads = Threads(2)
    inner = threads.map(
        lambda item, _slot: threads.map(lambda x, slot: (item * x, slot), range(3)), range(4)
    )
    assert inner == [[(item * x, 0) for x in range(3)] for item in range(4)]


@pytest.mark.parametrize("failing", [0, 1, 5])
def test_an_error_reaches_the_caller_when_no_thread_computes_any_more(failing):
    threads = Threads(2)
    running = []

    def work(item, _slot):
        running.append(item)
        if item == failing:
            raise KeyError(item)
        time.sleep(0.01)
        running.remove(item)

    with pytest.raises(KeyError):
        threads.map(work, range(8))
    assert running == [failing]
    assert threads.map(lambda item, _slot: item, range(3)) == [0, 1, 2]


def test_fixed_and_never_more_than_blas_may_use():
    assert (Threads(3).most, Threads(3).count) == (3, 3)
    code = "from npllama.threads import Threads; print(Threads().most)"
    out = subprocess.run(
        [sys.executable, "-c", "import numpy; " + code],
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "1\n"


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
def test_the_number_follows_what_other_programs_leave_free(monkeypatch):
    monkeypatch.setattr(npllama.threads, "_INTERVAL", 0.1)
    n = min(usable_cores(), 4)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        while any(process_seconds(process.pid) < 0.02 for process in busy):
            time.sleep(0.01)
        threads = Threads()
        assert threads.count < threads.most or threads.most == 1
        for _ in range(3):
            time.sleep(0.15)
            assert threads.count <= max(1, usable_cores() - n + 1)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_what_helpers_and_this_process_compute_is_not_somebody_elses(monkeypatch):
    """The busy time of all cores increases by the work of this process and its helper."""
    monkeypatch.setattr(npllama.threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(npllama.threads, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(npllama.threads, "_others_running", lambda helpers: 0)
    seconds = {"all": 10.0, "helper": 3.0, "now": 100.0, "own": 5.0}
    monkeypatch.setattr(npllama.threads, "busy_seconds", lambda: seconds["all"])
    monkeypatch.setattr(npllama.threads, "process_seconds", lambda pid: seconds["helper"])
    monkeypatch.setattr(npllama.threads.time, "process_time", lambda: seconds["own"])
    monkeypatch.setattr(npllama.threads.time, "monotonic", lambda: seconds["now"])
    free = npllama.threads._FreeCores([7])
    for name, more in (("all", 1.5), ("helper", 0.5), ("own", 1.0), ("now", 0.5)):
        seconds[name] += more
    assert free.count() == 4
    seconds["all"] += 1.0  # in half a second, another program used two cores
    seconds["now"] += 0.5
    assert free.count() == 2
    seconds["all"] += 5.0
    seconds["now"] += 0.5
    assert free.count() == 1


def test_what_runs_on_cores_that_this_process_may_not_use_takes_none_from_it(monkeypatch):
    monkeypatch.setattr(npllama.threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for others, free in ((8, 4), (60, 4), (62, 2), (200, 1)):
        monkeypatch.setattr(npllama.threads, "_others_running", lambda helpers, n=others: n)
        assert npllama.threads._FreeCores([])._count == free


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_computes_by_itself():
    code = (
        "import os\n"
        "from npllama.threads import Threads\n"
        "threads = Threads(2)\n"
        "work = lambda item, slot: item + 1\n"
        "threads.map(work, range(9))\n"
        "pid = os.fork()\n"
        "assert threads.map(work, range(9)) == list(range(1, 10))\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
    )
    run_script(code)


def test_results_do_not_depend_on_how_many_threads_are_free(monkeypatch, rng):
    x = rng.standard_normal((1, 200, 300), dtype="float32")
    w = Matrix(rng.standard_normal((500, 300), dtype="float32"))
    got = []
    for free in (1, 2):
        threads = Threads(2)
        monkeypatch.setattr(Threads, "count", property(lambda self, free=free: free))
        got.append(NumpyOps(Backend(threads=threads)).linear(x, w))
    assert np.array_equal(*got)
