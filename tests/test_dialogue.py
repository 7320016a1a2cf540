"""The dialogue format of Llama-2-chat, as ids; and checkpoints that were trained on another."""

import json

import pytest

from model_directory import byte_tokenizer
from npllama.dialogue import check_chat_template, encode_chat
from npllama.errors import ConfigError, InputError, TokenizerError

TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]

# [INST] = 518 25580 29962, [/INST] = 518 29914 25580 29962; 13 is a newline, 29871 a space alone.
# Line by line: BOS and the tag, the message, the closing tag, then the answer, a space, EOS.
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


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


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
    first = plain.index(1, 1)  # where the second turn begins
    assert with_system[: len(WITH_SYSTEM)] == WITH_SYSTEM
    assert with_system[len(WITH_SYSTEM) :] == plain[first - 4 :]


def test_behind_a_system_prompt_the_first_message_keeps_its_leading_space(llama_tokenizer):
    """Meta strips the text with the system prompt before it."""
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


# -- what is refused


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_a_message_that_holds_a_tag_is_refused(tag, at):
    messages = [system("s"), user("hi"), assistant("yo"), user("bye")]
    messages[at]["content"] += f"x{tag}y"
    with pytest.raises(InputError) as error:
        encode_chat(byte_tokenizer(), messages)
    assert repr(tag) in one_line(error) and messages[at]["role"] in one_line(error)


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


# -- chat templates

ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + "
    "eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == "
    "'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == "
    "'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user "
    "and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
    "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n'"
    " + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and "
    "add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHERS = {
    "zephyr": (ZEPHYR, "[INST]"),  # the format of TinyLlama's chat models
    "chatml": (CHATML, "[INST]"),
    "mistral": (MISTRAL, "<<SYS>>"),
}


def write_config(directory, **fields):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **fields}))
    return path


def test_a_directory_without_a_template_is_accepted(tmp_path):
    check_chat_template(tmp_path)
    write_config(tmp_path)
    check_chat_template(tmp_path)
    write_config(tmp_path, chat_template=None)
    check_chat_template(tmp_path)


def test_llama_2s_own_template_is_accepted(tmp_path):
    write_config(tmp_path, chat_template=LLAMA_2)
    check_chat_template(tmp_path)
    write_config(tmp_path, chat_template=[{"name": "default", "template": LLAMA_2}])
    check_chat_template(tmp_path)
    write_config(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(LLAMA_2)
    check_chat_template(tmp_path)


def named(**templates):
    return [{"name": name, "template": template} for name, template in templates.items()]


def test_of_a_list_of_templates_the_one_named_default_decides(tmp_path):
    for accepted in (
        named(default=LLAMA_2, tool_use=CHATML),
        named(tool_use=CHATML, default=LLAMA_2),
        named(tool_use=LLAMA_2),  # none is the default
    ):
        write_config(tmp_path, chat_template=accepted)
        check_chat_template(tmp_path)
    for refused in (
        named(default=CHATML, tool_use=LLAMA_2),
        named(tool_use=LLAMA_2, default=CHATML),
        named(rag=CHATML),
    ):
        write_config(tmp_path, chat_template=refused)
        with pytest.raises(TokenizerError, match="another dialogue format"):
            check_chat_template(tmp_path)


@pytest.mark.parametrize("template, missing", OTHERS.values(), ids=OTHERS)
def test_another_template_is_refused_with_its_file_and_the_reason(tmp_path, template, missing):
    path = write_config(tmp_path, chat_template=template)
    with pytest.raises(TokenizerError) as error:
        check_chat_template(tmp_path)
    for part in (str(path), missing, "--chat", "Llama-2-chat"):
        assert part in one_line(error)


@pytest.mark.parametrize("template, missing", OTHERS.values(), ids=OTHERS)
def test_another_template_in_a_jinja_file_is_refused(tmp_path, template, missing):
    write_config(tmp_path)
    path = tmp_path / "chat_template.jinja"
    path.write_text(template)
    with pytest.raises(TokenizerError) as error:
        check_chat_template(tmp_path)
    assert str(path) in one_line(error) and missing in one_line(error)


def test_the_jinja_file_counts_where_there_are_both(tmp_path):
    write_config(tmp_path, chat_template=LLAMA_2)
    path = tmp_path / "chat_template.jinja"
    path.write_text(ZEPHYR)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
        check_chat_template(tmp_path)
    path.write_text(LLAMA_2)
    write_config(tmp_path, chat_template=ZEPHYR)
    check_chat_template(tmp_path)


@pytest.mark.parametrize(
    "contents", [b"", b"{", b'{"chat_template": "a', b"[1]", b"null", b"\xff\xfe", b"[" * 100_000]
)
def test_a_damaged_config_is_one_line_that_names_it(tmp_path, contents):
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(contents)
    with pytest.raises(ConfigError) as error:
        check_chat_template(tmp_path)
    assert str(path) in one_line(error)


def test_a_template_that_is_a_directory_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.mkdir()
    with pytest.raises((ConfigError, TokenizerError)) as error:
        check_chat_template(tmp_path)
    assert str(path) in one_line(error)
