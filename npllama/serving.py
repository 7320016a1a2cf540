"""Server: decodes the requests of many threads together on one model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from npllama.backend import Array
from npllama.completion import Completion, Timings
from npllama.errors import InputError
from npllama.generation import Generation
from npllama.row import Row
from npllama.sampling_options import Sampling, is_integer

if TYPE_CHECKING:
    from npllama.llama import Llama, Prompt


class Server:
    """Decodes the requests of any number of threads together. `Llama.server` returns one.

    The server runs the model in a thread of its own. Each request occupies one row of a shared
    cache from its first step to its last. If all rows are occupied, requests wait in their order of
    arrival. As with `Llama.generate`, a result depends only on the request's prompt, options and
    seed, not on other requests.

    All requests share one forward pass per step. Tokens are then chosen per group of requests with
    equal `Sampling`, so a large number of different samplings costs some time.

    Args:
        llama: the model.
        n_tokens, allowed: the ids that may be chosen; see Generation.
        batch_size: maximum number of requests that are decoded together.
        context: positions per request, prompt and completion together; None is the model's context.


    >>> import npllama
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> llama = npllama.load()
    >>> prompts = ["Once upon a time", "The cat", "A big dog", "Lily"]
    >>> with llama.server(batch_size=4) as server, ThreadPoolExecutor(4) as threads:
    ...     texts = list(threads.map(
    ...         lambda prompt: server.generate(prompt, max_new_tokens=8, seed=1).text, prompts))
    ...     pieces = list(server.stream("Tom", max_new_tokens=8, temperature=0))
    >>> texts == [llama.generate(prompt, max_new_tokens=8, seed=1).text for prompt in prompts]
    True
    >>> "".join(pieces) == llama.generate("Tom", max_new_tokens=8, temperature=0).text
    True
    """

    def __init__(
        self,
        llama: "Llama",
        n_tokens: int,
        allowed: Array | None,
        batch_size: int,
        context: int | None,
    ) -> None:
        if not is_integer(batch_size) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: expected a whole number from 1")
        self._llama = llama
        self._choosable = n_tokens, allowed
        context = llama.context if context is None else context
        llama.check_memory(batch_size, min(context, llama.context))
        self._cache = llama.new_cache(batch_size, context)
        self._waiting: deque[Row] = deque()
        self._requests: dict[Row, _Request] = {}
        self._is_closed = self._is_cancelled = False
        self._changed = threading.Condition()  # guards the fields above
        self._thread = threading.Thread(target=self._serve, name="npllama server", daemon=True)
        self._thread.start()

    def generate(self, prompt: "Prompt | None" = "", **options: Any) -> Completion:
        """Like `Llama.generate`, with the same options except cache and batch_size.

        Raises:
            InputError, TokenizerError, TypeError: as `Llama.generate`, or the server is closed.
        """
        request = self._submit(prompt, options, is_streamed=False)
        try:
            return request.result()
        finally:
            request.leave()

    def stream(self, prompt: "Prompt | None" = "", **options: Any) -> "Stream":
        """Iterate over pieces of the text as soon as they are certain, like `Llama.stream`.

        Closing or dropping the iterator early ends the request and frees its row.
        """
        self._llama.encode("")  # raises the error for a missing tokenizer
        return Stream(self._submit(prompt, options, is_streamed=True))

    def close(self, cancel: bool = False) -> None:
        """Refuse new requests, and return when all accepted ones have ended.

        Args:
            cancel: end the accepted requests at once, with finish reason "interrupted".
        """
        with self._changed:
            self._is_closed = True
            self._is_cancelled = self._is_cancelled or cancel
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(cancel=error is not None)

    def _submit(
        self, prompt: "Prompt | None", options: dict[str, Any], is_streamed: bool
    ) -> "_Request":
        """Check a request in the caller's thread, and queue it."""
        for name in ("cache", "batch_size"):
            if options.get(name) is not None:
                raise InputError(
                    f"{name} was given with a request: leave it out, the server has its own"
                )
        prompt = "" if prompt is None else prompt
        generation = self._llama.new_generation([prompt], **options)  # only checks; is not run
        (row,), room = generation.rows, self._cache.context
        if len(row.prompt_ids) > room:
            raise InputError(
                f"the prompt has {len(row.prompt_ids)} tokens: expected at most {room}, the "
                "server's context"
            )
        row.limit = min(row.limit, room - len(row.prompt_ids))
        if row.limit == 0:
            row.finish_reason = "length"
        request = _Request(row, is_streamed, self._forget)
        with self._changed:
            if self._is_closed:
                raise InputError("the server is closed: create another one")
            self._requests[row] = request
            if row.finish_reason is None:
                self._waiting.append(row)
                self._changed.notify_all()
            else:
                self._end(row)
        return request

    def _forget(self, row: Row) -> None:
        """Drop a request whose caller has left; its remaining text is discarded."""
        with self._changed:
            if self._requests.pop(row, None) is not None:
                row.finish_reason = row.finish_reason or "interrupted"  # this frees its cache row

    def _end(self, row: Row) -> None:
        request = self._requests.pop(row, None)
        if request is not None:
            request.end()

    def _serve(self) -> None:
        """Run the server's thread: decode while there are requests."""
        error: BaseException | None = None
        try:
            self._llama.backend.use()
            while self._await_requests():
                try:
                    self._decode()
                    for row in range(len(self._cache.lengths)):
                        self._cache.truncate(row, 0)
                except Exception as failed:  # fails all requests of the step, not the server
                    self._fail(failed, lambda row: row.cache_row is not None)
                    self._cache.clear()
        except BaseException as broken:  # decoding is no longer possible
            error = broken
        finally:
            self._is_closed = True
            self._fail(error or InputError("the server is closed"), lambda row: True)

    def _await_requests(self) -> bool:
        """Wait for requests. Returns False once the server is closed and none are waiting."""
        with self._changed:
            while not (self._waiting or self._is_closed):
                self._changed.wait()
            return bool(self._waiting)

    def _fail(self, error: BaseException, fails: Callable[[Row], bool]) -> None:
        """End the requests for which `fails` is true, with an error that they did not cause."""
        with self._changed:
            for row in [row for row in self._requests if fails(row)]:
                row.finish_reason, row.error = "error", error
                self._end(row)

    def _decode(self) -> None:
        """Decode until all requests have ended."""
        llama = self._llama
        generation = Generation(
            llama, [], Sampling(), 0, *self._choosable, self._cache, waiting=self._waiting
        )
        with closing(generation.turns(self._hand_on)) as turns:
            for _ in turns:
                if self._is_cancelled:
                    self._interrupt()

    def _interrupt(self) -> None:
        with self._changed:
            for row in [*self._requests]:
                self._requests[row].say(row.interrupt())
                self._end(row)

    def _hand_on(self, row: Row, text: str) -> None:
        request = self._requests.get(row)
        if request is None:  # the caller has left
            return
        request.say(text)
        if row.finish_reason is not None:
            with self._changed:
                self._end(row)


