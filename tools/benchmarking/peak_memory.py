"""Peak memory of a process and its children."""

import threading
from types import TracebackType

from npllama.operating_system import resident_bytes

_INTERVAL = 0.05


class PeakMemory:
    """Samples `resident_bytes` in a thread while the `with` block runs.

    Attributes:
        nbytes: the largest sample; None if the system does not report it.
    """

    def __init__(self, pid: int | None = None) -> None:
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
