"""A session of npllama.chat: it answers messages, and writes the answers and their notes."""

from collections.abc import Callable
from typing import Any

from npllama.chat_formats import story
from npllama.completion import Completion
from npllama.console import show, tell
from npllama.conversation import Chat, ChatStream
from npllama.errors import InputError
from npllama.escapes import unescape
from npllama.llama import MAX_NEW_TOKENS
from npllama.prompt_cache_file import PromptCacheFile
from npllama.report import print_rows, stats


class Session:
    """A dialogue whose answers go to standard output, and its notes to standard error.

    Args:
        chat: the dialogue.
        shows_stats: whether statistics follow each answer, as with --stats.
        has_escapes: whether the texts of commands may hold escapes, as with -e.
        prompt_cache: the file whose cache the chat uses, if there is one.

    Attributes:
        chat, prompt_cache: the arguments.
        is_over: whether the user has left.
    """

    def __init__(
        self,
        chat: Chat,
        shows_stats: bool = False,
        has_escapes: bool = False,
        prompt_cache: PromptCacheFile | None = None,
    ) -> None:
        self.chat = chat
        self.prompt_cache = prompt_cache
        self.is_over = False
        self._shows_stats = shows_stats
        self._has_escapes = has_escapes
        self._completion: Completion | None = None
        self._n_again = 0

    def say(self, text: str) -> None:
        """Answer a message, and write the answer to standard output as it is generated.

        Raises:
            NpllamaError: the message cannot be answered; the dialogue is unchanged.
            KeyboardInterrupt: Ctrl-C; the dialogue contains the answer so far.
        """
        self._n_again = 0
        self._answer(lambda: self.chat.stream(text))

    def answer_again(self) -> None:
        """Replace the last answer by another one.

        If the options have a seed, the n-th repetition uses seed + n, because the same seed would
        give the same answer.

        Raises:
            InputError: there is no message.
            NpllamaError, KeyboardInterrupt: as `say`.
        """
        self._n_again += 1
        seed = self.chat.options.get("seed")
        options = {} if seed is None else {"seed": (seed + self._n_again) % 2**64}
        self._answer(lambda: self.chat.stream_again(**options))

    def set_system(self, prompt: str | None) -> None:
        """Set the system prompt; None removes it.

        Raises:
            InputError: the model cannot chat.
        """
        self._check_can_chat("a system prompt")
        self.chat.system = prompt

    def replace_messages(self, messages: list[dict[str, str]]) -> None:
        """Continue with another dialogue.

        Raises:
            InputError: it has a system prompt, and the model cannot chat.
        """
        if messages and messages[0]["role"] == "system":
            self._check_can_chat("the system prompt of the file")
        self.chat.messages[:] = messages

    def _check_can_chat(self, what: str) -> None:
        if self.chat.chat_format is story:
            raise InputError(f"{what} needs a chat model, and this model only continues texts")

    def change_options(self, options: dict[str, Any]) -> None:
        """Set the options of the next answers.

        Raises:
            InputError: a value is out of range.
        """
        self.chat.check_options(options)
        self.chat.options = options

    def unescaped(self, text: str, name: str) -> str:
        """The text of a command; with -e, its escapes are replaced."""
        return unescape(text, name) if self._has_escapes else text

    def print_stats(self) -> None:
        """Write the statistics of the latest answer to standard error.

        Raises:
            InputError: this session has no answer.
        """
        completion, turn = self._completion, self.chat.turn
        if completion is None or turn is None:
            raise InputError("this session has no answer yet: send a message first")
        llama = self.chat.llama
        rows = stats(llama, completion.timings, completion.finish_reason, completion.seed)
        prompt = f"{turn.n_prompt} tokens: {turn.n_kept} kept in the cache, {turn.n_read} read"
        used = f"{turn.n_prompt + completion.new_tokens} of {llama.context} tokens"
        if self.prompt_cache is not None:
            rows["prompt cache"] = f"{self.prompt_cache.n_kept} tokens loaded"
        print_rows({"prompt": prompt, "context used": used, **rows})

    def _answer(self, begin: Callable[[], ChatStream]) -> None:
        """Write an answer to standard output as it is generated."""
        n_shown = 0
        stream = begin()
        try:
            note = self.chat.turn.note()
            if note is not None and self.chat.chat_format is not story:  # it drops all old turns
                tell(f"npllama: {note}")
            for piece in stream:
                n_shown += len(piece)  # first: Ctrl-C within `show` must not show it twice
                show(piece)
        finally:  # after Ctrl-C too
            stream.close()
            self._completion = stream.completion
            show(stream.completion.text[n_shown:] + "\n")  # the text that the stream held back
            self._note_end(stream.completion)
            if self._shows_stats:
                self.print_stats()

    def _note_end(self, completion: Completion) -> None:
        """Write a note if an answer ended before the model ended it."""
        limit = self.chat.options.get("max_new_tokens", MAX_NEW_TOKENS)
        if completion.finish_reason == "interrupted" and not completion.ids:
            tell("npllama: the answer had not begun, and the dialogue is unchanged")
        elif completion.finish_reason != "length":
            return
        elif completion.new_tokens < limit:
            context = self.chat.llama.context
            tell(f"npllama: the answer ends because the context of {context} tokens is full")
        else:
            tell(
                f"npllama: the answer ends at the limit of {limit} tokens (--max-new-tokens, "
                "/set max-new-tokens)"
                + ("" if completion.ids else ", and the dialogue is unchanged")
            )
