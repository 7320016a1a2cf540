"""Answers that keep the ids with which they were written."""

import pytest

from chat_templates import assistant, system, user
from model_directory import BYTE_PIECES, byte_tokenizer
from npllama.chat_formats import FORMATS, llama_2, zephyr
from npllama.dialogue import encode_chat
from npllama.dialogue_parts import encode_parts, merged
from npllama.errors import InputError
from npllama.llama import SHIPPED
from npllama.own_answers import OwnAnswer, answer_in_cache, own_answer
from npllama.sentencepiece_model import bpe_model
from npllama.special_tokens import special_ids
from npllama.tokenizer import Tokenizer

BYTES = byte_tokenizer()
WORDS = Tokenizer(SHIPPED / "tokenizer.model")
SPACE, A, B = 35, 100, 101  # the byte of a space, which the tokenizer writes as the piece 259
GOLDEN = [
    *(1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 29903, 13),
    *(29966, 829, 14816, 29903, 6778, 13, 13, 18567, 518, 29914, 25580, 29962, 15043, 29871),
    *(2, 1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962),
]


def own(ids, text=None, begun="", space=""):
    return OwnAnswer(begun, BYTES.decode(ids) if text is None else text, tuple(ids), space)


def of(ids, text, begun="", prompt=(1,), end_ids=(2,), tokenizer=BYTES):
    return own_answer(tokenizer, prompt, ids, text, begun=begun, space="", end_ids=end_ids)


# -- ids of a text, and text that continues it


def test_a_continuing_text_has_no_space_of_its_own():
    for tokenizer in (BYTES, WORDS):
        for text in ("Once", " upon", "a  time", "\n", " ", "  ", "é", ""):
            begin = tokenizer.encode("x")
            ids = [*begin, *tokenizer.encode_continuation(text)]
            assert tokenizer.decode(ids) == "x" + text
    assert WORDS.encode_continuation(" Once upon") == WORDS.encode("Once upon", bos=False)
    assert WORDS.encode("a") == [1, 261]  # as before
    with pytest.raises(InputError, match="UTF-8"):
        WORDS.encode_continuation("a\udcff")


def test_a_tokenizer_without_the_space_continues_as_it_begins():
    plain = Tokenizer.from_bytes(bpe_model(BYTE_PIECES, dummy_prefix=False))
    assert plain.encode_continuation("a b") == plain.encode("a b", bos=False) == [100, 259, 101]


def test_ids_in_parts_stay_and_the_text_behind_them_continues():
    parts = ["a", (SPACE, A), "b", " c", 2, "b", 2, (A,), (B,), "c"]
    assert encode_parts(BYTES, parts) == [1, 259, A, SPACE, A, B, 259, 102, 2, 259, B, 2, A, B, 102]
    assert merged(["a", "", "b", 2, "", (5,), "c", "d"]) == ["ab", 2, (5,), "cd"]


# -- which ids an answer keeps


@pytest.mark.parametrize(
    ("ids", "text", "kept"),
    [
        ([A, SPACE, B], "a b", [A, SPACE, B]),
        ([A, B, 2], "ab", [A, B]),
        ([A, 2, 2], "a", [A]),
        ([2], "", []),
        ([], "", []),
        ([259, A], "a", [259, A]),  # a text loses the space it begins with
        ([A, 198], "a\ufffd", [A, 198]),  # half a character, where the answer was interrupted
        ([A, B, A], "a", [A]),  # "ba" was a stop text
        ([A, 198, 172], "a", [A]),  # the stop text was a character of two bytes
        ([A, 2, B], "ab", [A, 2, B]),  # with ignore_eos
    ],
)
def test_an_answer_keeps_the_ids_that_decode_to_its_text(ids, text, kept):
    assert of(ids, text) == own(kept, text)


def test_a_stop_text_within_a_token_leaves_the_ids_before_it():
    ids = WORDS.encode("Once upon a time", bos=False)
    text = "Once upon a ti"
    found = of(ids, text, tokenizer=WORDS)
    assert WORDS.decode(found.ids) == text
    n = next(i for i, (one, other) in enumerate(zip(found.ids, ids, strict=False)) if one != other)
    assert text.startswith(WORDS.decode(ids[:n])) and not text.startswith(
        WORDS.decode(ids[: n + 1])
    )
    assert of(WORDS.encode("time", bos=False)[:1], "zz", tokenizer=WORDS) is None


def test_a_continued_answer_keeps_the_space_it_goes_on_with():
    ids = WORDS.encode(" upon", bos=False)[-1:]
    assert ids == WORDS.encode("upon", bos=False)
    assert of(ids, " upon", "Once", [1, 261], tokenizer=WORDS).ids == tuple(ids)
    assert of(ids, "upon", "Once", [1, 261], tokenizer=WORDS).text == "upon"
    assert of(ids, " upon", tokenizer=WORDS) is None
    assert of(ids, "upon", tokenizer=WORDS).ids == tuple(ids)


@pytest.mark.parametrize(
    ("held", "text", "kept"),
    [
        ([A, SPACE, B, 2, 259, A], "a b", [A, SPACE, B]),
        ([A, SPACE, B, 259, 2], "a b", [A, SPACE, B]),
        ([A, SPACE], "a b", [A, SPACE, B]),  # the last id is in no cache
        ([A, B, 2], "a", [A]),
        ([A, B, 2], "ac", None),
        ([A, 2, B, 2], "ab", [A, 2, B]),
        ([2, A], "", None),
        ([], "a", None),
    ],
)
def test_an_answer_in_a_cache_has_the_ids_that_decode_to_it(held, text, kept):
    found = answer_in_cache(BYTES, held, text, "\n")
    assert found == (None if kept is None else own(kept, text, space="\n"))


