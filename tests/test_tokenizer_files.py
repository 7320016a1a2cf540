"""The tokenizer of a model directory: pieces, added tokens, EOS ids, and files that do not
match."""

import itertools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

from conftest import FIXTURES, TINY, make_llama
from model_directory import BYTE_PIECES, byte_tokenizer, random_tensors, write_model
from npllama.errors import ConfigError, InputError, TokenizerError, TokenizerWarning
from npllama.llama import Llama, load
from npllama.sampling_options import Sampling
from npllama.tokenizer import AddedToken
from npllama.tokenizer_files import read_tokenizer

WRITTEN = FIXTURES / "tokenizers"
WIDE = replace(TINY, vocab_size=270, eos_ids=(2,))  # 260 pieces; larger ids are added tokens


def write(directory, **files):
    """Write JSON files, by name without extension."""
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def model_with(directory, config=WIDE, pieces=True, **files):
    write_model(directory, config, tokenizer=pieces)
    return write(directory, **files)


def chain(config, ids, seed=0):
    """Weights of a model that, with greedy decoding, continues each of `ids` with the next."""
    rng = np.random.default_rng(seed)
    tensors = random_tensors(config)
    rows = rng.standard_normal((config.vocab_size, config.dim)).astype("float32")
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    head = np.zeros_like(rows)
    for before, after in itertools.pairwise(ids):
        head[after] += 30 * rows[before]
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = np.zeros_like(tensors[name])
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": head}
    return tensors | {"model.norm.weight": np.ones(config.dim, "float32")}


DECODER = {
    "tokenizer_config": {
        "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True},
            "261": {"content": "<|end|>", "special": True},
            "263": {"content": "<step>", "special": False},
        }
    }
}
ADDED_TOKENS = {
    "added_tokens": {"<|end|>": 261, "<step>": 263},
    "special_tokens_map": {"eos_token": "<|end|>", "pad_token": {"content": "<pad>"}},
}
ADDITIONAL = {
    "added_tokens": {"<|end|>": 261, "<step>": 263},
    "tokenizer_config": {"additional_special_tokens": ["<|end|>"]},
}
TOKENIZER_JSON = {
    "tokenizer": {
        "added_tokens": [
            {"id": 261, "content": "<|end|>", "special": True},
            {"id": 263, "content": "<step>", "special": False},
        ],
        "model": {"type": "Unigram"},  # the pieces are in tokenizer.model
    }
}
NAMINGS = {
    "added_tokens_decoder": DECODER,
    "added_tokens.json": ADDED_TOKENS,
    "additional": ADDITIONAL,
    "tokenizer.json": TOKENIZER_JSON,
    "all": ADDED_TOKENS | TOKENIZER_JSON | DECODER,
}


@pytest.mark.parametrize("files", NAMINGS.values(), ids=NAMINGS)
def test_each_file_may_name_added_tokens(tmp_path, files):
    tokenizer = read_tokenizer(model_with(tmp_path / "m", **files), WIDE)
    assert tokenizer.added == {
        261: AddedToken("<|end|>", True),
        263: AddedToken("<step>", False),
    }
    assert tokenizer.decode([1, 100, 261, 263]) == "a<step>"


def test_added_tokens_beyond_the_models_rows_are_ignored(tmp_path):
    directory = model_with(tmp_path / "m", added_tokens={"<pad>": 270, "<step>": 269})
    assert set(read_tokenizer(directory, WIDE).added) == {269}
    directory = model_with(tmp_path / "n", TINY, added_tokens={"<pad>": 260})
    assert load(directory, "numpy").generate("a", max_new_tokens=2, ignore_eos=True).text


@pytest.mark.parametrize("eos", [261, [2, 261], [2, 266]])
@pytest.mark.parametrize("named", [True, False])
def test_an_end_beyond_the_pieces_ends_the_text(tmp_path, eos, named):
    end = eos if isinstance(eos, int) else eos[-1]
    config = replace(WIDE, eos_ids=(end,))
    ids = [1, 100, 103, 101, end, 102]
    directory = write_model(tmp_path / "m", WIDE, tensors=chain(config, ids), eos_token_id=eos)
    if named:
        write(directory, added_tokens={"<|im_start|>": 260, "<|im_end|>": end})
    llama = load(directory, "numpy")
    completion = llama.generate("", max_new_tokens=8, temperature=0)
    assert (completion.ids, completion.finish_reason) == ([100, 103, 101, end], "eos")
    assert completion.text == "adb" == llama.tokenizer.decode(completion.ids)
    on = llama.generate("", max_new_tokens=5, temperature=0, ignore_eos=True)
    assert on.ids == [100, 103, 101, end, 102] and on.text == "adbc"
    again = llama.generate([1, 100, 103, 101, end], max_new_tokens=1, temperature=0)
    assert again.ids == [102]


