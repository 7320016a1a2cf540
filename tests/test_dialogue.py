"""The dialogue format of Llama-2-chat, as ids."""

import pytest

from chat_templates import assistant, system, user
from model_directory import byte_tokenizer
from npllama.dialogue import encode_chat
from npllama.errors import InputError

TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]

# Token ids: [INST] is 518 25580 29962, [/INST] is 518 29914 25580 29962, a newline is 13, and a
# single space is 29871. The lines contain BOS and the opening tag, the message, the closing tag,
# and then the answer, a space and EOS.
SINGLE = [
    *(1, 518, 25580, 29962),
    15043,
    *(518, 29914, 25580, 29962),
]
WITH_SYSTEM = [
    *(1, 518, 25580, 29962),
    *(3532, 14816, 29903, 6778, 13),
    *(3629, 11473, 29889),
    *(13, 29966, 829, 14816, 29903, 6778, 13, 13),
    18567,
    *(518, 29914, 25580, 29962),
]
THREE_TURNS = [
    *(1, 518, 25580, 29962),
    6324,
    *(518, 29914, 25580, 29962),
    *(15043, 29991, 29871, 2),
    *(1, 518, 25580, 29962),
    *(1128, 526, 366, 29973),
    *(518, 29914, 25580, 29962),
    *(28896, 29892, 3969, 29889, 29871, 2),
    *(1, 518, 25580, 29962),
    *(2648, 29872),
    *(518, 29914, 25580, 29962),
]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# -- ids


@pytest.mark.parametrize(
    "messages, ids",
    [
        ([user("Hello")], SINGLE),
        ([system("Be brief."), user("Hi")], WITH_SYSTEM),
        (
            [
                *(user("Hi"), assistant("Hello!")),
                *(user("How are you?"), assistant("Fine, thanks.")),
                user("Bye"),
            ],
            THREE_TURNS,
        ),
    ],
)
def test_dialogues_have_the_ids_that_llama_was_trained_on(llama_tokenizer, messages, ids):
    assert encode_chat(llama_tokenizer, messages) == ids


def test_a_system_prompt_stands_in_the_first_message_alone(llama_tokenizer):
    messages = [user("Hi"), assistant("Hello!"), user("Bye")]
    plain = encode_chat(llama_tokenizer, messages)
    with_system = encode_chat(llama_tokenizer, [system("Be brief."), *messages])
    first = plain.index(1, 1)  # the start of the second turn
    assert with_system[: len(WITH_SYSTEM)] == WITH_SYSTEM
    assert with_system[len(WITH_SYSTEM) :] == plain[first - 4 :]


def test_behind_a_system_prompt_the_first_message_keeps_its_leading_space(llama_tokenizer):
    """Meta strips the combined system prompt and message, so spaces between them remain."""
    leading = encode_chat(llama_tokenizer, [system("Be brief."), user(" Hi ")])
    assert leading == [6324 if id_ == 18567 else id_ for id_ in WITH_SYSTEM]
    trailing = encode_chat(llama_tokenizer, [system("Be brief."), user("Hi \n")])
    assert trailing == WITH_SYSTEM


def test_only_the_text_of_system_prompt_and_message_together_is_stripped():
    tokenizer = byte_tokenizer()
    messages = [system(" s "), user(" \n a "), assistant(" b "), user(" c ")]
    assert encode_chat(tokenizer, messages) == [
        *tokenizer.encode("[INST] <<SYS>>\n s \n<</SYS>>\n\n \n a [/INST] b "),
        tokenizer.eos_id,
        *tokenizer.encode("[INST] c [/INST]"),
    ]


@pytest.mark.parametrize("blank", [" ", "\n", " \t\n  "])
def test_users_and_answers_are_stripped(llama_tokenizer, blank):
    messages = [user("Hi"), assistant("Hello!"), user("How are\n you?")]
    padded = [{**m, "content": blank + m["content"] + blank} for m in messages]
    assert encode_chat(llama_tokenizer, padded) == encode_chat(llama_tokenizer, messages)


def test_messages_are_left_as_they_are():
    messages = [system("s"), user("hi"), assistant("yo"), user("bye")]
    copies = [dict(message) for message in messages]
    encode_chat(byte_tokenizer(), messages)
    assert messages == copies


def test_every_turn_is_encoded_by_itself():
    tokenizer = byte_tokenizer()
    messages = [user("a"), assistant("b"), user("c")]
    assert encode_chat(tokenizer, messages) == [
        *tokenizer.encode("[INST] a [/INST] b "),
        tokenizer.eos_id,
        *tokenizer.encode("[INST] c [/INST]"),
    ]


@pytest.mark.parametrize("text", ["<s>", "</s>", "a</s><s>b", "<unk>", "<0x0A>", "<pad>"])
def test_no_message_can_smuggle_in_a_special_token(llama_tokenizer, text):
    messages = [system(text), user(text), assistant(text), user(text)]
    ids = encode_chat(llama_tokenizer, messages)
    assert [i for i in ids if i <= 2] == [1, 2, 1]
    assert llama_tokenizer.decode(ids).count(text) == 4


# -- errors


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_in_a_message_is_text_as_it_is(tag):
    tokenizer = byte_tokenizer()
    ids = encode_chat(tokenizer, [system(tag), user(f"x{tag}y")])
    text = f"[INST] <<SYS>>\n{tag}\n<</SYS>>\n\nx{tag}y [/INST]"
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["[inst]", "INST", "<SYS>", "[ /INST]", "a[0] << b >> c"])
def test_what_only_looks_like_a_tag_is_text(text):
    tokenizer = byte_tokenizer()
    assert encode_chat(tokenizer, [user(text)]) == tokenizer.encode(f"[INST] {text} [/INST]")


@pytest.mark.parametrize(
    "messages, found",
    [
        ([], "none"),
        ([system("s")], "system"),
        ([assistant("a")], "assistant"),
        ([user("u"), assistant("a")], "user, assistant"),
        ([user("u"), user("u")], "user, user"),
        ([user("u"), user("u"), user("u")], "user, user, user"),
        ([assistant("a"), user("u"), assistant("a")], "assistant, user, assistant"),
        ([user("u"), system("s"), user("u")], "user, system, user"),
        ([system("s"), system("s"), user("u")], "system, system, user"),
        ([system("s"), assistant("a"), user("u")], "system, assistant, user"),
        ([user("u"), {"role": "tool", "content": "t"}, user("u")], "user, tool, user"),
        ([{"role": "User", "content": "u"}], "User"),
    ],
)
def test_roles_out_of_turn_are_refused_and_named(messages, found):
    with pytest.raises(InputError) as error:
        encode_chat(byte_tokenizer(), messages)
    assert one_line(error).endswith(f"found {found}") and "end with user" in one_line(error)


def test_a_lone_surrogate_in_a_message_is_refused():
    with pytest.raises(InputError) as error:
        encode_chat(byte_tokenizer(), [user("a\udcff")])
    assert "UTF-8" in one_line(error)