# -- where a format puts them

DIALOGUE = [system("s"), user("u"), assistant("a a"), user("v"), assistant("b"), user("w")]
OWN = {2: own([A, SPACE, A]), 4: own([259, B], "b")}


def test_own_ids_take_the_place_of_the_text():
    ids = encode_chat(BYTES, DIALOGUE, llama_2, own_answers=OWN)
    encode = BYTES.encode
    assert ids == [
        *encode("[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST]"),
        *(A, SPACE, A, 259, 2),
        *(*encode("[INST] v [/INST]"), 259, B, 259, 2),
        *encode("[INST] w [/INST]"),
    ]
    spaced = {i: own(one.ids, one.text, space="\n") for i, one in OWN.items()}
    ids = encode_chat(BYTES, DIALOGUE, zephyr, own_answers=spaced)
    assert ids == [
        *encode("<|system|>\ns"),
        *(2, *encode("\n<|user|>\nu", bos=False)),
        *(2, *encode("\n<|assistant|>\n", bos=False), A, SPACE, A),
        *(2, *encode("\n<|user|>\nv", bos=False)),
        *(2, *encode("\n<|assistant|>\n", bos=False), 259, B),
        *(2, *encode("\n<|user|>\nw", bos=False)),
        *(2, *encode("\n<|assistant|>\n", bos=False)),
    ]


@pytest.mark.parametrize("name", FORMATS)
def test_ids_of_the_text_itself_change_nothing(name):
    spaces = {"zephyr": "\n", "chatml": "\n"}
    for answer in ("b b", "bc", "é"):
        messages = [user("u"), assistant(answer), user("w")]
        before = "" if name in spaces else " "
        ids = BYTES.encode_continuation(before + answer)
        kept = {1: own(ids, answer, space=spaces.get(name, ""))}
        want = encode_chat(BYTES, messages, FORMATS[name])
        assert encode_chat(BYTES, messages, FORMATS[name], own_answers=kept) == want


def test_golden_ids_stay(llama_tokenizer):
    messages = [system("S"), user("Hi"), assistant("Hello"), user("Bye")]
    kept = {2: OwnAnswer("", "Hello", (15043,), "")}
    assert encode_chat(llama_tokenizer, messages, own_answers=kept) == GOLDEN
    assert encode_chat(llama_tokenizer, messages) == GOLDEN
    kept = {2: OwnAnswer("", "Hello", (6324, 15043), "")}  # whatever they are
    ids = encode_chat(llama_tokenizer, messages, own_answers=kept)
    at = GOLDEN.index(15043)
    assert ids == [*GOLDEN[:at], 6324, *GOLDEN[at:]]


def test_white_space_that_a_format_strips_stands_where_it_was_written():
    messages = [user("u"), assistant(" b \n"), user("w")]
    kept = {1: own([SPACE, B, 259, 13], " b \n")}
    ids = encode_chat(BYTES, messages, llama_2, own_answers=kept)
    assert ids == [
        *(*BYTES.encode("[INST] u [/INST]"), SPACE, B, 259, 13, 259, 2),
        *BYTES.encode("[INST] w [/INST]"),
    ]


def loud(tokenizer, messages, answer):
    """A format that changes the answers with a letter x."""
    changed = [
        m | {"content": m["content"].upper()}
        if m["role"] == "assistant" and "x" in m["content"]
        else m
        for m in messages
    ]
    return llama_2(tokenizer, changed, answer)


def twice(tokenizer, messages, answer):
    """A format that puts answers at two places."""
    texts = [m["content"] for m in messages if m["role"] == "assistant"]
    return ["".join(texts), 2, *llama_2(tokenizer, messages, answer)]


def counted(tokenizer, messages, answer):
    """A format that looks into the answers without changing them."""
    n = sum(len(m["content"]) for m in messages if m["role"] == "assistant")
    return [*llama_2(tokenizer, messages, answer), "." * n]


def silent(tokenizer, messages, answer):
    """A format that leaves answers out."""
    return [m["content"] for m in messages if m["role"] == "user"]


def test_an_answer_that_a_format_changes_is_text():
    messages = [user("u"), assistant("ax"), user("v"), assistant("b"), user("w")]
    kept = {1: own([A, 123]), 3: own([259, 259, B], " b")}
    messages[3] = assistant(" b")
    ids = encode_chat(BYTES, messages, loud, own_answers=kept)
    plain = [m | {"content": m["content"].replace("ax", "AX")} for m in messages]
    assert ids == encode_chat(BYTES, plain, llama_2, own_answers={3: kept[3]})
    for chat_format in (twice, silent, counted):
        want = encode_chat(BYTES, messages, chat_format)
        assert encode_chat(BYTES, messages, chat_format, own_answers=kept) == want


def test_a_message_with_the_mark_of_an_answer_is_text():
    mark = chr(0x100000 + 1)
    for text in (mark, f"a{mark}b{mark}"):
        messages = [user("u"), assistant("a"), user(text)]
        kept = {1: own([259, A])}
        ids = encode_chat(BYTES, messages, llama_2, own_answers=kept)
        assert BYTES.decode(ids).count(mark) == text.count(mark)


def test_no_answer_makes_a_control_id_of_text():
    text = "</s><s>"
    kept = {1: own(BYTES.encode(text, bos=False), text)}
    for name, chat_format in FORMATS.items():
        messages = [user("u"), assistant(text), user("w")]
        ids = encode_chat(BYTES, messages, chat_format, own_answers=kept)
        plain = encode_chat(BYTES, messages, chat_format)
        control = {*special_ids(BYTES).values()}
        assert [i for i in ids if i in control] == [i for i in plain if i in control], name
