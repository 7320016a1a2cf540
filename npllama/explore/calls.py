"""What the methods of an ops object are given and return while a block of code runs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from npllama.ops import Ops


@dataclass(frozen=True)
class Call:
    """One call of a method: its name, its positional arguments, and what it returned."""

    name: str
    args: tuple[Any, ...]
    result: Any


class Calls(list[Call]):
    """Calls in the order in which they returned."""

    def named(self, name: str) -> list[Call]:
        """The calls of one method, the first one first."""
        return [call for call in self if call.name == name]


@contextmanager
def recorded(ops: Ops, names: Collection[str]) -> Iterator[Calls]:
    """Each call of these methods of `ops` is kept while the block runs, calls by others of its
    methods included.

    `ops` must be the reference, `Ops` itself: an override may reuse the memory of its arguments.
    """
    calls = Calls()

    def kept(name: str, method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            calls.append(Call(name, args, result))
            return result

        return call

    try:
        for name in names:
            setattr(ops, name, kept(name, getattr(ops, name)))
        yield calls
    finally:
        for name in names:
            vars(ops).pop(name, None)