def test_added_tokens_stream_as_their_text(tmp_path):
    ids = [1, 100, 263, 103, 2]
    directory = write_model(tmp_path / "m", WIDE, tensors=chain(WIDE, ids))
    llama = load(write(directory, **DECODER), "numpy")
    pieces = list(llama.stream("", max_new_tokens=8, temperature=0))
    assert pieces == ["a", "<step>", "d"]
    assert llama.generate("", max_new_tokens=8, temperature=0, stop="<st").text == "a"


def llama_with(ops, config, added=None):
    tokenizer = byte_tokenizer().for_model(config.vocab_size, added=added or {})
    return make_llama(ops, config, tokenizer=tokenizer)


@pytest.mark.array_calls
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padding_rows_and_holes_are_never_chosen(ops, penalty):
    config = replace(TINY, vocab_size=300, eos_ids=(2, 271, 5000))
    named = {262: AddedToken("<step>", False), 280: AddedToken("<|pad|>", True)}
    llama = llama_with(ops, config, named)
    sampling = Sampling(temperature=5.0, top_p=1, repetition_penalty=penalty)
    rows = llama.generate_batch(
        [[1, i, 265, 299] for i in range(4)],
        max_new_tokens=50, sampling=sampling, seed=0, ignore_eos=True,
    )  # fmt: skip
    chosen = {id_ for row in rows for id_ in row.ids}
    assert {id_ for id_ in chosen if id_ >= 260} <= {262, 271, 280}
    assert all(np.isfinite(row.log_probs).all() for row in rows)
    assert llama_with(ops, config, named)._n_tokens == 281


def test_without_holes_there_is_no_mask(ops):
    for end_ids, named, n_tokens in (
        ((2,), {}, 260),
        ((260,), {261: AddedToken("x", False)}, 262),
        ((2, 400), {}, 260),
    ):
        config = replace(TINY, vocab_size=300, eos_ids=end_ids)
        llama = llama_with(ops, config, named)
        assert (llama._n_tokens, llama._allowed) == (n_tokens, None)
    assert Llama(config, llama.parameters, ops)._n_tokens == 300


def test_a_prompt_may_hold_any_row(ops):
    config = replace(TINY, vocab_size=300)
    llama = make_llama(ops, config)  # more rows than the tokenizer has pieces
    prompt = [1, 100, 265, 299]
    completion = llama.generate(prompt, max_new_tokens=3, temperature=0, ignore_eos=True)
    whole = llama.tokenizer.decode(prompt + completion.ids)
    assert whole == llama.tokenizer.decode(prompt) + completion.text
    with pytest.raises(InputError, match="token id 300 is not in"):
        llama.tokenizer.decode([300])


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<a>": -1}},
        {"added_tokens": {"<a>": "261"}},
        {"added_tokens": {"<a>": True}},
        {"added_tokens": {"<a>": None}},
        {"tokenizer_config": {"added_tokens_decoder": [1]}},
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"261": {"content": 3}}}},
        {"tokenizer_config": {"added_tokens_decoder": {"261": "<a>"}}},
        {"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: {"content": "<a>"}}}},
        {"added_tokens": {"\ud800": 261}},
        {"tokenizer_config": {"add_bos_token": "no"}},
        {"tokenizer_config": {"add_eos_token": 1}},
    ],
)
def test_what_is_no_token_is_one_line_that_names_the_file(tmp_path, files):
    directory = model_with(tmp_path / "m", **files)
    with pytest.raises(TokenizerError) as error:
        load(directory, "numpy")
    (name,) = files
    assert str(directory / f"{name}.json") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "files, shown",
    [
        ({"added_tokens": {"<a>": "261"}}, "'<a>' has the id '261'"),
        ({"added_tokens": {"<a>": None}}, "'<a>' has the id None"),
        ({"tokenizer_config": {"added_tokens_decoder": {"261": {}}}}, "None has the id 261"),
    ],
)
def test_what_is_no_token_is_shown_as_it_is(tmp_path, files, shown):
    with pytest.raises(TokenizerError, match=f"the added token {shown}: expected a text and"):
        load(model_with(tmp_path / "m", **files), "numpy")


