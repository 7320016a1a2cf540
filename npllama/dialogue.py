"""Encodes dialogues as token ids, in the chat format that a model was trained on.

The format is the checkpoint's own template (npllama.chat_template), or a built-in one
(npllama.chat_formats).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from npllama.chat_formats import FORMATS, llama_2
from npllama.chat_template import ChatTemplate, read_template
from npllama.config import read_json
from npllama.dialogue_parts import ChatFormat, Message, Parts, encode_parts
from npllama.errors import InputError, TokenizerError
from npllama.own_answers import OwnAnswer, parts_with_own_ids
from npllama.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    chat_format: ChatFormat = llama_2,
    answer: str = "",
    own_answers: Mapping[int, OwnAnswer] | None = None,
) -> list[int]:
    """The prompt of a dialogue that ends with a user's message.

    The text of a message never becomes a control token. A plain-text tag in a message, such as
    [INST], stays text, but the model may take it for a tag.

    Args:
        messages: {"role": ..., "content": ...} each. The roles are an optional "system", then
            "user" and "assistant" in turn, and "user" last. The template of a checkpoint may allow
            others.
        chat_format: from `find_chat_format`, or one of npllama.chat_formats.
        answer: the beginning of the answer, which the model continues. White space alone counts as
            no beginning.
        own_answers: answers that the model wrote, by the index of the message. Their own ids
            replace the ids of their text.

    Returns:
        Ids with exactly one BOS in front. In the format of Llama-2-chat, each past turn is
        BOS .. EOS, and the last one is BOS .. [/INST] without a trailing space.

    Raises:
        InputError: something else than messages, or roles that the format does not know.
        TokenizerError: the tokenizer is None, or the template cannot be rendered.
    """
    return encode_parts(
        tokenizer, dialogue_parts(tokenizer, messages, chat_format, answer, own_answers)
    )


def dialogue_parts(
    tokenizer: Tokenizer | None,
    messages: Iterable[Message],
    chat_format: ChatFormat = llama_2,
    answer: str = "",
    own_answers: Mapping[int, OwnAnswer] | None = None,
) -> Parts:
    """The parts that `encode_chat` encodes. See `encode_chat` for the arguments and the errors."""
    turns = checked_messages(messages)
    if not isinstance(answer, str):
        raise InputError(f"the beginning of the answer is {answer!r:.60}: expected a text")
    if tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer: a dialogue needs its tokenizer.model or tokenizer.json"
        )
    begun = answer if answer.strip() else ""
    return parts_with_own_ids(tokenizer, turns, chat_format, begun, own_answers or {})


def checked_messages(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Copies of messages, each with a role and a content.

    Raises:
        InputError: something else than messages.
    """
    try:
        copies = [{"role": m["role"], "content": m["content"]} for m in messages]
    except (KeyError, TypeError, IndexError):
        copies = [{"role": None}]
    if not all(isinstance(text, str) for copy in copies for text in copy.values()):
        raise InputError('messages are not a list of {"role": "user", "content": "..."}')
    return copies


def find_chat_format(
    directory: str | Path | None, name: str | None = None
) -> tuple[ChatFormat, str | None]:
    """A model's chat format, and a note if the model may need another format, or cannot chat.

    Args:
        directory: the directory of the model; None if it has none.
        name: a name of npllama.chat_formats.FORMATS, which takes precedence over the directory.

    Returns:
        The format named `name`, that of the directory's chat template, or that of Llama-2-chat.
        A note in the last case, else None. A checkpoint without a template may be Llama-2-chat
            (its original files have no template), another chat model, or a model that cannot chat.

    Raises:
        InputError: there is no format of that name.
        TokenizerError: the template is damaged (see npllama.chat_template.read_template).
    """
    if name is not None:
        if name not in FORMATS:
            raise InputError(
                f"the chat format {name!r} is unknown: expected one of {', '.join(FORMATS)}"
            )
        return FORMATS[name], None
    found = read_template(Path(directory)) if directory is not None else None
    if found is not None:
        path = Path(directory) / "tokenizer_config.json"
        return ChatTemplate(*found, read_json(path) if path.exists() else {}).parts, None
    return llama_2, (
        f"{directory or 'the model'} has no chat template (in chat_template.jinja or "
        "tokenizer_config.json): Llama-2-chat's format is used; name another with --chat-format "
        "(chat_format= in Python), or continue a text if the model was not trained to chat"
    )
