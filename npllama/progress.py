"""How far long work has come, told to whoever listens.

    with on_progress(lambda work: print(work.what, work.done / work.total)):
        llama = npllama.load("llama-2-7b", dtype="int8")
        llama.generate(long_prompt)

What takes long opens a `work`, and what it calls `advance`s it. Without a listener nothing is
told. A listener is one of its thread (or asyncio task), and is called in it, so it has to be fast.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(eq=False)
class Work:
    """Work under way.

    Attributes:
        what: what is done, as "reading the prompt".
        total: all of it, in a unit of its own.
        done: how much of it is done; 0 when a listener first hears of it.
        is_over: it has ended, by an error or Ctrl-C perhaps.
    """

    what: str
    total: int
    listener: Callable[["Work"], None] | None = None
    done: int = 0
    is_over: bool = False

    def advance(self, n: int) -> None:
        """`n` more units are done."""
        self.reach(self.done + n)

    def reach(self, done: int) -> None:
        """`done` units of the total are done, at least."""
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
    """Call `listener(work)` when work begins, as it goes on, and when it is over; None: nobody."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def work(what: str, total: int) -> Iterator[Work]:
    """Work of `total` units; inside other work it is a part of that, whose units are the same."""
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
    """`n` more units of the work under way, if there is any, are done."""
    begun = _work.get()
    if begun is not None:
        begun.advance(n)
