"""A conversation: messages, and a KV cache that follows them.

Each answer begins with a prompt that is encoded from all messages. The cache keeps the ids that it
has in common with the prompt, and the model reads the rest. The answers of the model keep the ids
with which it wrote them (npllama.own_answers).
"""

import threading
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from npllama.completion import Completion
from npllama.dialogue import checked_messages, dialogue_parts
from npllama.dialogue_parts import ChatFormat, Message, encode_parts
from npllama.errors import InputError
from npllama.generation import Generation
from npllama.kv_cache import KVCache
from npllama.llama import MAX_NEW_TOKENS, Llama, shows_keywords_of
from npllama.own_answers import OwnAnswer, answer_in_cache, own_answer
from npllama.sampling_options import is_integer
from npllama.text_stream import TextStream

_REFUSED = ("cache", "batch_size")  # keywords that only Chat sets
_GIVEN = (*_REFUSED, "fresh_text")


@dataclass(frozen=True)
class Turn:
    """How the prompt of an answer is read.

    Attributes:
        n_prompt: number of ids of the prompt.
        n_kept: number of its first ids that the cache already held.
        n_read: number of its other ids, which the model reads.
        n_dropped: number of old turns that are left out for the first time in this prompt.
    """

    n_prompt: int
    n_kept: int
    n_read: int
    n_dropped: int = 0

    def note(self) -> str | None:
        """A line with the number of turns that were left out; None if there are none."""
        if self.n_dropped == 0:
            return None
        turns = "turn is" if self.n_dropped == 1 else f"{self.n_dropped} turns are"
        return f"the context is full: the oldest {turns} left out of the prompt from now on"


@dataclass(frozen=True)
class _Prompt:
    """A dialogue as the model reads it.

    Attributes:
        ids: the token ids.
        begun: the beginning of the answer, at the end of `ids`.
        space: the white space at the end of the prompt's text.
        n_left_out: number of old turns that are not in the prompt.
    """

    ids: list[int]
    begun: str
    space: str
    n_left_out: int


