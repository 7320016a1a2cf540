"""What npllama.chat does with a dialogue."""

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
    """A dialogue whose answers go to standard output, and notes to standard error.

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
        """Write the answer to a message to standard output as it is made.

        Raises:
            NpllamaError: there is none; the dialogue is as before.
            KeyboardInterrupt: Ctrl-C; the answer so far is in the dialogue.
        """
        self._n_again = 0
        self._answer(lambda: self.chat.stream(text))

    def answer_again(self) -> None:
        """Replace the last answer by another one.

        A seed that is set would give the same answer, so each time the next seed is used.

        Raises:
            NpllamaError, KeyboardInterrupt: as `say`; InputError also where there is no message.
        """
        self._n_again += 1
        seed = self.chat.options.get("seed")
        options = {} if seed is None else {"seed": (seed + self._n_again) % 2**64}
        self._answer(lambda: self.chat.stream_again(**options))

    def set_system(self, prompt: str | None) -> None:
        """Set the system prompt; None takes it away.

        Raises:
            InputError: the model has no place for one.
        """
        self._check_has_roles("a system prompt")
        self.chat.system = prompt

    def replace_messages(self, messages: list[dict[str, str]]) -> None:
        """Go on with another dialogue.

        Raises:
            InputError: it has a system prompt, and the model knows none.
        """
        if messages and messages[0]["role"] == "system":
            self._check_has_roles("its system prompt")
        self.chat.messages[:] = messages

    def _check_has_roles(self, what: str) -> None:
        if self.chat.chat_format is story:
            raise InputError(f"the model knows no dialogue: {what} has no place")

    def change_options(self, options: dict[str, Any]) -> None:
        """Set the options of the next answers.

        Raises:
            InputError: a value out of range.
        """
        self.check_options(options)
        self.chat.options = options

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise InputError for options that no answer could be made with."""
        bos = self.chat.llama.encode("")
        self.chat.llama.new_generation([bos], **options)

    def unescaped(self, text: str, name: str) -> str:
        """A command's text, with -e its escapes read."""
        return unescape(text, name) if self._has_escapes else text

    def print_stats(self) -> None:
        """Write to standard error how the latest answer was made.

        Raises:
            InputError: there is none.
        """
        completion, turn = self._completion, self.chat.turn
        if completion is None or turn is None:
            raise InputError("there was no answer yet: say something first")
        llama = self.chat.llama
        rows = stats(llama, completion.timings, completion.finish_reason, completion.seed)
        prompt = f"{turn.n_prompt} tokens: {turn.n_kept} kept in the cache, {turn.n_read} read"
        used = f"{self.chat.cache.lengths[0]} of {llama.context} tokens"
        if self.prompt_cache is not None:
            rows["prompt cache"] = f"{self.prompt_cache.n_kept} tokens loaded"
        print_rows({"prompt": prompt, "context used": used, **rows})

    def _answer(self, begin: Callable[[], ChatStream]) -> None:
        """Write an answer to standard output as it is made."""
        n_shown = 0
        stream = begin()
        try:
            note = self.chat.turn.note()
            if note is not None and self.chat.chat_format is not story:  # which has one turn
                tell(f"npllama: {note}")
            for piece in stream:
                show(piece)
                n_shown += len(piece)
        finally:  # after Ctrl-C too
            stream.close()
            self._completion = stream.completion
            show(stream.completion.text[n_shown:] + "\n")  # what Ctrl-C found held back
            self._note_end(stream.completion)
            if self._shows_stats:
                self.print_stats()

    def _note_end(self, completion: Completion) -> None:
        """Say where an answer ended before the model would have ended it."""
        limit = self.chat.options.get("max_new_tokens", MAX_NEW_TOKENS)
        if completion.finish_reason == "interrupted" and not completion.ids:
            tell("npllama: no answer had begun: the dialogue is as before")
        elif completion.finish_reason != "length" or limit == 0:
            return
        elif completion.new_tokens < limit:
            context = self.chat.llama.context
            tell(f"npllama: the answer ends here because the context of {context} tokens is full")
        else:
            tell(
                f"npllama: the answer ends here because it has {limit} tokens (--max-new-tokens, "
                "/set max-new-tokens)"
            )