@pytest.mark.parametrize("name", ["added_tokens", "tokenizer_config"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name):
    directory = model_with(tmp_path / "m")
    (directory / f"{name}.json").write_text("{")
    with pytest.raises(ConfigError, match=f"{name}.json is not valid JSON"):
        load(directory, "numpy")


def test_beside_a_tokenizer_model_a_tokenizer_json_that_cannot_be_read_names_nothing(tmp_path):
    directory = model_with(tmp_path / "m")
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1")
    assert load(directory, "numpy").tokenizer.added == {}


# -- the file that contains the pieces

JSON_ONLY = replace(TINY, vocab_size=1030)


def json_only(directory, **files):
    model_with(directory, JSON_ONLY, pieces=False, **files)
    if "tokenizer" not in files:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (directory / name).write_bytes((WRITTEN / name).read_bytes())
    return directory


def test_a_directory_as_transformers_5_saves_it_loads_with_its_added_tokens(tmp_path):
    llama = load(json_only(tmp_path / "m"), "numpy")
    assert llama.encode("Once upon") == load().encode("Once upon")
    assert llama.tokenizer.decode([1, 416, 1025, 1024]) == load().tokenizer.decode([416]) + "<step>"
    assert llama._n_tokens == 1026 and llama.notes == ()


def test_tokenizer_model_wins(tmp_path):
    directory = json_only(tmp_path / "m")
    write_model(tmp_path / "bytes", JSON_ONLY)
    (tmp_path / "bytes" / "tokenizer.model").rename(directory / "tokenizer.model")
    assert load(directory, "numpy").tokenizer.vocab_size == len(BYTE_PIECES)


def test_a_tokenizer_json_of_another_kind_is_refused_where_text_is_asked_for(tmp_path):
    directory = json_only(tmp_path / "m", tokenizer={"model": {"type": "Unigram"}})
    llama = load(directory, "numpy")
    assert len(llama.generate([1, 5], max_new_tokens=2, ignore_eos=True).ids) == 2
    for call in (lambda: llama.encode("a"), lambda: llama.stream([1])):
        with pytest.raises(TokenizerError, match=r"tokenizer\.json is a Unigram model: expected"):
            call()


def test_without_either_both_are_named(tmp_path):
    llama = load(write_model(tmp_path / "m", TINY, tokenizer=False), "numpy")
    with pytest.raises(TokenizerError, match=r"/m has no tokenizer\.model or .*: copy"):
        llama.encode("a")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_tokenizer_of_another_model_is_named_with_its_directory(tmp_path, name):
    directory = model_with(tmp_path / "m", replace(TINY, vocab_size=200), name.endswith("l"))
    if name.endswith("json"):
        for file in (name, "tokenizer_config.json"):
            (directory / file).write_bytes((WRITTEN / file).read_bytes())
    with pytest.raises(TokenizerError, match=rf"/m/{name} has \d+ pieces, but the model has 200 "):
        load(directory, "numpy")


# -- BOS and EOS


@pytest.mark.parametrize(
    "settings, ids",
    [
        ({}, [1, 259, 100]),
        ({"add_bos_token": None, "add_eos_token": None}, [1, 259, 100]),
        ({"add_bos_token": True, "add_eos_token": False}, [1, 259, 100]),
        ({"add_bos_token": False}, [259, 100]),
        ({"add_eos_token": True}, [1, 259, 100, 2]),
        ({"add_bos_token": False, "add_eos_token": True}, [259, 100, 2]),
    ],
)
def test_bos_and_eos_are_as_tokenizer_config_says(tmp_path, settings, ids):
    llama = load(model_with(tmp_path / "m", tokenizer_config=settings), "numpy")
    assert llama.encode("a") == ids
    assert llama.encode("") == [1]  # always
    assert llama.encode([7, 8]) == [7, 8]
    assert llama.tokenizer.encode("a") == [1, 259, 100]


# -- a tokenizer that does not match the model


@pytest.mark.parametrize(
    "n_rows, added, warns",
    [(260, {}, False), (320, {}, False), (1283, {}, False), (1284, {}, True), (5000, {}, True),
     (1284, {"<a>": 300}, False), (1285, {"<a>": 300}, True)],
)  # fmt: skip
def test_far_fewer_tokens_than_rows_are_warned_of(tmp_path, n_rows, added, warns):
    config = replace(TINY, vocab_size=n_rows)
    directory = model_with(tmp_path / "m", config, added_tokens=added)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        llama = load(directory, "numpy")
    assert [str(w.message) for w in caught] == list(llama.notes)
    assert all(w.category is TokenizerWarning and w.filename == __file__ for w in caught)
    assert len(llama.notes) == warns
    if warns:
        line = f"the tokenizer has {260 + len(added)} tokens, but the model has {n_rows} "
        assert llama.notes[0].startswith(line) and "\n" not in llama.notes[0]
