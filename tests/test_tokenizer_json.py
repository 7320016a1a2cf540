"""tokenizer.json of Llama's type, with the ids of sentencepiece. Other types are refused by
name."""

import json
import random

import pytest
import sentencepiece

from conftest import FIXTURES, ROOT
from npllama.errors import TokenizerError
from npllama.tokenizer import Tokenizer

WRITTEN = FIXTURES / "tokenizers"  # written by transformers 5 in tools/make_reference.py
SHIPPED = ROOT / "npllama" / "assets" / "stories" / "tokenizer.model"
HARD = [
    *("", " ", "  ", "   two  and   three    ", "\n", " \n \n\n", "\t\tx\r\n", "a"),
    *(
        "🦙",
        "a🦙🦙b",
        "👩‍👩‍👧‍👦 🇩🇪",
        "漢字かな交じり文、한국어",
        "nai\u0308ve cafe\u0301 é",
        "ก็ नमस्ते",
    ),
    *("<s>", "</s> <unk> <0x0A>", "a<s>b", "\u2581", "a\u2581 \u2581\u2581b", "\ufffd\ufffd"),
    *("\x00 nul \x7f", "\ufeffmark", "e\u0301" * 20, "word" * 50, " " * 40 + "deep", "1234567890"),
]
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def sequence(*normalizers):
    return {"type": "Sequence", "normalizers": list(normalizers)}


def metaspace(scheme, **more):
    kind = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    return kind | more


def as_json(processor, by_scores=False):
    """A sentencepiece model as tokenizer.json.

    The merges are all ways to split a piece into two pieces. They are sorted by the id of the
    piece, as in transformers 5, or by its score, as in older versions.
    """
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for id_, piece in enumerate(pieces):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        splits = [(left, right) for left, right in splits if left in ids and right in ids]
        key = processor.get_score(id_) if by_scores else id_
        merges += [(key, left, right) for left, right in splits]
    merges.sort(key=lambda m: (m[0], len(m[1]), len(m[2])), reverse=by_scores)
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    model |= {"vocab": ids, "merges": [[left, right] for _, left, right in merges]}
    return {"added_tokens": [], "normalizer": None, "pre_tokenizer": metaspace("first")} | {
        "model": model
    }


def written(tmp_path, fields):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def processor_of(model):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


@pytest.fixture(scope="module")
def shipped():
    return processor_of(SHIPPED.read_bytes())


@pytest.fixture
def fields():
    return json.loads((WRITTEN / "tokenizer.json").read_text(encoding="utf-8"))


def random_texts(processor, n, seed):
    rng = random.Random(seed)
    letters = "      abcdefghijklmnopqrst\n\té漢🦙\u0301<s>\u2581"
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    for _ in range(n):
        yield "".join(rng.choice(letters) for _ in range(rng.randrange(40)))
        yield "".join(rng.choice(pieces) for _ in range(rng.randrange(12))).replace("\u2581", " ")


def assert_same(tokenizer, processor, n=300):
    """The tokenizer agrees with the sentencepiece model in all respects."""
    made, ids = tokenizer.processor, list(range(processor.vocab_size()))
    assert made.vocab_size() == len(ids)
    for method in ("id_to_piece", "is_byte", "is_control", "is_unknown"):
        assert getattr(made, method)(ids) == getattr(processor, method)(ids)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (processor.bos_id(), processor.eos_id())
    for text in [*HARD, *random_texts(processor, n, seed=1)]:
        expected = processor.encode(text)
        assert tokenizer.encode(text, bos=False) == expected, text
        assert tokenizer.decode(expected) == processor.decode(expected)


# -- ids


def test_what_transformers_5_writes_has_sentencepieces_ids(shipped):
    assert_same(Tokenizer(WRITTEN / "tokenizer.json"), shipped)


