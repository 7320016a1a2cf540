"""The dialogue format of Llama-2-chat, as token ids.

    BOS [INST] {user} [/INST] {answer} EOS  BOS [INST] {user} [/INST]

Each turn is encoded by itself, so that no text can reach into a control token; the system
prompt stands inside the first user message. Source: Meta's llama repository, chat_completion;
Touvron et al. 2023, section 3.3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from npllama.config import read_json
from npllama.errors import InputError, TokenizerError
from npllama.tokenizer import Tokenizer

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def encode_chat(tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The prompt of a dialogue that ends with a user's message.

    Args:
        messages: {"role": ..., "content": ...}; roles are an optional "system", then "user"
            and "assistant" in turn, "user" last.

    Returns:
        Ids: each past turn BOS .. EOS, the last one BOS .. [/INST] without a trailing space.

    Raises:
        InputError: roles out of turn, or a message that holds one of the format's tags.
        TokenizerError: a model without a tokenizer has None.
    """
    try:
        turns = [(message["role"], message["content"]) for message in messages]
    except (KeyError, TypeError):
        turns = [(None, None)]
    if not all(isinstance(text, str) for turn in turns for text in turn):
        raise InputError('messages are not a list of {"role": "user", "content": "..."}')
    if tokenizer is None:
        raise TokenizerError(
            "the model has no tokenizer: a dialogue needs its tokenizer.model or tokenizer.json"
        )
    for role, content in turns:
        for tag in _TAGS:
            if tag in content:
                raise InputError(
                    f"the {role} message holds {tag!r}, which Llama-2-chat uses as a tag: remove it"
                )
    system = None
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if not turns or len(turns) % 2 == 0 or [role for role, _ in turns] != expected:
        raise InputError(
            "roles must be user, assistant, user, ... and end with user, "
            f"after an optional system; found {', '.join(m['role'] for m in messages) or 'none'}"
        )
    texts = [content for _, content in turns]
    if system is not None:
        texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
    texts = [text.strip() for text in texts]  # as Meta does, with the system prompt before it
    ids: list[int] = []
    for user, answer in zip(texts[:-1:2], texts[1::2], strict=True):
        ids += [*tokenizer.encode(f"[INST] {user} [/INST] {answer} "), tokenizer.eos_id]
    return ids + tokenizer.encode(f"[INST] {texts[-1]} [/INST]")


def check_chat_template(directory: Path) -> str | None:
    """Refuse a checkpoint that was trained on another dialogue format.

    Returns:
        What to say of a checkpoint without a chat template, which may be Llama-2-chat (Meta's
        files have none) or no chat model at all; None where there is one.

    Raises:
        TokenizerError: tokenizer_config.json (or chat_template.jinja) carries a template
            without Llama-2's tags.
    """
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        try:
            template: object = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    else:
        path = Path(directory) / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.exists() else None
        template = _default_template(template)
    if template is None:
        return (
            f"{directory} has no chat template (in chat_template.jinja or tokenizer_config.json): "
            "the prompt is put into Llama-2-chat's format; unless the model is Llama-2-chat, leave "
            "out --chat"
        )
    missing = [tag for tag in _TAGS if tag not in str(template)]
    if missing:
        raise TokenizerError(
            f"{path} carries a chat template without {missing[0]}: this checkpoint was trained on "
            "another dialogue format than Llama-2-chat's; run it without --chat, with a prompt in "
            "its own format"
        )
    return None


def _default_template(template: object) -> object:
    """Of a list of named templates the one named default; the list itself where there is none."""
    if not isinstance(template, list):
        return template
    named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
    return named[0].get("template") if named else template
