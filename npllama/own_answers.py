"""Uses the token ids with which a model wrote its answers, instead of encoding their text.

Several sequences of ids decode to the same text, and the model may write another sequence than the
tokenizer returns for the text. The KV cache holds the ids that the model wrote. If a later prompt
contains the same ids, the model need not read them again.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from npllama.dialogue_parts import ChatFormat, Message, Part, Parts, merged
from npllama.tokenizer import StreamDecoder, Tokenizer

_FIRST_MARK = 0x100000  # private characters, which texts hardly ever contain


@dataclass(frozen=True)
class OwnAnswer:
    """An answer that a model wrote.

    Attributes:
        begun: the beginning of the answer, which was part of the prompt.
        text: the text that the model wrote after it.
        ids: the ids of `text`.
        space: the white space at the end of the prompt. In later prompts, the same white space
            precedes the ids, even if the format would write other white space there. For example,
            the space of "[/INST] Hello" belongs to the id of " Hello".
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
    """An answer with the ids that the model wrote.

    A stop text may begin within a token. The ids then end before it, and the rest of the text is
    encoded.

    Args:
        ids: ids of the completion. `end_ids` at their end are not part of the answer, because the
            chat format writes them.
        text: text of the completion, without a stop text.
        begun, space: see OwnAnswer.

    Returns:
        None if no id decodes to a part of the text.
    """
    ids = list(ids)
    while ids and ids[-1] in end_ids:
        ids.pop()
    # the decoder removes the first space only at the beginning of a text
    before = prompt_ids if begun else ()
    decoder = _decoder_after(tokenizer, before)
    if "".join([decoder.push(id_) for id_ in ids]) + decoder.flush() == text:
        return OwnAnswer(begun, text, tuple(ids), space)
    n_ids, common = _common_beginning(_decoder_after(tokenizer, before), ids, text)
    if n_ids == 0 and not begun:
        return None
    # the stop text began within a token
    rest = tokenizer.encode_continuation(text[len(common) :])
    return OwnAnswer(begun, text, (*ids[:n_ids], *rest), space)


def answer_in_cache(
    tokenizer: Tokenizer, ids: Sequence[int], text: str, space: str
) -> OwnAnswer | None:
    """An answer with the ids that a cache holds for it, such as one that was read from a file.

    The last id of the latest answer is never in a cache. The rest of its text is encoded.

    Args:
        ids: the ids of the cache after the prompt of the answer.
        text: the content of the message.
        space: see OwnAnswer.

    Returns:
        None if the ids are not those of the text.
    """
    n_ids, common = _common_beginning(StreamDecoder(tokenizer), ids, text)
    if n_ids == 0 or (common != text and n_ids < len(ids)):
        return None
    rest = tokenizer.encode_continuation(text[len(common) :])
    return OwnAnswer("", text, (*ids[:n_ids], *rest), space)


def _decoder_after(tokenizer: Tokenizer, ids: Iterable[int]) -> StreamDecoder:
    """A decoder of a text that continues the text of `ids`."""
    decoder = StreamDecoder(tokenizer)
    for id_ in ids:
        decoder.push(id_)
    return decoder


def _common_beginning(decoder: StreamDecoder, ids: Sequence[int], text: str) -> tuple[int, str]:
    """The number of first ids whose text is a beginning of `text`, and that beginning.

    Ids without a text, such as EOS, count only if further text follows them.
    """
    made, common, n_ids = "", "", 0
    for i, id_ in enumerate(ids):
        made += decoder.push(id_)
        if not text.startswith(made):
            break
        if decoder.is_whole and made != common:
            common, n_ids = made, i + 1
    return n_ids, common


def parts_with_own_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    chat_format: ChatFormat,
    answer: str,
    own_answers: Mapping[int, OwnAnswer],
) -> Parts:
    """The parts of a dialogue, with the model's own ids in place of its answers.

    The format renders the dialogue twice. The second time, a private character (a mark) replaces
    each answer and shows its place. Otherwise the two results must be equal, except for white space
    around an answer that the format strips. An answer with another difference stays text.

    Args:
        own_answers: by the index of the message.
    """
    plain = merged(chat_format(tokenizer, messages, answer))
    left = {chr(_FIRST_MARK + i): (i, own) for i, own in own_answers.items()}
    while left:
        marks = {mark: own for mark, (_i, own) in left.items()}
        marked_messages = [dict(message) for message in messages]
        for mark, (i, own) in left.items():
            marked_messages[i]["content"] = own.begun + mark
        marked = merged(chat_format(tokenizer, marked_messages, answer))
        between = re.compile(f"([{''.join(marks)}])")
        changed = _first_changed(_spelled(plain), between.split(_spelled(marked)), marks)
        if changed is None:
            return [one for part in marked for one in _spliced(part, between, marks)]
        left.pop(changed)
    return plain


def _spelled(parts: Parts) -> str:
    """Parts as one text in which ids are written in digits, for comparisons."""
    return "".join(part if isinstance(part, str) else f"\0{part}\0" for part in parts)


def _first_changed(plain: str, marked: Sequence[str], marks: Mapping[str, OwnAnswer]) -> str | None:
    """The mark of the first answer that the format changes in another way than stripping it.

    Args:
        marked: text, mark, text, ..., text.

    Returns:
        None if the marked text equals the plain text after the answers replace the marks.
    """
    at = len(marked[0]) if plain.startswith(marked[0]) else -1
    mark, seen = next(iter(marks)), set()
    for mark, after in zip(marked[1::2], marked[2::2], strict=True):
        text = marks[mark].text
        choices = (choice + after for choice in (text, text.strip(), text.rstrip(), text.lstrip()))
        found = next((choice for choice in choices if plain.startswith(choice, at)), None)
        if at < 0 or found is None or mark in seen:
            return mark
        at += len(found)
        seen.add(mark)
    return None if at == len(plain) else mark


def _spliced(part: Part, between: re.Pattern, marks: Mapping[str, OwnAnswer]) -> Parts:
    """A marked part, with the ids of an answer in place of its mark, after the white space of its
    prompt."""
    if not isinstance(part, str):
        return [part]
    *pairs, end = between.split(part)  # text, mark, text, mark, ..., text
    parts: Parts = []
    for text, mark in zip(pairs[::2], pairs[1::2], strict=True):
        parts += [text.rstrip() + marks[mark].space, marks[mark].ids]
    return [*parts, end]
