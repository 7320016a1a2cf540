"""What the operating system says of memory, cores and processes.

psutil knows it on Linux, macOS and Windows. What psutil lacks is read here: the limits of a
control group and, on Linux, this process's own peak and the threads that run.
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
    """Bytes that can be allocated without swapping: the least of what the machine has and what
    the control group leaves. None where the system does not say."""
    known = [n for n in (_available_bytes(), _control_group_bytes()) if n is not None]
    return min(known) if known else None


def peak_bytes() -> int | None:
    """The most memory that was seen: this process's own peak, or what it and its descendants
    hold now, if that is more. Worker processes read parts of the weights that this process never
    reads. None where the system does not say."""
    known = [n for n in (_own_peak(), resident_bytes()) if n is not None]
    return max(known) if known else None


def resident_bytes(pid: int | None = None) -> int | None:
    """Bytes of memory of a process and all its descendants, or None where the system won't say.

    The sum of their proportional set sizes (Linux): a page that n processes share counts 1/n in
    each, so once in all. Elsewhere a shared page counts in each process. Pages of a memory-mapped
    file count when they have been read.

    Args:
        pid: None for this process.
    """
    import psutil  # when first needed, not at --help

    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True)
    except (psutil.Error, OSError):
        return None
    total = _held_bytes(process)
    if total is None:
        return None
    return total + sum(_held_bytes(child) or 0 for child in children)  # 0: it has just ended


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's share of time."""
    cores = len(allowed_cores())
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return cores


def allowed_cores() -> list[int]:
    """The numbers of the cores that this process is allowed to run on."""
    import psutil

    try:
        return _process(os.getpid()).cpu_affinity()
    except (AttributeError, psutil.Error, OSError):  # AttributeError: macOS has no affinity
        return list(range(os.cpu_count() or 1))


def busy_seconds() -> float | None:
    """Seconds that the allowed cores have computed since the machine began; None if unknown."""
    import psutil

    try:
        times = psutil.cpu_times(percpu=True)
    except (psutil.Error, OSError):
        return None
    return sum(  # a container may hide some
        getattr(times[i], kind, 0.0)
        for i in allowed_cores()
        if i < len(times)
        for kind in ("user", "nice", "system", "irq", "softirq")
    )


def process_seconds(pid: int) -> float:
    """Seconds that a process has computed; 0 where it has ended."""
    import psutil

    try:
        times = _process(pid).cpu_times()
    except (psutil.Error, OSError):
        return 0.0
    return times.user + times.system


def running_threads(pid: int | None = None) -> int:
    """Threads of a process that run now, those that wait in a loop included; 0 off Linux.

    Args:
        pid: None for all processes of the machine.
    """
    if pid is None:
        found = re.search(r"^procs_running (\d+)", _text("/proc/stat"), re.MULTILINE)
        return int(found[1]) if found else 0
    threads = Path(f"/proc/{pid}/task").glob("*/stat")
    return sum(_text(thread).rpartition(")")[2].split()[:1] == ["R"] for thread in threads)


def processor_name() -> str:
    """The processor's model."""
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


@lru_cache(maxsize=64)
def _process(pid: int) -> "psutil.Process":
    """Kept, since making one takes longer than asking it; by number, which a fork changes."""
    import psutil

    return psutil.Process(pid)


def _available_bytes() -> int | None:
    import psutil

    try:
        return psutil.virtual_memory().available
    except (psutil.Error, OSError):
        return None


def _control_group_bytes() -> int | None:
    """Bytes left under a container's limit (cgroup v2, then v1); page cache counts as free, but not
    what of it is shared memory, as converted weights are."""
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
        is_linux = sys.platform == "linux"  # elsewhere it is slow, and asks for more rights
        info = process.memory_full_info() if is_linux else process.memory_info()
    except (psutil.Error, OSError):
        return None
    return getattr(info, "pss", info.rss)  # a kernel may be built without the former


def _own_peak() -> int | None:
    # not getrusage's on Linux, which counts the program that started this one
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
    """A file of /proc; empty where there is none, or the process has ended."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
