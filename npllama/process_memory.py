"""Memory that this process and its child processes hold, as the operating system counts it."""

import sys
from pathlib import Path


def peak_bytes() -> int | None:
    """The most memory that was seen: this process's own peak, or what it and its descendants
    hold now, if that is more. Worker processes read parts of the weights that this process never
    reads. None where the system does not say."""
    known = [n for n in (_own_peak(), resident_bytes()) if n is not None]
    return max(known) if known else None


def resident_bytes(pid: int | str = "self") -> int | None:
    """Bytes of memory of a process and all its descendants, or None where the system won't say.

    The sum of their proportional set sizes (Linux): a page that n processes share counts 1/n in
    each, so once in all. Pages of a memory-mapped file count when they have been read.
    """
    total = _proportional_set_size(pid)
    if total is None:
        return None
    for child in _children(pid):
        total += resident_bytes(child) or 0  # one that has just ended holds nothing
    return total


def _own_peak() -> int | None:
    kib = _field("/proc/self/status", "VmHWM:")
    if kib is not None:
        return kib * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _proportional_set_size(pid: int | str) -> int | None:
    kib = _field(f"/proc/{pid}/smaps_rollup", "Pss:")
    return None if kib is None else kib * 1024


def _field(path: str, name: str) -> int | None:
    """The number after `name` in a file of /proc."""
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _children(pid: int | str) -> list[str]:
    children: list[str] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += path.read_text().split()
        except OSError:  # the thread has just ended
            continue
    return children
