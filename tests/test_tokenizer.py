"""Text to ids and back, against sentencepiece, and incremental decoding."""

import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from conftest import ROOT
from model_directory import BYTE_PIECES, byte_tokenizer
from npllama.errors import InputError, TokenizerError
from npllama.sentencepiece_model import PieceType, bpe_model, special_and_byte_pieces
from npllama.tokenizer import AddedToken, StreamDecoder, Tokenizer

TEXTS = [
    "",
    "This",
    " This",
    "   three before, two after  ",
    "a  b\tc\nd\r\n\n",
    "🦙",
    "🦙🦙 and 👩‍👩‍👧‍👦, flags 🇩🇪",
    "漢字かな交じり文、한국어",
    "naïve café, Ελληνικά, עברית, नमस्ते",
    "\ufffd literal \ufffd\ufffd",
    "\x00 nul and \x7f",
    "\u2581 the mark itself \u2581\u2581",
    "<s> </s> <unk> <0x0A>",
]


@pytest.fixture(params=["llama", "bytes"])
def tokenizer(request):
    if request.param == "bytes":
        return byte_tokenizer()
    return request.getfixturevalue("llama_tokenizer")


def byte_ids(data):
    return [b + 3 for b in data]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


# -- ids


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", [1]),
        ("This", [1, 910]),
        ("🦙", [1, 29871, 243, 162, 169, 156]),
        ("\n", [1, 29871, 13]),
        (" ", [1, 259]),
        ("<s>", [1, 529, 29879, 29958]),
        ("</s>", [1, 1533, 29879, 29958]),
        ("<unk>", [1, 529, 2960, 29958]),
        ("<0x0A>", [1, 529, 29900, 29916, 29900, 29909, 29958]),
    ],
)
def test_texts_have_the_ids_that_llama_was_trained_on(llama_tokenizer, text, ids):
    assert llama_tokenizer.encode(text) == ids
    assert llama_tokenizer.encode(text, bos=False) == ids[1:]
    assert llama_tokenizer.decode(ids) == text


def test_special_ids_are_llamas(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert [tokenizer.piece(i) for i in (0, 1, 2, 13)] == ["<unk>", "<s>", "</s>", "<0x0A>"]
    assert [tokenizer.piece(b + 3) for b in range(256)] == [f"<0x{b:02X}>" for b in range(256)]


def test_vocabulary_sizes(llama_tokenizer):
    assert llama_tokenizer.vocab_size == 32000
    assert byte_tokenizer().vocab_size == 260


def test_pieces_are_the_vocabularys(llama_tokenizer):
    assert llama_tokenizer.piece(910) == llama_tokenizer.piece(np.int32(910)) == "\u2581This"
    assert llama_tokenizer.piece(29871) == "\u2581"


def test_bytes_encode_to_themselves_after_the_dummy_prefix():
    text = "a 漢🦙"
    space, expected = 259, []
    for character in " " + text:
        expected += [space] if character == " " else byte_ids(character.encode())
    assert byte_tokenizer().encode(text, bos=False) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_no_text_makes_a_special_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and not {0, 1, 2} & set(ids[1:])
    # sentencepiece writes a space as this mark, so only this character is lost
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")


# -- incremental decoding


def streamed(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(id_) for id_ in ids] + [decoder.flush()]


def assert_streams_as_sentencepiece_decodes(tokenizer, ids):
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.processor.decode(list(ids)), ids
    for piece in pieces:
        piece.encode()  # raises an error for half of a surrogate pair


def random_id_sequences(tokenizer, n, seed, longest=24):
    """Random sequences of all kinds that are difficult to decode, n of each kind."""
    rng = np.random.default_rng(seed)
    spaces = [i for i in range(tokenizer.vocab_size) if set(tokenizer.piece(i)) == {"\u2581"}]
    spaces += byte_ids(b" ")
    control = [0, 1, 2]
    # bytes that begin, continue and violate UTF-8, including the edges of its forbidden ranges
    edges = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF]
    edges += [0xE0, 0xE1, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF]
    literal_fffd = byte_ids("\ufffd".encode())

    def some(pool):
        return rng.choice(pool, rng.integers(0, longest)).tolist()

    def whole():
        return rng.integers(0, tokenizer.vocab_size, rng.integers(0, longest)).tolist()

    def mixed(*pools):
        return [int(rng.choice(pools[k])) for k in rng.integers(0, len(pools), longest)]

    for _ in range(n):
        yield whole()
        yield some(byte_ids(range(256)))
        yield some(byte_ids(edges))
        yield mixed(byte_ids(edges), byte_ids(edges), literal_fffd, whole() or [2])
        yield mixed(control, spaces, whole() or [2])
        yield mixed(control, byte_ids(edges))
        yield [*some(spaces), *whole()]
        yield [1, *some(spaces), *whole()]
        yield [1, *some(control), *some(spaces), *some(byte_ids(edges))]


