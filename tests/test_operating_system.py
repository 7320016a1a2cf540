"""Values from the operating system, compared with known facts about this process and its
children."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from conftest import run_script
from npllama import operating_system
from npllama.operating_system import (
    allowed_cores,
    busy_seconds,
    free_bytes,
    peak_bytes,
    process_seconds,
    resident_bytes,
    running_threads,
    usable_cores,
)

MB = 10**6

# -- memory


def test_free_memory_is_above_zero_and_within_what_is_installed():
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 16 * MB < free_bytes() <= installed


def test_peak_memory_counts_what_was_touched():
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_bytes()
    size = 60 * MB
    array = np.frombuffer(mmap.mmap(-1, size), dtype="uint8")  # memory never used before
    assert peak_bytes() < before + 0.1 * size
    array[:] = 1
    assert before + 0.9 * size < peak_bytes() < before + 1.2 * size


@pytest.mark.parametrize(
    ("own", "resident", "peak"), [(5, 7, 7), (7, 5, 7), (7, None, 7), (None, None, None)]
)
def test_peak_memory_counts_other_processes_too(monkeypatch, own, resident, peak):
    monkeypatch.setattr(operating_system, "_own_peak", lambda: own)
    monkeypatch.setattr(operating_system, "resident_bytes", lambda: resident)
    assert peak_bytes() == peak


def test_memory_is_summed_over_processes_and_shared_pages_count_once(tmp_path):
    if not os.path.exists("/proc/self/smaps_rollup"):
        pytest.skip("this system tells no proportional set sizes")
    mb = 10**6
    file = tmp_path / "shared"
    file.write_bytes(b"x" * (64 * mb))
    code = (
        "import mmap, sys; own = b'x' * 64_000_000; file = open(sys.argv[1], 'r+b'); "
        "shared = mmap.mmap(file.fileno(), 0); "
        "total = sum(shared[::4096]); print('ready', flush=True); sys.stdin.read()"
    )
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as shared:
        before = resident_bytes()
        assert sum(shared[::4096]) > 0
        command = [sys.executable, "-c", code, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            more = resident_bytes() - before
            of_child = resident_bytes(child.pid)
            child.stdin.close()
    assert 126 * mb < more < 160 * mb  # 64 of its own, 64 shared, and an interpreter
    assert 94 * mb < of_child < 128 * mb  # half of the shared memory counts


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with the given available memory and control group files."""
    monkeypatch.setattr(operating_system, "Path", lambda path: tmp_path / str(path).lstrip("/"))

    def write(available, **files):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        for name, text in files.items():
            path = tmp_path / FILES[name]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text) + "\n")

    return write


FILES = {
    "cpu_max": "sys/fs/cgroup/cpu.max",
    "v2_max": "sys/fs/cgroup/memory.max",
    "v2_current": "sys/fs/cgroup/memory.current",
    "v2_stat": "sys/fs/cgroup/memory.stat",
    "v1_limit": "sys/fs/cgroup/memory/memory.limit_in_bytes",
    "v1_usage": "sys/fs/cgroup/memory/memory.usage_in_bytes",
    "v1_stat": "sys/fs/cgroup/memory/memory.stat",
}


def cgroup_v2(limit, used, cached, shared=0):
    return {
        "v2_max": limit,
        "v2_current": used,
        "v2_stat": f"anon 12345\nfile {cached}\nkernel 7\nshmem {shared}",
    }


def cgroup_v1(limit, used, cached, shared=0):
    statistics = f"cache 3\nshmem 1\ntotal_cache {cached}\ntotal_shmem {shared}"
    return {"v1_limit": limit, "v1_usage": used, "v1_stat": statistics}


AVAILABLE = 800 * MB


@pytest.mark.parametrize("cgroup", [cgroup_v2, cgroup_v1])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "free"),
    [
        (1000 * MB, 600 * MB, 0, 400 * MB),
        (1000 * MB, 600 * MB, 100 * MB, 500 * MB),  # page cache can be freed
        (1000 * MB, 1001 * MB, 0, 0),
        (64_000 * MB, 600 * MB, 0, AVAILABLE),
        (9223372036854771712, 600 * MB, 0, AVAILABLE),  # "no limit" in version 1
    ],
)
def test_free_memory_is_the_least_of_the_machines_and_the_control_groups(
    machine, cgroup, limit, used, cached, free
):
    machine(AVAILABLE, **cgroup(limit, used, cached))
    assert free_bytes() == free