def test_its_ids_are_transformers_too():
    expected = json.loads((WRITTEN / "expected.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(WRITTEN / "tokenizer.json")
    assert len(expected) > 5
    for text, ids in expected.items():
        assert tokenizer.encode(text, bos=False) == ids


def test_the_tests_own_writer_writes_the_merges_of_transformers_5(shipped, fields):
    assert as_json(shipped)["model"]["merges"] == fields["model"]["merges"]
    assert as_json(shipped)["model"]["vocab"] == fields["model"]["vocab"]


@pytest.mark.parametrize("merges_as", ["pairs", "strings"])
@pytest.mark.parametrize(
    "normalizer, pre_tokenizer, prefix",
    [
        (sequence(PREPEND, REPLACE), None, True),
        (sequence(REPLACE), None, False),
        (REPLACE, None, False),
        (None, metaspace("first"), True),
        (None, metaspace("always"), True),
        (None, metaspace("never"), False),
        (None, {"type": "Sequence", "pretokenizers": [metaspace("first")]}, True),
    ],
)
def test_every_known_form_is_read(
    tmp_path, shipped, fields, merges_as, normalizer, pre_tokenizer, prefix
):
    fields |= {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    if merges_as == "strings":
        fields["model"]["merges"] = [" ".join(pair) for pair in fields["model"]["merges"]]
    no_prefix = b"" if prefix else b"\x1a\x02\x18\x00"  # merged into the settings
    original = processor_of(shipped.serialized_model_proto() + no_prefix)
    assert_same(Tokenizer(written(tmp_path, fields)), original, n=40)


@pytest.mark.parametrize("by_scores", [False, True])
def test_llama_2s_own_vocabulary_has_sentencepieces_ids(tmp_path, llama_tokenizer, by_scores):
    processor = llama_tokenizer.processor
    path = written(tmp_path, as_json(processor, by_scores))
    assert_same(Tokenizer(path), processor, n=400)


def test_the_first_merge_that_transformers_4_left_out_is_made_all_the_same(
    tmp_path, shipped, fields
):
    fields["model"]["merges"].remove(["\u2581", "t"])  # the piece has the score 0
    assert_same(Tokenizer(written(tmp_path, fields)), shipped)


def test_names_of_special_tokens_come_from_tokenizer_config(tmp_path, fields):
    vocabulary = fields["model"]["vocab"]
    for old, new in (("<s>", "<|begin|>"), ("</s>", "<|end|>"), ("<unk>", "<|what|>")):
        vocabulary[new] = vocabulary.pop(old)
    fields["added_tokens"] = []
    names = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "unk_token": "<|what|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Tokenizer(written(tmp_path, fields))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.processor.unk_id()) == (1, 2, 0)
    assert tokenizer.decode([1, 416, 2]) == tokenizer.decode([416])
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="has no piece <unk>"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("special", [True, False])
def test_a_piece_that_no_merge_makes_is_never_made_by_text(tmp_path, fields, special):
    vocabulary = fields["model"]["vocab"]
    vocabulary["a a"] = len(vocabulary)  # without a merge
    vocabulary["<pad>"] = len(vocabulary)
    token = {"id": vocabulary["<pad>"], "content": "<pad>", "special": special}
    fields["added_tokens"].append(token)
    tokenizer = Tokenizer(written(tmp_path, fields))
    for text in ("<pad>", "x<pad>y", "a a", "aa a a"):
        ids = tokenizer.encode(text)
        assert max(ids) < 1024 and tokenizer.decode(ids) == text
    assert tokenizer.decode([vocabulary["<pad>"]]) == ("" if special else "<pad>")


# -- errors


def changed(fields, **model):
    return fields | {"model": fields["model"] | model}


def without_a_split(fields):
    merges = fields["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    i = next(i for i, piece in enumerate(made) if made.count(piece) > 1)
    return changed(fields, merges=merges[:i] + merges[i + 1 :])


def with_a_split_last(fields):
    merges = fields["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    i = next(i for i, piece in enumerate(made) if made.count(piece) > 1)
    return changed(fields, merges=[*merges[:i], *merges[i + 1 :], merges[i]])


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": False}
LLAMA_3 = {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda f: f | {"pre_tokenizer": LLAMA_3}, "is a byte-level BPE, the kind of GPT-2 and"),
        (lambda f: f | {"decoder": BYTE_LEVEL}, "is a byte-level BPE"),
        (lambda f: changed(f, type="Unigram"), "is a Unigram model"),
        (lambda f: changed(f, type="WordPiece"), "is a WordPiece model"),
        (lambda f: changed(f, type="WordLevel"), "is a WordLevel model"),
        (lambda f: changed(f, byte_fallback=False), "is a BPE without byte fallback"),
        (lambda f: changed(f, continuing_subword_prefix="##"), "continuing_subword_prefix '##'"),
        (lambda f: changed(f, end_of_word_suffix="</w>"), "end_of_word_suffix '</w>'"),
        (lambda f: changed(f, dropout=0.1), "dropout 0.1"),
        (lambda f: changed(f, ignore_merges=True), "ignore_merges True"),
        (lambda f: f | {"normalizer": {"type": "NFKC"}}, "has the normalizer NFKC"),
        (
            lambda f: f | {"normalizer": sequence(PREPEND, {"type": "Lowercase"})},
            "has the normalizer Lowercase",
        ),
        (lambda f: f | {"normalizer": PREPEND | {"prepend": "x"}}, "normalizer Prepend (prepend"),
        (lambda f: f | {"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer Whitespace"),
        (lambda f: f | {"pre_tokenizer": metaspace("first", split=True)}, "split True"),
        (lambda f: f | {"pre_tokenizer": metaspace("first", replacement="_")}, "replacement '_'"),
        (lambda f: f | {"pre_tokenizer": None}, "does not replace spaces"),
        (lambda f: f | {"pre_tokenizer": 3}, "has the pre_tokenizer 3"),
        (lambda f: f | {"model": None}, "has no model"),
        (lambda f: {"version": "1.0"}, "has no model"),
        (lambda f: changed(f, vocab=[["a", -1.0]]), "has a damaged vocabulary"),
        (lambda f: changed(f, vocab={"a": "b"}), "has a damaged vocabulary"),
        (lambda f: changed(f, vocab=f["model"]["vocab"] | {"gap": 5000}), "are not 0, 1, 2"),
        (lambda f: changed(f, vocab=f["model"]["vocab"] | {"": 1024}), "a piece that is empty or"),
        (
            lambda f: changed(f, vocab=f["model"]["vocab"] | {"\ud800": 1024}),
            "or not valid Unicode",
        ),
        (lambda f: changed(f, vocab={"<unk>": 0, "<s>": 1}, merges=[]), "lacks the byte <0x00>"),
        (lambda f: changed(f, merges=None), "has no merges"),
        (lambda f: changed(f, merges=["a b c"]), "which is no pair of pieces"),
        (lambda f: changed(f, merges=[["a", 3]]), "which is no pair of pieces"),
        (lambda f: changed(f, merges=[["a", "q"]]), "whose union is not a piece"),
        (without_a_split, "lacks the merge"),
        (with_a_split_last, "in several places"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, fields, change, reason):
    path = written(tmp_path, change(fields))
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path} ") and reason in message and "\n" not in message
    assert "Llama 2's" in message and "pass token ids" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"version https://git-lfs.github.com"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError) as error:
        Tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
