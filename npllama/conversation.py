"""A conversation: messages, and a KV cache that follows them.

The messages are the truth. Each turn renders all of them to ids, keeps the first ids that the
cache has in common with them, and reads the rest.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from npllama.completion import Completion
from npllama.dialogue import checked_messages, encode_chat
from npllama.dialogue_parts import ChatFormat, Message
from npllama.errors import InputError
from npllama.generation import Generation
from npllama.kv_cache import KVCache
from npllama.llama import Llama
from npllama.text_stream import TextStream


@dataclass(frozen=True)
class Turn:
    """How an answer's prompt was read.

    Attributes:
        n_prompt: ids of the prompt, which is the whole dialogue.
        n_kept: its first ids, which the cache held.
        n_read: the other ids, which were read.
        n_dropped: whole old turns that were left out of the prompt from this answer on.
    """

    n_prompt: int
    n_kept: int
    n_read: int
    n_dropped: int = 0

    def note(self) -> str | None:
        """One line that says what was left out; None where nothing was."""
        if self.n_dropped == 0:
            return None
        turns = "turn does" if self.n_dropped == 1 else f"{self.n_dropped} turns do"
        return f"the context is full: the oldest {turns} not stand in the prompt any more"


class Chat:
    """A dialogue with a model, in the model's chat format.

    Args:
        llama: a chat model.
        messages: {"role": ..., "content": ...} each; copied.
        system: the system prompt; it replaces that of `messages`.
        chat_format: a name of npllama.chat_formats.FORMATS, or a format; None is the model's own.
        cache: of one row, from `llama.new_cache` (default: a new one).
        drop_old_turns: whether whole old turns are left out of the prompt where the context is
            full; False raises InputError there.
        options: keywords of `Llama.new_generation` for every answer.

    Attributes:
        messages: the dialogue. It may be edited freely while no answer runs.
        options: may be changed as well.
        turn: how the prompt of the latest answer was read.
        cache: its row holds the ids of the dialogue.
    """

    def __init__(
        self,
        llama: Llama,
        messages: Iterable[Message] = (),
        *,
        system: str | None = None,
        chat_format: str | ChatFormat | None = None,
        cache: KVCache | None = None,
        drop_old_turns: bool = True,
        **options: Any,
    ) -> None:
        self.llama = llama
        self.chat_format = llama.resolved_chat_format(chat_format)
        self.messages = checked_messages(messages)
        if system is not None:
            self.system = system
        self.options = options
        self.drop_old_turns = drop_old_turns
        self.cache = llama.new_cache() if cache is None else llama.checked_cache(cache, 1)
        self.turn: Turn | None = None
        self._stream: weakref.ref[ChatStream] | None = None

    @property
    def system(self) -> str | None:
        """The system prompt: the first message, where its role is system."""
        return self.messages[0]["content"] if self._has_system() else None

    @system.setter
    def system(self, text: str | None) -> None:
        self._check_idle()
        first = [] if text is None else [{"role": "system", "content": text}]
        self.messages[: int(self._has_system())] = first

    def _has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def stream(self, text: str, *, answer: str = "", **options: Any) -> "ChatStream":
        """Say something; the answer in pieces of text."""
        self._check_idle()
        self.messages.append({"role": "user", "content": text})
        return self._answer([self.messages[-1]], [], answer, options)

    def say(self, text: str, *, answer: str = "", **options: Any) -> Completion:
        """Say something; the whole answer."""
        stream = self.stream(text, answer=answer, **options)
        for _ in stream:
            pass
        return stream.completion

    def stream_again(self, **options: Any) -> "ChatStream":
        """Take back the last answer and answer again."""
        self._check_idle()
        at = self._last_user()
        if at is None:
            raise InputError("there is no message to answer again: say something first")
        taken_back = self.messages[at + 1 :]
        del self.messages[at + 1 :]
        return self._answer([], taken_back, "", options)

    def undo(self) -> bool:
        """Take back the last message of the user and what follows it; whether there was one."""
        self._check_idle()
        at = self._last_user()
        if at is None:
            return False
        del self.messages[at:]
        return True

    def clear(self) -> None:
        """Take back all messages but the system prompt."""
        self._check_idle()
        del self.messages[int(self._has_system()) :]

    def _last_user(self) -> int | None:
        users = (i for i, message in enumerate(self.messages) if message["role"] == "user")
        return max(users, default=None)

    def _check_idle(self) -> None:
        stream = None if self._stream is None else self._stream()
        if stream is not None and stream.completion is None:
            raise InputError(
                "the chat's last answer still runs: read its stream to the end, or close() it"
            )

    def _answer(
        self, added: list[Message], taken_back: list[Message], begun: str, options: dict[str, Any]
    ) -> "ChatStream":
        """Answer the messages.

        Args:
            added: the last messages, which are taken back where nothing could be answered.
            taken_back: messages that are put back there.
        """
        begun = begun if begun.strip() else ""
        try:
            self.llama.encode("")  # says what is missing where there is no tokenizer
            ids = encode_chat(self.llama.tokenizer, self.messages, self.chat_format, begun)
            n_kept = self.cache.keep(0, ids)
            turn = Turn(len(ids), n_kept, len(ids) - n_kept)
            options = {"fresh_text": not begun, **self.options, **options}
            generation = self.llama.new_generation([ids], cache=self.cache, **options)
        except BaseException:
            self._take_back(added, taken_back)
            raise
        self.turn = turn
        stream = ChatStream(self, generation, begun, added, taken_back)
        self._stream = weakref.ref(stream)
        return stream

    def _take_back(self, added: list[Message], taken_back: list[Message]) -> None:
        del self.messages[len(self.messages) - len(added) :]
        self.messages += taken_back


class ChatStream(TextStream):
    """The answer in pieces of text; when it has ended, it stands in the chat's messages."""

    def __init__(
        self,
        chat: Chat,
        generation: Generation,
        begun: str,
        added: list[Message],
        taken_back: list[Message],
    ) -> None:
        super().__init__(generation)
        self._chat = chat
        self._begun = begun
        self._added = added
        self._taken_back = taken_back

    def close(self) -> None:
        """End the answer here, if it has not ended, and put it into the messages."""
        if self.completion is not None:
            return
        super().close()
        if self.completion.ids:
            content = self._begun + self.completion.text
            self._chat.messages.append({"role": "assistant", "content": content})
        else:
            self._chat._take_back(self._added, self._taken_back)

    def __del__(self) -> None:
        self.close()  # a stream that nobody reads any more