def test_streaming_equals_sentencepiece_on_random_ids(tokenizer):
    for ids in random_id_sequences(tokenizer, 150, seed=1):
        assert_streams_as_sentencepiece_decodes(tokenizer, ids)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_streaming_equals_sentencepiece_on_very_many_random_ids(tokenizer, seed):
    for ids in random_id_sequences(tokenizer, 1500, seed, longest=40):
        assert_streams_as_sentencepiece_decodes(tokenizer, ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("bos", [True, False])
def test_streaming_equals_sentencepiece_on_text(tokenizer, text, bos):
    assert_streams_as_sentencepiece_decodes(tokenizer, tokenizer.encode(text, bos))
    assert_streams_as_sentencepiece_decodes(tokenizer, byte_ids(text.encode()))


@pytest.mark.parametrize(
    "data",
    [
        b"\xf0\x9f\xa6",  # ends within a character
        b"\xf0\x9f\xa6A\x99",  # interrupted
        b"\x80\xbf\x80",  # continuation bytes only
        b"\xc0\xaf \xe0\x80\xaf \xf0\x80\x80\xaf",  # overlong
        b"\xed\xa0\x80\xed\xbf\xbf",  # surrogates
        b"\xf4\x8f\xbf\xbf \xf4\x90\x80\x80 \xf5\x80\x80\x80",  # the last code point, and beyond
        b"\xef\xbf\xbd\xef\xbf\xef\xbf\xbd",  # a literal U+FFFD, and a part of one
        b"\xff\xfe\x00\x00",
        b"\xe2\xf0\x9f\xa6\x99",  # a new character instead of a continuation byte
    ],
)
def test_streaming_equals_sentencepiece_on_invalid_bytes(tokenizer, data):
    ids = byte_ids(data)
    for wrapped in (ids, [1, *ids], [*ids, 2], ids + tokenizer.encode("on", bos=False)):
        assert_streams_as_sentencepiece_decodes(tokenizer, wrapped)


def test_streaming_equals_sentencepiece_on_every_pair_of_bytes(llama_tokenizer):
    for first in range(0x70, 0x100):
        for second in range(0x70, 0x100):
            assert_streams_as_sentencepiece_decodes(llama_tokenizer, byte_ids([first, second]))


def test_every_id_streams_alone_and_after_another(tokenizer):
    for id_ in range(0, tokenizer.vocab_size, 1 if tokenizer.vocab_size < 1000 else 7):
        for ids in ([id_], [1, id_], [id_, id_]):
            assert_streams_as_sentencepiece_decodes(tokenizer, ids)


def test_what_was_emitted_is_final_and_a_flush_completes_it_at_any_moment(tokenizer):
    for ids in random_id_sequences(tokenizer, 12, seed=3, longest=16):
        decoder, said = StreamDecoder(tokenizer), ""
        for n, id_ in enumerate(ids, start=1):
            said += decoder.push(id_)
            text = tokenizer.processor.decode(ids[:n])
            assert said + copy.copy(decoder).flush() == text
            # only the start of one character is delayed: at most three bytes
            assert text.startswith(said) and text[len(said) :] in (
                "",
                "\ufffd",
                "\ufffd" * 2,
                "\ufffd" * 3,
            )


def test_a_character_appears_with_its_last_byte(llama_tokenizer):
    assert streamed(llama_tokenizer, [29871, 243, 162, 169, 156]) == ["", "", "", "", "🦙", ""]
    assert streamed(llama_tokenizer, byte_ids(b"\xc3\xa9\xe6\xbc\xa2")) == [
        "",
        "é",
        "",
        "",
        "漢",
        "",
    ]


@pytest.mark.parametrize(
    "data", [b"\xe2A", b"\xe0\x80", b"\xed\xa0", b"\xf0\x9f\xa6A", b"\xf4\x90"]
)
def test_bytes_that_cannot_become_a_character_are_not_held(tokenizer, data):
    decoder = StreamDecoder(tokenizer)
    said = "".join(decoder.push(id_) for id_ in byte_ids(data))
    assert said == tokenizer.processor.decode(byte_ids(data))


def test_text_appears_with_its_id(llama_tokenizer):
    assert streamed(llama_tokenizer, [1, 910, 338, 263, 1243]) == [
        *("", "This", " is", " a", " test", "")
    ]


def test_only_the_first_piece_of_the_text_loses_its_space(llama_tokenizer):
    this = 910
    assert streamed(llama_tokenizer, [this, this])[:2] == ["This", " This"]
    assert streamed(llama_tokenizer, [1, this, 2, 1, this])[1::3] == ["This", " This"]
    assert "".join(streamed(llama_tokenizer, [1, 259, this])) == "  This"


def test_unfinished_bytes_are_said_at_the_flush_and_once(llama_tokenizer):
    decoder = StreamDecoder(llama_tokenizer)
    assert [decoder.push(id_) for id_ in byte_ids(b"\xf0\x9f")] == ["", ""]
    assert [decoder.flush(), decoder.flush()] == ["\ufffd\ufffd", ""]


def counting_ids(tokenizer):
    """Replace the tokenizer's processor by one that records the ids passed to it."""
    processor, asked = tokenizer.processor, []

    def counted(method):
        def call(ids):
            asked.extend(ids if isinstance(ids, list) else [ids])
            return method(ids)

        return call

    names = ("decode", "id_to_piece", "is_byte", "is_control", "is_unknown")
    methods = {name: counted(getattr(processor, name)) for name in names}
    tokenizer.processor = SimpleNamespace(**methods)
    return asked


@pytest.mark.parametrize("kind", ["text", "bytes", "broken", "control"])
def test_a_token_costs_the_same_however_long_the_text(kind):
    tokenizer = byte_tokenizer()
    rng = np.random.default_rng(4)
    pool = {
        "text": tokenizer.encode("漢 🦙 a  b"),
        "bytes": byte_ids(range(256)),
        "broken": byte_ids([0xE0, 0xF0, 0x80, 0xF4]),
        "control": [0, 1, 2],
    }[kind]
    asked = counting_ids(tokenizer)
    decoder = StreamDecoder(tokenizer)
    for id_ in rng.choice(pool, 3000).tolist():
        asked.clear()
        decoder.push(id_)
        assert 1 <= len(asked) <= 6
        state = [v for v in vars(decoder).values() if isinstance(v, bytes | str | list)]
        assert state and sum(len(v) for v in state) <= 3  # at most a part of one character


# -- errors


@pytest.mark.parametrize("bad", [-1, np.int64(-1), np.int32(-1), 260, np.int64(260), 2**31, 2**70])
def test_ids_that_the_tokenizer_does_not_have_are_refused(bad):
    tokenizer = byte_tokenizer()
    for call in (
        lambda: tokenizer.decode([1, bad]),
        lambda: tokenizer.piece(bad),
        lambda: StreamDecoder(tokenizer).push(bad),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert f"token id {bad} " in one_line(error) and "260" in one_line(error)


def test_numpys_integers_are_ids(tokenizer):
    ids = tokenizer.encode("a 🦙")
    for dtype in ("int32", "int64", "uint16"):
        array = np.array(ids, dtype=dtype)
        assert tokenizer.decode(array) == "".join(streamed(tokenizer, array)) == "a 🦙"


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\ud83e"])
def test_text_with_a_lone_surrogate_is_refused(tokenizer, text):
    with pytest.raises(InputError) as error:
        tokenizer.encode(text)
    assert "UTF-8" in one_line(error)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    assert f"{path} does not exist" in one_line(error)


def test_a_directory_is_not_a_tokenizer(tmp_path):
    with pytest.raises(TokenizerError) as error:
        Tokenizer(tmp_path)
    assert f"{tmp_path} cannot be read" in one_line(error)


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"not a model",
        b"\x00" * 100,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
        b'{"version": "1.0", "added_tokens": []}',
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path, contents):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(contents)
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    assert f"{path} is not a sentencepiece model" in one_line(error)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_model_is_named(tmp_path, llama_tokenizer, keep):
    model = llama_tokenizer.processor.serialized_model_proto()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model[: int(len(model) * keep)])
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    assert str(path) in one_line(error)