class Chat:
    """A dialogue with a model, in the chat format of the model.

    A message of the user and its answer are a turn. The context must have room for the prompt and
    for max_new_tokens, or for a quarter of the context if that is less. Otherwise, the prompt
    leaves out the oldest turns, until a quarter of the context is free. The model then reads the
    rest of the dialogue again; with a quarter free, this happens rarely. The turns stay in
    `messages`, and the prompts leave them out until an earlier message is edited or removed. The
    system prompt is never left out.

    Args:
        llama: a chat model.
        messages: {"role": ..., "content": ...} each; they are copied.
        system: the system prompt. It replaces the one in `messages`.
        chat_format: a name of npllama.chat_formats.FORMATS, or a format; None is the model's own.
        cache: from `llama.new_cache` or `load_cache`, with one row, which may already hold ids.
            Answers in `messages` get the ids that the cache holds for their text. None creates a
            new cache.
        drop_old_turns: whether prompts leave out old turns. If False, a dialogue that fills the
            context raises InputError.
        options: keywords of `Llama.new_generation` for all answers. The default of `fresh_text` is
            True, except for an answer that the caller begins.

    Attributes:
        messages: the dialogue, a list of dictionaries. The caller may edit it while no answer is
            being written. An edited answer loses the ids that the model wrote; its text is encoded.
        options: keywords for all answers, which the caller may change.
        turn: how the prompt of the latest answer was read; None before the first.
        cache: its row holds the ids of the dialogue without the last id of the latest answer.

    Raises:
        InputError: `messages` are not messages, the model has no chat format, the format is
            unknown, the cache is from another model, or an option is out of range.
        TypeError: an unknown keyword.
        TokenizerError: the model has no tokenizer.
        OutOfMemoryError: the cache does not fit the memory.

    >>> from npllama import load
    >>> chat = Chat(load(), chat_format="llama-2", max_new_tokens=5, ignore_eos=True)
    >>> len(chat.say("Hello!").ids)
    5
    >>> for piece in chat.stream("Tell me more.", max_new_tokens=3):
    ...     pass
    >>> [message["role"] for message in chat.messages]
    ['user', 'assistant', 'user', 'assistant']
    >>> chat.turn.n_prompt == chat.turn.n_kept + chat.turn.n_read
    True
    """

    @shows_keywords_of(Llama.new_generation, but=_GIVEN)
    def __init__(
        self,
        llama: Llama,
        messages: Iterable[Message] | None = (),
        *,
        system: str | None = None,
        chat_format: str | ChatFormat | None = None,
        cache: KVCache | None = None,
        drop_old_turns: bool | None = True,
        **options: Any,
    ) -> None:
        self.llama = llama
        self.check_options(options)
        self.chat_format = llama.resolved_chat_format(chat_format)
        self.drop_old_turns = drop_old_turns is None or bool(drop_old_turns)
        self.options = options
        self.turn: Turn | None = None
        self._lock = threading.RLock()
        self._stream: weakref.ref[ChatStream] | None = None
        self._own_answers: dict[int, tuple[Message, OwnAnswer]] = {}  # by id() of the message
        self._rendered: list[tuple[str, str]] = []  # the messages of the latest answered prompt
        self._n_left_out = 0  # the number of its old turns that were left out
        self.messages = checked_messages(() if messages is None else messages)
        if system is not None:
            self.system = system
        if cache is None:
            llama.check_memory(1, llama.context)
            cache = llama.new_cache()
        self.cache = llama.checked_cache(cache, 1)

    def __repr__(self) -> str:
        return (
            f"<Chat of {len(self.messages)} messages, {self.cache.lengths[0]} of "
            f"{self.cache.context} positions filled>"
        )

    @property
    def system(self) -> str | None:
        """The system prompt: the content of the first message if its role is system.

        A new text replaces this message or is inserted in front; None removes the message.
        """
        n_system = _n_system(self.messages)
        return self.messages[0]["content"] if n_system else None

    @system.setter
    def system(self, text: str | None) -> None:
        first = [] if text is None else checked_messages([{"role": "system", "content": text}])
        with self._idle():
            self.messages[: _n_system(self.messages)] = first

    @shows_keywords_of(Llama.new_generation, but=_GIVEN)
    def stream(self, text: str, *, answer: str | None = "", **options: Any) -> "ChatStream":
        """Send a message of the user, and yield the answer in pieces of text.

        `messages` contains the message when this method returns, and the answer when the stream
        has ended. If the stream ends before the first token, the message is removed again.

        Args:
            text: the message.
            answer: the beginning of the answer, which the model continues. The answer in `messages`
                contains it, and the pieces do not.
            options: keywords of `Llama.new_generation`, which override the chat's `options`.

        Raises:
            InputError: the last answer is still being written, the prompt does not fit the
                context, or the format does not know the roles.
            TokenizerError: the model has no tokenizer, or its chat template cannot be rendered.
        """
        if not isinstance(text, str):
            raise InputError(f"the message is {text!r:.60}: expected a text")
        with self._idle():
            messages = [*self.messages, {"role": "user", "content": text}]
            return self._answered(messages, "" if answer is None else answer, options)

    @shows_keywords_of(Llama.new_generation, but=_GIVEN)
    def say(self, text: str, *, answer: str | None = "", **options: Any) -> Completion:
        """As `stream`, returning the whole answer at once."""
        return self.stream(text, answer=answer, **options).read()

    @shows_keywords_of(Llama.new_generation, but=_GIVEN)
    def stream_again(self, **options: Any) -> "ChatStream":
        """As `stream`, answering the last message of the user again.

        The old answer is removed. If the stream ends before the first token, it is restored.
        """
        with self._idle():
            at = self._last_user()
            if at is None:
                raise InputError("there is no message to answer again: say something first")
            return self._answered(self.messages[: at + 1], "", options)

    def undo(self) -> bool:
        """Remove the last message of the user and all messages after it.

        Returns:
            False if there is no message of the user.
        """
        with self._idle():
            at = self._last_user()
            if at is None:
                return False
            del self.messages[at:]
            return True

    def clear(self) -> None:
        """Remove all messages but the system prompt."""
        with self._idle():
            del self.messages[_n_system(self.messages) :]

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise the errors of an answer with these options.

        Raises:
            InputError: a value is out of range.
            TypeError: an unknown keyword.
            TokenizerError: the model has no tokenizer.
        """
        _check_keywords(options)
        no_room = self.llama.new_cache(context=1)  # so that the memory is not checked
        self.llama.new_generation([""], cache=no_room, **_given(options))

    def _last_user(self) -> int | None:
        return max(_users(checked_messages(self.messages)), default=None)

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """A context for one thread at a time, entered only while no answer is being written."""
        with self._lock:
            stream = None if self._stream is None else self._stream()
            if stream is not None and not stream.has_ended:
                raise InputError(
                    "the last answer of the chat is still being written: read its stream to the "
                    "end, or close() it"
                )
            yield

    def _answered(
        self, messages: list[Message], begun: str, options: Mapping[str, Any]
    ) -> "ChatStream":
        """Replace the messages, and begin the answer to the last one."""
        options = _given(self.options) | _given(options)
        _check_keywords(options)
        self._adopt_ids(messages)
        prompt = self._prompt(messages, begun, options.get("max_new_tokens"))
        n_kept = self.cache.keep(0, prompt.ids)
        options = {"fresh_text": not prompt.begun, **options}
        generation = self.llama.new_generation([prompt.ids], cache=self.cache, **options)
        n_dropped = prompt.n_left_out - self._n_still_left_out(messages)
        self.turn = Turn(len(prompt.ids), n_kept, len(prompt.ids) - n_kept, n_dropped)
        stream = ChatStream(self, generation, prompt, messages)
        self._stream = weakref.ref(stream)
        self.messages[:] = messages
        return stream

    def _prompt(self, messages: list[Message], begun: str, max_new_tokens: object) -> _Prompt:
        """The prompt of a dialogue, without the old turns that do not fit the context."""
        checked_messages(messages)
        n_turns, context = len(_users(messages)), self.cache.context
        prompt = self._prompt_without(self._n_still_left_out(messages), messages, begun)
        n_new = int(max_new_tokens) if is_integer(max_new_tokens) else MAX_NEW_TOKENS
        room = max(min(n_new, context // 4), 1)
        if self.drop_old_turns and len(prompt.ids) + room > context:
            choices = range(prompt.n_left_out, max(n_turns, 1))  # the last turn always stays
            most = context - context // 4
            at = bisect_left(
                choices, -most, key=lambda n: -len(self._prompt_without(n, messages, begun).ids)
            )
            shorter = self._prompt_without(choices[min(at, len(choices) - 1)], messages, begun)
            prompt = min(prompt, shorter, key=lambda prompt: len(prompt.ids))
        if len(prompt.ids) >= context:
            raise InputError(self._too_long(prompt, messages))
        return prompt

    def _too_long(self, prompt: _Prompt, messages: list[Message]) -> str:
        """The message of an error: the prompt leaves no room for an answer in the context."""
        found = "the dialogue has"
        actions = ["undo turns", "clear the dialogue", "drop old turns"]
        if len(_users(messages)) - prompt.n_left_out <= 1:
            found, actions = "the message has", ["shorten the message"]
            if _n_system(messages):
                found, actions = "the message and the system prompt have", ["shorten one of them"]
        if self.cache.context < self.llama.config.longest_context:
            actions.append("give a larger context")
        *first, last = actions
        advice = f"{', '.join(first)} or {last}" if first else last
        return (
            f"{found} {len(prompt.ids)} tokens in the chat format, and the context has room for "
            f"{self.cache.context} tokens of prompt and answer: {advice}"
        )

    def _prompt_without(self, n_turns: int, messages: list[Message], begun: str) -> _Prompt:
        """The prompt of a dialogue without its oldest turns."""
        first = _n_system(messages)
        begin = _users(messages)[n_turns] if n_turns else first
        kept = [*range(first), *range(begin, len(messages))]
        own = {
            place: found
            for place, i in enumerate(kept)
            if (found := self._own_answer(messages[i])) is not None
        }
        self.llama.encode("")  # raises an error if there is no tokenizer
        parts = dialogue_parts(
            self.llama.tokenizer, [messages[i] for i in kept], self.chat_format, begun, own
        )
        end = parts[-1] if parts and isinstance(parts[-1], str) else ""
        return _Prompt(
            ids=encode_parts(self.llama.tokenizer, parts),
            begun=begun if begun.strip() else "",
            space=end[len(end.rstrip()) :],
            n_left_out=n_turns,
        )

    def _n_still_left_out(self, messages: list[Message]) -> int:
        """The number of old turns that the latest answered prompt left out, if the messages
        continue its dialogue; else 0."""
        goes_on = _contents(messages[: len(self._rendered)]) == self._rendered
        return self._n_left_out if goes_on else 0

    def _adopt_ids(self, messages: list[Message]) -> None:
        """Give loaded answers the ids that the cache holds for them.

        A prompt cache and a saved dialogue may come from the same earlier chat, and a saved
        dialogue has no ids.
        """
        held = self.cache.ids[0][: self.cache.lengths[0]]
        for i, message in enumerate(checked_messages(messages)):
            if message["role"] != "assistant" or self._own_answer(messages[i]) is not None:
                continue
            if not held or i == 0 or messages[i - 1]["role"] != "user":
                return
            prompt = self._prompt_without(0, messages[:i], "")
            n_prompt = len(prompt.ids)
            if held[:n_prompt] != prompt.ids:
                return
            own = answer_in_cache(
                self.llama.tokenizer, held[n_prompt:], message["content"], prompt.space
            )
            if own is None:
                return
            self._own_answers[id(messages[i])] = messages[i], own

    def _own_answer(self, message: Message) -> OwnAnswer | None:
        """The answer with its ids; None if they are unknown, or if the message was edited."""
        known, own = self._own_answers.get(id(message), (None, None))
        return own if known is message and own.content == message["content"] else None

    def _with_answer(
        self, messages: list[Message], completion: Completion, prompt: _Prompt
    ) -> list[Message]:
        """The messages and the answer to them. The chat keeps the ids of the answer."""
        message = {"role": "assistant", "content": prompt.begun + completion.text}
        own = own_answer(
            self.llama.tokenizer,
            prompt.ids,
            completion.ids,
            completion.text,
            begun=prompt.begun,
            space=prompt.space,
            end_ids=self.llama.config.eos_ids,
        )
        present = {id(message) for message in self.messages}
        self._own_answers = {i: v for i, v in self._own_answers.items() if i in present}
        if own is not None:
            self._own_answers[id(message)] = message, own
        self._n_left_out, self._rendered = prompt.n_left_out, _contents(messages)
        return [*messages, message]


class ChatStream(TextStream):
    """The answer of a Chat in pieces of text, none of them empty; see TextStream.

    When the stream has ended (by itself, by `close`, by Ctrl-C or by an error), the messages of
    the chat contain the answer so far. A stream is closed when no reference to it remains.

    Args:
        messages: the dialogue to answer. If the stream ends before the first token, the previous
            messages of the chat are restored.

    Attributes:
        has_ended: whether the chat can be used again.
    """

    has_ended = True  # until __init__ is complete

    def __init__(
        self, chat: Chat, generation: Generation, prompt: _Prompt, messages: list[Message]
    ) -> None:
        super().__init__(generation)
        self._chat = chat
        self._prompt = prompt
        self._messages = messages
        self._before = list(chat.messages)
        self.has_ended = False

    def read(self) -> Completion:
        """Read the stream to its end, and return the completion."""
        for _piece in self:
            pass
        return self.completion

    def close(self) -> None:
        """End the answer here, if it has not ended, and append it to the messages."""
        if self.has_ended:
            return
        super().close()
        messages = self._before
        if self.completion.ids:
            messages = self._chat._with_answer(self._messages, self.completion, self._prompt)
        self._chat.messages[:] = messages  # in one step, so that Ctrl-C leaves whole turns
        self.has_ended = True

    def __del__(self) -> None:
        self.close()


def _n_system(messages: list[Message]) -> int:
    """The number of system prompts in front, 1 or 0."""
    return int(bool(messages) and checked_messages(messages[:1])[0]["role"] == "system")


def _check_keywords(options: Mapping[str, Any]) -> None:
    """Raise TypeError for keywords of `Llama.new_generation` that a chat sets itself."""
    for name in _REFUSED:
        if options.get(name) is not None:
            raise TypeError(f"{name} is no option of an answer: the chat has one row and one cache")


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not None. None selects the default."""
    return {name: value for name, value in options.items() if value is not None}


def _users(messages: list[Message]) -> list[int]:
    """The indices of the user's messages, where turns begin."""
    return [i for i, message in enumerate(messages) if message["role"] == "user"]


def _contents(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]
