"""The most memory that a process and its children hold at once."""

import threading
from pathlib import Path
from types import TracebackType

_INTERVAL = 0.05


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


class PeakMemory:
    """Samples `resident_bytes` from a thread while the `with` block runs.

    Attributes:
        nbytes: the most that was seen; None where the system won't say.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self.nbytes: int | None = None
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        now = resident_bytes(self._pid)
        if now is not None:
            self.nbytes = max(now, self.nbytes or 0)


def _proportional_set_size(pid: int | str) -> int | None:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
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