def test_a_model_without_bos_is_not_llamas(tmp_path):
    path = tmp_path / "tokenizer.model"
    pieces = [p for p in special_and_byte_pieces() if p[2] != PieceType.CONTROL]
    path.write_bytes(bpe_model(pieces))
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    assert str(path) in one_line(error) and "BOS" in one_line(error)


def test_a_model_read_from_bytes_is_the_model_read_from_a_file(tmp_path, tokenizer):
    model = tokenizer.processor.serialized_model_proto()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    text = "a 🦙 b"
    assert Tokenizer(path).encode(text) == Tokenizer.from_bytes(model).encode(text)
    assert Tokenizer(path).encode(text) == tokenizer.encode(text)


# -- other settings for spaces

# Serialized settings that are appended to a sentencepiece model: no dummy prefix, extra spaces
# removed (the default of the trainer), and both.
SETTINGS = {
    "no prefix": b"\x18\x00",
    "spaces removed": b"\x20\x01",
    "both": b"\x18\x00\x20\x01",
    "prefix": b"\x18\x01\x20\x00",
}
SHIPPED = ROOT / "npllama" / "assets" / "stories" / "tokenizer.model"
RUNS = [("\u2581" * n, -float(n), PieceType.NORMAL) for n in (2, 3, 4)]
# without the piece of a single space, with or without other pieces that begin with a space
VOCABULARIES = {
    "shipped": lambda: SHIPPED.read_bytes(),
    "bytes": lambda: bpe_model(BYTE_PIECES),
    "runs": lambda: bpe_model([*BYTE_PIECES, *RUNS]),
    "runs alone": lambda: bpe_model([*special_and_byte_pieces(), *RUNS]),
    "no spaces": lambda: bpe_model([*special_and_byte_pieces(), ("a", 0.0, PieceType.NORMAL)]),
}


