"""What `Llama.stream` returns: the pieces of a text, and the completion that they add up to."""

from collections.abc import Iterator

from npllama.completion import Completion
from npllama.generation import Generation


class TextStream(Iterator[str]):
    """Iterates over a generation of one row: its text in pieces, none of them empty.

    Attributes:
        completion: finish reason, log-probabilities, timings and all else that is known of the
            text once the stream has ended: by itself, by `close`, by Ctrl-C or by an error. None
            until then. After the last three its finish reason is "interrupted", and its text has
            what was held back because it might have become a stop text or half a character.
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
        """End it here, if it has not ended, and leave the cache to others."""
        self._steps.close()
        if self.completion is None:
            self.completion = self._generation.completions()[0]

    def __repr__(self) -> str:
        state = "runs" if self.completion is None else f"ended: {self.completion!r}"
        return f"<TextStream {state}>"
