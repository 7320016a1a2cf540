"""The token ids with which a model wrote its answers, in place of the ids of their text.

Several sequences of ids decode to one text, and a model may write another one than the tokenizer
makes of the text. The KV cache holds those that the model wrote. A later prompt that has them as
well needs no second reading.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from npllama.dialogue_parts import ChatFormat, Message, Parts, merged
from npllama.tokenizer import StreamDecoder, Tokenizer

_FIRST_MARK = 0x100000  # private characters, which no text has by chance


@dataclass(frozen=True)
class OwnAnswer:
    """An answer that a model wrote.

    Attributes:
        begun: the beginning that the prompt gave it.
        text: what the model wrote after that.
        ids: the ids of `text`.
        space: the white space at the end of the prompt. A format may strip an answer, or put a
            space before it that belongs to its first id.
    """

    begun: str
    text: str
    ids: tuple[int, ...]
    space: str

    @property
    def content(self) -> str:
        """The content of the message."""
        return self.begun + self.text


def own_answer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    ids: Sequence[int],
    text: str,
    *,
    begun: str,
    space: str,
    end_ids: Collection[int],
) -> OwnAnswer | None:
    """An answer with the longest part of its ids that decodes to its text.

    Args:
        ids: of the completion. Those behind a text end, as `end_ids`, are no part of the answer:
            the chat format writes them.
        text: of the completion, which has no stop text.
        begun, space: see OwnAnswer.

    Returns:
        None where no part of the ids decodes to the text: a stop text began within a token.
    """
    ids = list(ids)
    while ids and ids[-1] in end_ids:
        ids.pop()
    decoder = StreamDecoder(tokenizer)
    if begun:  # the text goes on, and keeps the space that a text loses where it begins
        for id_ in prompt_ids:
            decoder.push(id_)
    made, n_ids = "", 0 if not text else None
    for i, id_ in enumerate(ids):
        made += decoder.push(id_)
        if made == text and decoder.is_whole:
            n_ids = i + 1
    if made + decoder.flush() == text:
        n_ids = len(ids)
    return None if n_ids is None else OwnAnswer(begun, text, tuple(ids[:n_ids]), space)


def parts_with_own_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    chat_format: ChatFormat,
    answer: str,
    own_answers: Mapping[int, OwnAnswer],
) -> Parts:
    """The parts of a dialogue, with the model's own ids where a chat format puts its answers.

    The format is asked twice. The second time each answer is a character of no meaning, which
    shows the place of the answer. Where a format does more with an answer than to strip it, the
    characters put back do not give the first result, and all answers are text.

    Args:
        own_answers: by the index of the message.
    """
    plain = merged(chat_format(tokenizer, messages, answer))
    marks = {chr(_FIRST_MARK + n): own for n, own in enumerate(own_answers.values())}
    if not marks or any(mark in message["content"] for message in messages for mark in marks):
        return plain
    marked_messages = [dict(message) for message in messages]
    for mark, (i, own) in zip(marks, own_answers.items(), strict=True):
        marked_messages[i]["content"] = own.begun + mark
    marked = merged(chat_format(tokenizer, marked_messages, answer))
    between = re.compile(f"([{''.join(marks)}])")
    if not _is_the_same(_spelled(plain), between.split(_spelled(marked)), marks):
        return plain
    parts: Parts = []
    for part in marked:
        parts += _spliced(between.split(part), marks) if isinstance(part, str) else [part]
    return parts


def _spelled(parts: Parts) -> str:
    """Parts as one text, with numbers for ids: to be compared, not to be encoded."""
    return "".join(part if isinstance(part, str) else f"\0{part}\0" for part in parts)


def _is_the_same(plain: str, marked: Sequence[str], marks: Mapping[str, OwnAnswer]) -> bool:
    """Whether a marked text, with the answers put back, is the plain one.

    An answer is put back as it is or stripped, whichever the plain text goes on with.

    Args:
        marked: text, mark, text, ..., text; no mark stands twice.
    """
    if len({*marked[1::2]}) < len(marked) // 2 or not plain.startswith(marked[0]):
        return False
    at = len(marked[0])
    for mark, after in zip(marked[1::2], marked[2::2], strict=True):
        text = marks[mark].text
        choices = (choice + after for choice in (text, text.strip(), text.rstrip(), text.lstrip()))
        found = next((choice for choice in choices if plain.startswith(choice, at)), None)
        if found is None:
            return False
        at += len(found)
    return at == len(plain)


def _spliced(marked: Sequence[str], marks: Mapping[str, OwnAnswer]) -> Parts:
    """A marked text with ids for the marks, and before them the white space of their prompts.

    Args:
        marked: text, mark, text, ..., text.
    """
    parts: Parts = []
    for text, mark in zip(marked[::2], marked[1::2], strict=False):
        parts += [text.rstrip() + marks[mark].space, marks[mark].ids]
    return [*parts, marked[-1]]