@pytest.fixture(params=SETTINGS)
def settings(request):
    flags = SETTINGS[request.param]
    return b"\x1a" + bytes([len(flags)]) + flags


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_ids_and_text_are_sentencepieces_whatever_it_does_with_spaces(settings, vocabulary):
    tokenizer = Tokenizer.from_bytes(VOCABULARIES[vocabulary]() + settings)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        assert ids == tokenizer.processor.encode(text)
        assert tokenizer.decode(ids) == tokenizer.processor.decode(ids)
        assert_streams_as_sentencepiece_decodes(tokenizer, ids)
        assert_streams_as_sentencepiece_decodes(tokenizer, [1, *ids, 2, *ids])
    for ids in random_id_sequences(tokenizer, 20, seed=5):
        assert_streams_as_sentencepiece_decodes(tokenizer, ids)


def test_the_first_piece_loses_its_space_only_where_a_dummy_prefix_may_have_made_it():
    model = VOCABULARIES["shipped"]()
    space, a = 975, 261  # "\u2581", "\u2581a"
    for name, text in (
        ("prefix", "  a a"),
        ("no prefix", "   a a"),
        ("spaces removed", "a a"),
        ("both", "a a"),
    ):
        flags = SETTINGS[name]
        tokenizer = Tokenizer.from_bytes(model + b"\x1a" + bytes([len(flags)]) + flags)
        assert tokenizer.decode([1, space, space, a, a]) == text
        assert "".join(streamed(tokenizer, [1, space, space, a, a])) == text


