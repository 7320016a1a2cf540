"""Records the arguments and results of an ops object's methods while a block of code runs."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from npllama.ops import Ops


@dataclass(frozen=True)
class Call:
    """One call of a method: its name, its positional arguments, and its result."""

    name: str
    args: tuple[Any, ...]
    result: Any


class Calls(list[Call]):
    """Calls in the order of their returns."""

    def named(self, name: str) -> list[Call]:
        """The calls of one method, in the same order."""
        return [call for call in self if call.name == name]


@contextmanager
def recorded(ops: Ops, names: Collection[str]) -> Iterator[Calls]:
    """Record each call of the named methods of `ops` while the block runs, including calls from
    other methods.

    `ops` must be an `Ops`, the reference: an override may reuse the memory of its arguments.
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
