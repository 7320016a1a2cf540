"""Reports the progress of long work to a listener.

    with on_progress(lambda work: print(work.what, work.done / work.total)):
        llama = npllama.load("llama-2-7b", dtype="int8")
        llama.generate(long_prompt)

A function that may take long opens a `work`; the functions it calls report progress by `advance`.
A listener belongs to one thread (or asyncio task) and is called in it, so it should return
quickly. Without a listener, nothing is reported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(eq=False)
class Work:
    """Long work in progress.

    Attributes:
        what: a description, such as "reading the prompt".
        total: the size of the work, in any unit.
        done: how much of the total is done; 0 at the listener's first call.
        is_over: whether the work has ended, possibly by an error or Ctrl-C.
    """

    what: str
    total: int
    listener: Callable[["Work"], None] | None = None
    done: int = 0
    is_over: bool = False

    def advance(self, n: int) -> None:
        """Report `n` more units as done."""
        self.reach(self.done + n)

    def reach(self, done: int) -> None:
        """Report at least `done` units of the total as done."""
        self.done = min(max(self.done, done), self.total)
        self.tell()

    def tell(self) -> None:
        if self.listener is not None:
            self.listener(self)


Listener = Callable[[Work], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_work: ContextVar[Work | None] = ContextVar("work", default=None)


@contextmanager
def on_progress(listener: Listener | None) -> Iterator[None]:
    """Call `listener(work)` when work begins, advances and ends. None disables reporting."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def work(what: str, total: int) -> Iterator[Work]:
    """Report work of `total` units. Nested inside other work, it counts towards the outer work,
    which must have the same unit."""
    outer = _work.get()
    if outer is not None:
        yield outer
        return
    begun = Work(what, total, _listener.get())
    token = _work.set(begun)
    try:
        begun.tell()
        yield begun
    finally:
        _work.reset(token)
        begun.is_over = True
        begun.tell()


def advance(n: int) -> None:
    """Report `n` more units of the current work as done, if there is any."""
    begun = _work.get()
    if begun is not None:
        begun.advance(n)