def test_the_settings_are_those_of_real_tokenizers():
    """sentencepiece's trainer writes these settings by default, and without a dummy prefix."""
    for options in ({}, {"add_dummy_prefix": False}):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a cat sat on a mat"] * 3),
            model_writer=model,
            vocab_size=275,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
            **options,
        )
        tokenizer = Tokenizer.from_bytes(model.getvalue())
        assert tokenizer.decode(tokenizer.encode("  a   cat ")) == "a cat"
        for ids in random_id_sequences(tokenizer, 10, seed=6):
            assert_streams_as_sentencepiece_decodes(tokenizer, ids)


# -- added tokens

ADDED = {262: AddedToken("<|end|>", True), 264: AddedToken("<step>", False)}


def added_tokenizer():
    return byte_tokenizer().for_model(270, end_ids=(266,), added=ADDED)


def test_control_tokens_decode_to_nothing_and_other_added_ones_to_their_content():
    tokenizer = added_tokenizer()
    x = tokenizer.encode("x", bos=False)
    for ids, text in (
        ([1, *x, 262], "x"),
        ([1, *x, 264, *x], "x<step> x"),
        ([264, *x], "<step> x"),  # after text
        ([262, *x], "x"),  # before any text
        ([266, 269, 261], ""),  # an EOS without a name, and padding rows
        ([243, 162, 264, 169, 156], "\ufffd\ufffd<step>\ufffd\ufffd"),
        ([243, 162, 262, 169], "\ufffd\ufffd\ufffd"),
        ([264, 264], "<step><step>"),
    ):
        assert tokenizer.decode(ids) == text == "".join(streamed(tokenizer, ids))
        assert tokenizer.decode(np.array(ids)) == text
    assert [tokenizer.piece(i) for i in (1, 262, 264, 266)] == ["<s>", "<|end|>", "<step>", ""]


def test_text_never_makes_an_added_token():
    tokenizer = added_tokenizer()
    for text in ("<|end|>", "a<step>b", "<step>"):
        assert tokenizer.encode(text) == byte_tokenizer().encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_end_id_has_no_text_whatever_its_name():
    tokenizer = byte_tokenizer().for_model(270, end_ids=(264,), added=ADDED)
    assert tokenizer.decode([264, 100]) == "a"


def test_ids_beyond_the_models_rows_are_refused_with_added_tokens_too():
    tokenizer = byte_tokenizer().for_model(264, added=ADDED)
    assert 264 not in tokenizer.added
    for bad in (264, -1, 10**9):
        with pytest.raises(InputError, match=f"token id {bad} is not in"):
            tokenizer.decode([bad])


def test_added_tokens_leave_pieces_as_they_are():
    names = {1: "BOS", 2: "</s>", 100: "x", 259: "\u2581"}
    added = {id_: AddedToken(name, False) for id_, name in names.items()}
    tokenizer = byte_tokenizer().for_model(260, added=added)
    ids = [1, 259, 100, 259, 2]
    assert tokenizer.decode(ids) == byte_tokenizer().decode(ids) == "a "
    assert [tokenizer.piece(i) for i in ids] == [byte_tokenizer().piece(i) for i in ids]


def test_a_control_piece_that_is_named_as_no_control_token_has_its_text():
    model = bpe_model([*BYTE_PIECES, ("<step>", 0.0, PieceType.CONTROL)])
    plain = Tokenizer.from_bytes(model)
    named = plain.for_model(261, added={260: AddedToken("<step>", False)})
    assert (plain.decode([100, 260]), named.decode([100, 260])) == ("a", "a<step>")
    other = plain.for_model(261, added={260: AddedToken("<stop>", False)})
    assert other.decode([100, 260]) == "a"


# -- BOS and EOS of a prompt


@pytest.mark.parametrize(
    "bos, eos, ids", [(True, False, [1, 7]), (False, False, [7]), (True, True, [1, 7, 2])]
)
def test_a_prompt_has_bos_and_eos_as_asked_and_an_empty_one_bos_alone(bos, eos, ids):
    tokenizer = byte_tokenizer()
    tokenizer.add_bos, tokenizer.add_eos = bos, eos
    text = tokenizer.encode("ab", bos=False)
    assert tokenizer.encode_prompt("ab") == [
        i for id_ in ids for i in (text if id_ == 7 else [id_])
    ]
    assert tokenizer.encode_prompt("") == [1]
    assert tokenizer.encode("ab") == [1, *text]
