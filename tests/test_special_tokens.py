"""The ids of a prompt whose control tokens are parsed."""

import pytest

from model_directory import byte_tokenizer
from npllama.special_tokens import encode_special, special_ids
from npllama.tokenizer import AddedToken

TOKENIZER = byte_tokenizer()


def plain(text, tokenizer=TOKENIZER):
    return tokenizer.encode(text, bos=False)


def test_every_token_that_no_text_makes_has_a_name():
    added = {260: AddedToken("<step>", False), 261: AddedToken("<end>", True)}
    names = {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert special_ids(TOKENIZER) == names
    tokenizer = TOKENIZER.for_model(262, added=added)
    assert special_ids(tokenizer) == names | {"<step>": 260, "<end>": 261}


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", [1]),
        ("a", [1, *plain("a")]),
        ("<s>", [1]),
        ("<s>a", [1, *plain("a")]),
        ("a</s>", [1, *plain("a"), 2]),
        ("a</s> <s>b", [1, *plain("a"), 2, *plain(" "), 1, *plain("b")]),
        ("</s></s>", [1, 2, 2]),
        ("<s <unk>s>", [1, *plain("<s "), 0, *plain("s>")]),
    ],
)
def test_names_become_ids_and_the_rest_is_text(text, ids):
    assert encode_special(TOKENIZER, text) == ids
    if text in ("", "a"):
        assert TOKENIZER.encode_prompt(text) == ids


def test_bos_and_eos_are_put_where_they_are_missing():
    tokenizer = byte_tokenizer()
    tokenizer.add_bos, tokenizer.add_eos = False, True
    assert encode_special(tokenizer, "") == [1]
    assert encode_special(tokenizer, "a") == [*plain("a"), 2] == tokenizer.encode_prompt("a")
    assert encode_special(tokenizer, "<s>a</s>") == [1, *plain("a"), 2]


def test_llama_2s_ids_are_those_of_its_published_format(llama_tokenizer):
    ids = encode_special(llama_tokenizer, "<s>[INST] Hello [/INST]</s><s>[INST] Hello [/INST]")
    turn = [1, 518, 25580, 29962, 15043, 518, 29914, 25580, 29962]
    assert ids == [*turn, 2, *turn]