class Stream:
    """An iterator over the pieces of one request's text.

    Attributes:
        completion: what `Server.generate` would have returned; None until the iterator ends.
    """

    def __init__(self, request: "_Request") -> None:
        self._request = request
        self.completion: Completion | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self.completion is None:
            piece = self._request.next_piece()
            if piece is not None:
                return piece
            self.completion = self._request.completion()
        raise StopIteration

    def close(self) -> None:
        """End the request; its remaining tokens are not computed."""
        self._request.leave()

    def __del__(self) -> None:
        self.close()


class _Request:
    """One request: its row, and the queue from the server's thread to the caller's."""

    def __init__(self, row: Row, is_streamed: bool, forget: Callable[[Row], None]) -> None:
        self.row = row
        self._is_streamed = is_streamed
        self._forget = forget
        self._pieces: SimpleQueue[str | None] = SimpleQueue()  # None marks the end
        self._began = time.perf_counter()
        self._first = self._last = self._began

    def say(self, text: str) -> None:
        self._last = time.perf_counter()
        if len(self.row.ids) <= 1:
            self._first = self._last
        if text and self._is_streamed:  # callers of generate wake up only at the end
            self._pieces.put(text)

    def end(self) -> None:
        self._pieces.put(None)

    def leave(self) -> None:
        self._forget(self.row)

    def next_piece(self) -> str | None:
        """The next piece of text; None at the end."""
        piece = self._pieces.get()
        if piece is None and self.row.error is not None:
            raise self.row.error
        return piece

    def result(self) -> Completion:
        while self.next_piece() is not None:
            pass
        return self.completion()

    def completion(self) -> Completion:
        row = self.row
        timings = Timings(
            prompt_tokens=len(row.prompt_ids),
            new_tokens=len(row.ids),
            first_token_seconds=self._first - self._began,
            prefill_seconds=self._first - self._began,
            decode_seconds=self._last - self._first,
            decode_tokens=max(0, len(row.ids) - 1),
        )
        return row.completion(timings)