@pytest.mark.parametrize("cgroup", [cgroup_v2, cgroup_v1])
def test_shared_memory_counts_as_page_cache_and_is_not_given_back(machine, cgroup):
    machine(AVAILABLE, **cgroup(1000 * MB, 700 * MB, 650 * MB, shared=600 * MB))
    assert free_bytes() == 350 * MB


def test_without_a_limit_free_memory_is_the_machines(machine):
    machine(AVAILABLE)
    assert free_bytes() == AVAILABLE
    machine(AVAILABLE, **cgroup_v2("max", 600 * MB, 0))
    assert free_bytes() == AVAILABLE


@pytest.mark.parametrize(
    "damage", [{"v2_max": "lots"}, {"v2_current": ""}, {"v2_stat": "three words here"}]
)
def test_control_group_files_of_another_form_are_left_alone(machine, damage):
    machine(AVAILABLE, **(cgroup_v2(MB, MB, 0) | damage))
    assert free_bytes() == AVAILABLE


def test_where_nothing_is_known_nothing_is_said(monkeypatch, machine):
    machine(AVAILABLE)
    monkeypatch.undo()
    monkeypatch.setattr(psutil, "PROCFS_PATH", "/no/such/place")
    monkeypatch.setattr(operating_system, "Path", lambda path: Path("/no/such/place"))
    operating_system._process.cache_clear()
    assert free_bytes() is None and busy_seconds() is None and resident_bytes() is None
    assert process_seconds(os.getpid()) == 0 and running_threads() == 0
    assert usable_cores() == os.cpu_count()


def test_without_a_machines_figure_free_memory_is_the_control_groups(monkeypatch, machine):
    def refuse():
        raise FileNotFoundError("/proc/meminfo")

    machine(AVAILABLE, **cgroup_v2(5 * MB, 2 * MB, 0))
    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert free_bytes() == 3 * MB


# -- cores and processes


def test_a_share_of_time_leaves_fewer_cores(monkeypatch, machine, tmp_path):
    monkeypatch.setattr(operating_system, "allowed_cores", lambda: list(range(8)))
    machine(AVAILABLE)
    for text, cores in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("?", 8)):
        machine(AVAILABLE, cpu_max=text)
        assert usable_cores() == cores


def test_allowed_cores_are_those_of_the_affinity():
    assert 1 <= usable_cores() <= len(allowed_cores()) <= os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        assert set(allowed_cores()) == os.sched_getaffinity(0)


def test_a_system_without_affinities_allows_all_cores(monkeypatch):
    monkeypatch.delattr(psutil.Process, "cpu_affinity", raising=False)
    assert allowed_cores() == list(range(os.cpu_count()))


def test_busy_seconds_are_those_of_the_allowed_cores_without_what_is_idle(monkeypatch):
    times = [
        SimpleNamespace(user=10**i, nice=2 * 10**i, system=3 * 10**i, idle=5, iowait=7, steal=8)
        for i in range(3)
    ]
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: times)
    for cores, seconds in (([0], 6), ([0, 2], 606), ([1, 9], 60)):  # core 9 is not listed
        monkeypatch.setattr(operating_system, "allowed_cores", lambda cores=cores: cores)
        assert busy_seconds() == seconds


def test_a_process_has_seconds_and_running_threads_until_it_ends():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        until = time.monotonic() + 60
        while process_seconds(busy.pid) < 0.05 and time.monotonic() < until:
            time.sleep(0.01)
        assert process_seconds(busy.pid) >= 0.05
        if sys.platform == "linux":
            assert running_threads(busy.pid) == 1 and running_threads() >= 1
        busy.kill()
    assert process_seconds(busy.pid) == 0 and running_threads(busy.pid) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which threads run")
def test_a_thread_that_waits_does_not_run():
    code = "import threading; threading.Thread(target=input).start(); input(); "
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as waiting:
        until = time.monotonic() + 60
        tasks = Path(f"/proc/{waiting.pid}/task")
        while len(list(tasks.iterdir())) < 2 or running_threads(waiting.pid) > 0:
            assert time.monotonic() < until
            time.sleep(0.001)
        waiting.communicate(b"a\nb\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_asks_for_itself():
    code = (
        "import os\n"
        "from npllama.operating_system import process_seconds\n"
        "while process_seconds(os.getpid()) < 0.1: pass\n"
        "pid = os.fork()\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\n"
        "else: os._exit(process_seconds(os.getpid()) >= 0.1)\n"
    )
    run_script(code)


def test_the_processor_has_a_name():
    assert operating_system.processor_name().strip()
