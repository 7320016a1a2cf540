"""The result of `Llama.stream`: an iterator over pieces of text that ends with a Completion."""

from collections.abc import Iterator

from npllama.completion import Completion
from npllama.generation import Generation


class TextStream(Iterator[str]):
    """Iterates over the text of a generation with one row. No piece is empty.

    Attributes:
        completion: the Completion, as soon as the stream has ended; None before. If `close`, Ctrl-C
            or an error ended the stream early, the finish reason is "interrupted". The text of this
            completion also contains text that the stream had delayed: the start of a possible stop
            text, or an incomplete character.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._steps = iter(generation)
        self.completion: Completion | None = None

    def __next__(self) -> str:
        try:
            for _row, text in self._steps:
                if text:
                    return text
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """End the stream if it has not ended, and release the cache."""
        self._steps.close()
        if self.completion is None:
            self.completion = self._generation.completions()[0]

    def __repr__(self) -> str:
        state = "runs" if self.completion is None else f"ended: {self.completion!r}"
        return f"<TextStream {state}>"
