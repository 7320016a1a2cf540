"""Memory, cores and processes, as the operating system reports them.

psutil provides most values on Linux, macOS and Windows. This module reads what psutil lacks: the
limits of a control group and, on Linux, the peak memory of this process and its running threads.
"""

import os
import platform
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


def free_bytes() -> int | None:
    """Bytes that can be allocated without swapping: the smaller of the machine's available memory
    and what is left in the control group. None if the system reports neither."""
    known = [n for n in (_available_bytes(), _control_group_bytes()) if n is not None]
    return min(known) if known else None


def peak_bytes() -> int | None:
    """Peak memory: this process's own peak, or what it and its descendants hold now if that is
    more. Descendants count because worker processes read parts of the weights that this process
    never reads. None if the system does not report it."""
    known = [n for n in (_own_peak(), resident_bytes()) if n is not None]
    return max(known) if known else None


def resident_bytes(pid: int | None = None) -> int | None:
    """Bytes of memory of a process and all its descendants; None if the system does not report it.

    On Linux this is the sum of proportional set sizes: a page that n processes share counts 1/n in
    each of them, so once in total. On other systems a shared page counts once per process. Pages
    of a memory-mapped file count once they have been read.

    Args:
        pid: the process; None for this one.
    """
    import psutil  # here, so that --help starts fast

    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True)
    except (psutil.Error, OSError):
        return None
    total = _held_bytes(process)
    if total is None:
        return None
    return total + sum(_held_bytes(child) or 0 for child in children)  # 0 if it has just ended


def usable_cores() -> int:
    """Number of cores this process may use, by its affinity and its container's CPU quota."""
    cores = len(allowed_cores())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or the quota is "max"
        pass
    return cores


def allowed_cores() -> list[int]:
    """Indices of the cores that this process is allowed to run on."""
    import psutil

    try:
        return _process(os.getpid()).cpu_affinity()
    except (AttributeError, psutil.Error, OSError):  # AttributeError: macOS has no affinity
        return list(range(os.cpu_count() or 1))


def busy_seconds() -> float | None:
    """CPU time in seconds that the allowed cores have spent computing since boot; None if
    unknown."""
    import psutil

    try:
        times = psutil.cpu_times(percpu=True)
    except (psutil.Error, OSError):
        return None
    return sum(  # a container may hide some cores
        getattr(times[i], kind, 0.0)
        for i in allowed_cores()
        if i < len(times)
        for kind in ("user", "nice", "system", "irq", "softirq")
    )


def process_seconds(pid: int) -> float:
    """CPU time of a process in seconds; 0 if the process has ended."""
    import psutil

    try:
        times = _process(pid).cpu_times()
    except (psutil.Error, OSError):
        return 0.0
    return times.user + times.system


def running_threads(pid: int | None = None) -> int:
    """Number of running threads, including threads that busy-wait. 0 on systems other than Linux.

    Args:
        pid: the process; None for all processes of the machine.
    """
    if pid is None:
        found = re.search(r"^procs_running (\d+)", _text("/proc/stat"), re.MULTILINE)
        return int(found[1]) if found else 0
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return sum(_text(thread).rpartition(")")[2].split()[:1] == ["R"] for thread in threads)


def processor_name() -> str:
    """Model name of the processor."""
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


@lru_cache(maxsize=64)
def _process(pid: int) -> "psutil.Process":
    """Cached, because creating the object takes longer than a query. The pid is the key, so that
    a forked child gets an object of its own."""
    import psutil

    return psutil.Process(pid)


def _available_bytes() -> int | None:
    import psutil

    try:
        return psutil.virtual_memory().available
    except (psutil.Error, OSError):
        return None


def _control_group_bytes() -> int | None:
    """Bytes left under a container's limit (cgroup v2, then v1). Page cache counts as free, except
    its shared memory, which holds converted weights."""
    for folder, limit_file, usage_file in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = (Path(folder) / limit_file).read_text().strip()
            if limit == "max":
                return None
            used = int((Path(folder) / usage_file).read_text())
            statistics = dict(
                line.split() for line in (Path(folder) / "memory.stat").read_text().splitlines()
            )
            cached = int(statistics.get("file", statistics.get("total_cache", 0)))
            shared = int(statistics.get("shmem" if "file" in statistics else "total_shmem", 0))
            return max(0, int(limit) - used + cached - shared)
        except (OSError, ValueError):
            continue
    return None


def _held_bytes(process: "psutil.Process") -> int | None:
    import psutil

    try:
        is_linux = sys.platform == "linux"  # on others the full query is slow and needs privileges
        info = process.memory_full_info() if is_linux else process.memory_info()
    except (psutil.Error, OSError):
        return None
    return getattr(info, "pss", info.rss)  # a kernel may be built without pss


def _own_peak() -> int | None:
    # On Linux, getrusage would also count the program that started this one
    if found := re.search(r"^VmHWM:\s*(\d+)", _text("/proc/self/status"), re.MULTILINE):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _text(path: str | Path) -> str:
    """Contents of a file in /proc; empty if there is none, or the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
