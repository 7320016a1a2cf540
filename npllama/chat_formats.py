"""The built-in chat formats, each as a function from messages to parts.

Tags without a token in the vocabulary are text, such as Llama-2's [INST] or TinyLlama's <|user|>.
If a message contains such a tag, the model may take it for a tag of the format.
"""

from collections.abc import Sequence

from npllama.dialogue_parts import ChatFormat, Message, Parts, markup_of
from npllama.errors import InputError
from npllama.tokenizer import Tokenizer

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def llama_2(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Parts:
    """Llama-2-chat, and CodeLlama-Instruct up to 34B.

        BOS [INST] {user} [/INST] {answer} EOS  BOS [INST] {user} [/INST]

    The first user message contains the system prompt. Source: Meta's llama repository,
    chat_completion; Touvron et al. 2023, section 3.3.
    """
    system, turns = _alternating(messages)
    texts = [message["content"] for message in turns]
    if system is not None:
        texts[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{texts[0]}"
    texts = [text.strip() for text in texts]  # as Meta does, with the system prompt before it
    parts: Parts = []
    for user, past in zip(texts[:-1:2], texts[1::2], strict=True):
        parts += [tokenizer.bos_id, f"[INST] {user} [/INST] {past} ", tokenizer.eos_id]
    begun = f" {answer.lstrip()}" if answer else ""
    return [*parts, tokenizer.bos_id, f"[INST] {texts[-1]} [/INST]{begun}"]


def zephyr(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Parts:
    """TinyLlama-Chat and Zephyr: "<|user|>\\n{content}EOS\\n" for each message.

    Source: the chat_template of TinyLlama-1.1B-Chat-v1.0.
    """
    markup = markup_of(tokenizer)
    parts: Parts = []
    for message in _checked_roles(messages):
        parts += [*markup(f"<|{message['role']}|>\n"), message["content"], tokenizer.eos_id, "\n"]
    return [*parts, *markup("<|assistant|>\n"), answer]


def chatml(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Parts:
    """ChatML: "<|im_start|>user\\n{content}<|im_end|>\\n" for each message."""
    markup = markup_of(tokenizer)
    parts: Parts = []
    for message in _checked_roles(messages):
        parts += [*markup(f"<|im_start|>{message['role']}\n"), message["content"]]
        parts += markup("<|im_end|>\n")
    return [*parts, *markup("<|im_start|>assistant\n"), answer]


def vicuna(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Parts:
    """Vicuna v1.1 and later: "{system} USER: {user} ASSISTANT: {answer}EOS" and so on.

    Source: FastChat, conv_vicuna_v1.1. Its system prompt is the default.
    """
    system, turns = _alternating(messages)
    parts: Parts = [f"{_VICUNA_SYSTEM if system is None else system} "]
    for user, past in zip(turns[:-1:2], turns[1::2], strict=True):
        parts += [f"USER: {user['content']} ASSISTANT: {past['content']}", tokenizer.eos_id]
    begun = f" {answer.lstrip()}" if answer else ""
    return [*parts, f"USER: {turns[-1]['content']} ASSISTANT:{begun}"]


def story(tokenizer: Tokenizer, messages: Sequence[Message], answer: str) -> Parts:
    """For a model that cannot chat: the last message is a text, which the answer continues.

    The prompt does not contain earlier messages.
    """
    return [_checked_roles(messages)[-1]["content"] + answer]


FORMATS: dict[str, ChatFormat] = {
    "llama-2": llama_2,
    "codellama": llama_2,
    "zephyr": zephyr,
    "chatml": chatml,
    "vicuna": vicuna,
}
"""The formats by their names for --chat-format."""


def _alternating(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    """The system prompt, and the messages after it: a user's, an assistant's, ..., a user's."""
    has_system = bool(messages) and messages[0]["role"] == "system"
    system, turns = (messages[0]["content"], messages[1:]) if has_system else (None, messages)
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if len(turns) % 2 == 0 or [message["role"] for message in turns] != expected:
        raise InputError(
            "roles must be user, assistant, user, ... and end with user, "
            f"after an optional system; found {_roles(messages)}"
        )
    return system, turns


def _checked_roles(messages: Sequence[Message]) -> Sequence[Message]:
    roles = [message["role"] for message in messages]
    if not {*roles} <= {"system", "user", "assistant"} or roles[-1:] != ["user"]:
        raise InputError(
            f"roles must be system, user or assistant and end with user; found {_roles(messages)}"
        )
    return messages


def _roles(messages: Sequence[Message]) -> str:
    roles = [message["role"] for message in messages]
    more = f", ... ({len(roles)} messages)" if len(roles) > 12 else ""
    return ", ".join(roles[:12]) + more or "none"
