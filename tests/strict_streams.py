"""Streams, events and graphs of the CuPy for tests.

All work is executed when it is queued, in the order of the calls. Uses of memory that are correct
only in this order, and not on a GPU, raise an error: memory that two streams use without a
synchronization, and memory that a graph no longer owns. A copy to the host is made only when the
host waits for it.
"""

import weakref
from dataclasses import dataclass, field

import numpy as np

from strict_memory import CUDARuntimeError, Held, pinned_memory_of, poison


@dataclass
class Node:
    """One operation on the device. It refers to the arrays in its arguments by address.

    `run(first_running, before, *arguments)` executes it. `first_running` is the number of the
    oldest kernel that may still be running, or 0, and `before` is the memory that other work wrote
    before that kernel. The function returns the launch number if the operation is a kernel.

    Attributes:
        written: the index of the argument that it writes; None for kernels.
    """

    run: object
    arguments: tuple
    written: int | None = None

    def __post_init__(self):
        self.arguments = tuple(map_arrays(Held, argument) for argument in self.arguments)


def map_arrays(change, value, kind=np.ndarray):
    """`value` with `change` applied to each array in its tuples, lists and dictionaries."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)([map_arrays(change, item, kind) for item in value])
    if isinstance(value, dict):
        return {key: map_arrays(change, item, kind) for key, item in value.items()}
    return value


def arrays_in(value):
    """All arrays in the tuples, lists and dictionaries of `value`."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [array for item in value for array in arrays_in(item)]


@dataclass(eq=False)
class Stream:
    """A queue of device work. CupyDevice.Stream is a subclass in which `device` is set.

    Attributes:
        clock: the number of operations queued so far.
        first_running: the number of the oldest kernel that may still be running; 0 if there is
            none. It is the first kernel after an operation of another kind, because such an
            operation waits for all earlier work.
        before: (begin, end) of the memory that this other operation wrote.
    """

    null: bool = False
    non_blocking: bool = False
    ptds: bool = False
    priority: int | None = None
    clock: int = field(default=0, init=False)
    first_running: int = field(default=0, init=False)
    before: list = field(default_factory=list, init=False)
    capture: list | None = field(default=None, init=False)

    def __post_init__(self):
        self.ptr = 0 if self.null else id(self)
        self._done = 0  # the host has waited for all work up to this clock
        self._waited = []  # (own clock, other stream, clock of the other stream)
        self._copies = []  # (clock, weak reference to the host memory, values to write)
        self._invalid = False

    def __repr__(self):
        return "the null stream" if self.null else f"stream {id(self):x}"

    # -- order

    def is_after(self, other, time):
        """Whether work queued on this stream now runs after the work of `other` up to `time`."""
        if other is self or time <= other._done:
            return True
        if any(other is stream and time <= until for _, stream, until in self._waited):
            return True
        # the null stream and blocking streams wait for each other
        null, plain = (self, other) if self.null else (other, self)
        return null.null and not plain.non_blocking

    def queue(self, node: Node):
        """Execute an operation, or record it during a capture."""
        if self.capture is not None:
            self.capture.append(node)
        else:
            self._do(node)

    def _do(self, node):
        arguments = map_arrays(Held.array, node.arguments, Held)
        first_running, before = self.first_running, self.before
        written = [] if node.written is None else arrays_in(arguments[node.written])
        self.touch(arrays_in(arguments), written)
        number = node.run(first_running, before, *arguments)
        if number:
            self.first_running, self.before = first_running or number, before

    def touch(self, arrays, written=()):
        """Record that queued work uses `arrays`, and that it writes the arrays `written`."""
        self.clock += 1
        self.first_running = 0
        self.before = [np.lib.array_utils.byte_bounds(array) for array in written]
        for array in arrays:
            self.device.uses.touch(array, self)

    # -- synchronization with the host

    def synchronize(self):
        self.wait_until(self.clock, "synchronize")

    @property
    def done(self):
        if self.capture is not None:
            self._invalid = True  # CuPy returns False and invalidates the capture
            return False
        self.synchronize()
        return True

    def wait_until(self, time, what):
        self.refuse_while_capturing(what)
        if time <= self._done:
            return
        self._done = time
        for clock, stream, until in self._waited:
            if clock <= time:
                stream.wait_until(until, what)
        done = [copy for copy in self._copies if copy[0] <= time]
        self._copies = [copy for copy in self._copies if copy[0] > time]
        for _clock, memory, values in done:
            if memory() is None:
                raise CUDARuntimeError(
                    "pinned memory was freed before a copy to it was done: CuPy hands it out "
                    "again, and the copy writes over what is there then"
                )
            np.frombuffer(memory(), values.dtype, values.size)[:] = values.ravel()

    def refuse_while_capturing(self, what):
        if self.capture is not None:
            self._invalid = True
            raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} while capturing")

    def copy_to_host(self, array, out):
        """Queue a copy to pinned memory, which contains bytes 0xFF until the host has waited for
        it."""
        if pinned_memory_of(out) is None:
            raise CUDARuntimeError("a copy that does not block needs pinned memory")
        if not out.flags.c_contiguous or (out.shape, out.dtype) != (array.shape, array.dtype):
            raise ValueError(
                f"out is {out.dtype} {out.shape}: expected contiguous {array.dtype} {array.shape}"
            )
        self.touch([array])
        self._copies.append((self.clock, weakref.ref(pinned_memory_of(out)), array.copy()))
        poison(out)

    # -- the current stream

    def __enter__(self):
        self.device.stack.append(self)
        return self

    def __exit__(self, *_):
        self.device.stack.pop()

    def use(self):
        self.device.stack[-1] = self
        return self

    # -- events

    def record(self, event=None):
        event = event or Event()
        event.at = (self, self.clock)
        return event

    def wait_event(self, event):
        self.refuse_while_capturing("an event of another stream")  # CUDA would fork the capture
        if event.at is None:
            return
        stream, time = event.at
        self._waited.append((self.clock, stream, time))

    # -- graphs

    def is_capturing(self):
        return self.capture is not None

    def begin_capture(self, mode=None):
        if self.null:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: already capturing")
        self.capture, self._invalid = [], False

    def end_capture(self):
        if self.capture is None:
            raise CUDARuntimeError("cudaErrorIllegalState: not capturing")
        nodes, self.capture = self.capture, None
        if self._invalid:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated")
        self.device.n_captures += 1
        return Graph(self.device, nodes)


class Event:
    """A point in the work of a stream."""

    def __init__(self, block=False, disable_timing=False, interprocess=False):
        self.at = None

    def record(self, stream=None):
        (stream or self.device.stream).record(self)

    def synchronize(self):
        if self.at is not None:
            stream, time = self.at
            stream.wait_until(time, "synchronize an event")

    @property
    def done(self):
        self.synchronize()
        return True


class Graph:
    """Recorded operations with recorded addresses."""

    def __init__(self, device, nodes):
        self._device, self._nodes = device, nodes

    def launch(self, stream=None):
        stream = stream or self._device.stream
        for node in self._nodes:
            stream.queue(node)

    def upload(self, stream=None):
        """Prepare the first launch. There is nothing to do here."""
