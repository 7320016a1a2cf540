"""Prompt caches: the same text with and without, other models' files refused, whole or not."""

import json
import os
import re
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from itertools import zip_longest

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from conftest import TINY, make_llama, make_ops
from model_directory import random_tensors, write_model
from npllama import Chat, load
from npllama.cache_fingerprint import fingerprint
from npllama.console import ReaderLeftError
from npllama.errors import InputError, OutOfMemoryError
from npllama.generate import main
from npllama.rope_scaling import RopeScaling

PROMPT = [1, 5, 9, 30, 7, 8, 100, 200, 3, 40]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
SAMPLED = {"temperature": 1.5, "seed": 7, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prompt.safetensors"


def saved(llama, path, ids=PROMPT, **options):
    """A file of a prompt and its completion, and the ids in it."""
    cache = llama.new_cache()
    llama.generate(ids, cache=cache, **(GREEDY | options))
    llama.save_cache(cache, path)
    return cache.ids[0]


def refused(llama, path):
    """The one line with which a file is refused."""
    with pytest.raises(InputError) as caught:
        llama.load_cache(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def n_common(one, other):
    """How many ids two lists both begin with."""
    return next((i for i, ids in enumerate(zip_longest(one, other)) if ids[0] != ids[1]), len(one))


def plain_llama(config=TINY, seed=0, dtype="float32"):
    return make_llama(make_ops("numpy"), config, seed, dtype=dtype)


# -- what is saved is what is loaded


@pytest.mark.array_calls
def test_a_row_comes_back_bit_by_bit(llama, path, to_host):
    cache = llama.new_cache(batch=2)
    for row, ids in enumerate((PROMPT, PROMPT[:3])):
        llama.prefill(ids, cache, row)
    llama.save_cache(cache, path, row=0)
    again = llama.load_cache(path)
    assert again.ids == [PROMPT] and again.lengths == [10]
    assert to_host(again.device_lengths).tolist() == [10]
    assert again.context == llama.context and again.dtype == cache.dtype
    for ours, theirs in zip(again.layers, cache.layers, strict=True):
        for part in ("k", "v"):
            one, other = (to_host(getattr(layer, part))[0] for layer in (ours, theirs))
            assert np.array_equal(one[:, :10], other[:, :10]) and not one[:, 10:].any()


def test_the_file_is_read_by_the_library(path):
    llama = plain_llama()
    ids = saved(llama, path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["ids"].dtype == np.int32 and tensors["ids"].tolist() == ids
    assert len(ids) == len(PROMPT) + 7  # a completion's last id is not read
    assert set(tensors) == {"ids", *(f"layers.{i}.{part}" for i in range(2) for part in "kv")}
    assert tensors["layers.1.v"].shape == (TINY.n_kv_heads, len(ids), TINY.head_dim)


DIVERGING = {
    "the stored prompt and its completion, gone on": lambda ids: [*ids, 77, 78],
    "all that is stored": lambda ids: ids,
    "less than is stored": lambda ids: ids[:6],
    "other ids from the middle on": lambda ids: [*ids[:6], 11, 12, 13, 14],
    "another first id": lambda ids: [2, *ids[1:]],
    "one id": lambda ids: ids[:1],
}


@pytest.mark.array_calls
@pytest.mark.parametrize("prompt", DIVERGING.values(), ids=DIVERGING)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_the_same_with_and_without(llama, path, prompt, options):
    stored = saved(llama, path)
    ids = prompt(stored)
    cache = llama.load_cache(path, ids)
    n_kept = min(n_common(stored, ids), len(ids) - 1)
    assert cache.ids == [ids[:n_kept]]
    completion = llama.generate(ids, cache=cache, **options)
    plain = llama.generate(ids, **options)
    assert completion.ids == plain.ids
    assert np.allclose(completion.log_probs, plain.log_probs, atol=2e-2)
    assert completion.timings.prompt_tokens == len(ids) - n_kept


def test_a_smaller_context_holds_the_first_ids(path):
    llama = plain_llama()
    stored = saved(llama, path)
    cache = llama.load_cache(path, context=5)
    assert cache.context == 5 and cache.ids == [stored[:5]]
    small = make_llama(llama.ops)
    small.context = 6
    assert small.load_cache(path).ids == [stored[:6]]


@pytest.mark.parametrize("ids", [[], "Once", [1, 2.5], [1, 260], [1] * 65])
def test_what_is_no_prompt_is_refused(path, ids):
    llama = plain_llama()
    saved(llama, path)
    with pytest.raises(InputError):
        llama.load_cache(path, ids)


@pytest.mark.parametrize("context", [0, 65, 10**15, "5", 2.5, True])
def test_what_is_no_context_is_refused(path, context):
    llama = plain_llama()
    saved(llama, path)
    with pytest.raises((InputError, OutOfMemoryError)):
        llama.load_cache(path, context=context)


def test_a_chat_goes_on_from_a_file(path):
    greedy = GREEDY | {"max_new_tokens": 4}
    options = {"chat_format": "llama-2", **greedy}
    llama = plain_llama()
    chat = Chat(llama, **options)
    chat.say("Hi")
    llama.save_cache(chat.cache, path)
    llama = plain_llama()
    stored = chat.cache.ids[0]
    again = Chat(llama, chat.messages, cache=llama.load_cache(path), **options)
    again.say("Ho")
    prompt = again.cache.ids[0][: again.turn.n_prompt]
    assert again.turn.n_kept == len(stored) and prompt[: len(stored)] == stored
    plain = Chat(llama, chat.messages, **options)
    plain.say("Ho")
    text, other = (llama.decode(chat.cache.ids[0][: chat.turn.n_prompt]) for chat in (again, plain))
    assert text.split() == other.replace("[/INST] ", "[/INST]").split()
    assert again.messages[-1]["content"] == llama.generate(prompt, fresh_text=True, **greedy).text


@pytest.mark.parametrize(("stored", "used"), [("float16", "float32"), ("float32", "bfloat16")])
def test_another_dtype_of_the_cache_is_converted(path, stored, used):
    llama, other = plain_llama(), plain_llama()
    llama.cache_dtype, other.cache_dtype = (
        np.dtype(getattr(ml_dtypes, name, name)) for name in (stored, used)
    )
    ids = saved(llama, path)
    cache = other.load_cache(path)
    assert cache.ids == [ids] and cache.dtype == other.cache_dtype
    exact = safetensors.numpy.load_file(path)["layers.1.k"].astype("float32")
    assert np.allclose(cache.layers[1].k[0, :, : len(ids)].astype("float32"), exact, rtol=1e-2)
    assert other.generate(ids, cache=other.load_cache(path, ids), **GREEDY).ids


# -- what invalidates a file, and what does not


def with_parameters(change):
    """A model of the same shape, whose layer 1 is changed by `change(layer)`."""
    llama = plain_llama()
    first, second = llama.parameters.layers
    llama.parameters = replace(llama.parameters, layers=(first, change(second)))
    return llama


def changed(matrix, by=1e-6):
    return replace(matrix, values=matrix.values + np.float32(by))


def scaled_rope(kind, **fields):
    return replace(TINY, rope_scaling=RopeScaling(kind, 2.0, **fields))


OTHERS = {
    "other weights": (lambda: plain_llama(seed=1), "weights"),
    "one matrix a little": (
        lambda: with_parameters(lambda x: replace(x, wv=changed(x.wv))),
        "weights",
    ),
    "a norm": (
        lambda: with_parameters(lambda x: replace(x, ffn_norm=x.ffn_norm * np.float32(1.001))),
        "weights",
    ),
    "a storage dtype": (lambda: plain_llama(dtype="bfloat16"), r"storage dtype \('float32' there"),
    "int8": (lambda: plain_llama(dtype="int8"), r"storage dtype \('float32' there, 'int8' here\)"),
    "theta": (lambda: plain_llama(replace(TINY, rope_theta=1e6)), "RoPE frequencies"),
    "linear RoPE": (lambda: plain_llama(scaled_rope("linear")), "RoPE frequencies"),
    "yarn": (
        lambda: plain_llama(scaled_rope("yarn", original_max_position_embeddings=32)),
        "RoPE frequencies",
    ),
    "fewer layers": (lambda: plain_llama(replace(TINY, n_layers=1)), r"shape \('L 2, .+ 'L 1, "),
    "other heads": (lambda: plain_llama(replace(TINY, n_kv_heads=6)), r"shape \('.* K 3, .+ K 6, "),
    "epsilon": (lambda: plain_llama(replace(TINY, norm_eps=1e-6)), "shape .*epsilon 1e-05"),
}


@pytest.mark.parametrize(("other", "said"), OTHERS.values(), ids=OTHERS)
def test_another_models_file_is_refused_by_what_differs(path, other, said):
    saved(plain_llama(), path)
    expected = (
        "is the prompt cache of another model, or of other options: the difference is in the "
    )
    assert re.search(f"{expected}{said}", refused(other(), path))


def test_a_dynamic_scaling_depends_on_the_context(path):
    config = scaled_rope("dynamic")
    long = plain_llama(config)
    saved(long, path)
    assert plain_llama(config).load_cache(path).lengths == [17]
    longer = type(long)(config, long.parameters, long.ops, context=100)
    assert "the difference is in the RoPE frequencies;" in refused(longer, path)


def test_the_embedding_counts_where_the_ids_are_and_the_head_not(path):
    llama = plain_llama()
    stored = saved(llama, path)
    embedding = llama.parameters.embedding.values
    rows = sorted(set(range(TINY.vocab_size)) - set(stored))
    for row, is_used in ((rows[0], False), (stored[3], True)):
        values = embedding.copy()
        values[row] += 1
        other = plain_llama()
        embedded = replace(other.parameters.embedding, values=values)
        other.parameters = replace(other.parameters, embedding=embedded)
        if is_used:
            assert "the difference is in the embedding rows;" in refused(other, path)
        else:
            assert other.load_cache(path).ids == [stored]
    head = llama.parameters.head
    llama.parameters = replace(
        llama.parameters, head=replace(head, lm_head=changed(head.lm_head, 1))
    )
    assert llama.load_cache(path).ids == [stored]


def test_every_matrix_of_every_layer_counts(path):
    llama = plain_llama()
    saved(llama, path)
    for name in ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"):
        other = with_parameters(
            lambda x, name=name: replace(x, **{name: changed(getattr(x, name))})
        )
        assert "the difference is in the weights;" in refused(other, path)


def test_the_fingerprint_is_that_of_the_numbers_wherever_they_lie(path, tmp_path):
    """A model of a directory, mapped and joined, is the same as one that was made in memory; so
    are implementations."""
    tensors = random_tensors(TINY)
    directory = write_model(tmp_path / "model", TINY, tensors=tensors)
    llama = load(directory, "numpy")
    stored = saved(llama, path)
    sharded = load(write_model(tmp_path / "shards", TINY, tensors=tensors, shards=3), "numpy")
    assert sharded.load_cache(path).ids == [stored]
    ops = make_ops("strict")
    parameters = llama.parameters
    device = replace(
        parameters,
        embedding=parameters.embedding.map(ops.backend.to_device),
        layers=tuple(layer.map(ops.backend.to_device) for layer in parameters.layers),
        head=parameters.head.map(ops.backend.to_device),
    )
    assert type(llama)(TINY, device, ops).load_cache(path).ids == [stored]


def test_every_implementation_has_the_same_fingerprint(llama):
    """A GPU joins matrices when they are uploaded; a file of the CPU's serves it all the same."""
    assert fingerprint(llama, PROMPT) == fingerprint(plain_llama(), PROMPT)


# -- a file is data


def edited(path, change):
    """The file with its tensors or metadata changed by `change(tensors, metadata)`."""
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    change(tensors, metadata)
    safetensors.numpy.save_file(tensors, path, metadata)


def set_item(name, change):
    def apply(tensors, _metadata):
        tensors[name] = change(tensors[name])

    return apply


def not_finite(array):
    array[1, 4, 2] = np.nan
    return array


HOSTILE = {
    "no ids": (lambda t, m: t.pop("ids"), "no token ids"),
    "no id": (set_item("ids", lambda a: a[:0]), "no token ids"),
    "ids of two axes": (set_item("ids", lambda a: a[None]), "no token ids"),
    "ids that are floats": (set_item("ids", lambda a: a.astype("float32")), "no token ids"),
    "an id too large": (set_item("ids", lambda a: a + 250), "outside the vocabulary of 260"),
    "a negative id": (set_item("ids", lambda a: a - 2), "outside the vocabulary"),
    "too few ids": (set_item("ids", lambda a: a[:-1]), r"layers.0.k has shape \[3, 17, 8\]"),
    "too many ids": (set_item("ids", lambda a: np.tile(a, 9)), "153 positions, and the model at"),
    "a missing layer": (lambda t, m: t.pop("layers.1.v"), "no tensor layers.1.v"),
    "a shape": (set_item("layers.0.v", lambda a: a.swapaxes(0, 1)), "layers.0.v has shape"),
    "a NaN": (set_item("layers.1.k", not_finite), "layers.1.k has elements that are not finite"),
    "a dtype": (
        set_item("layers.1.k", lambda a: a.astype("float16")),
        "layers.1.k has dtype float16",
    ),
    "integers": (set_item("layers.0.k", lambda a: a.astype("int32")), "layers.0.k has dtype int32"),
    "bytes": (set_item("layers.0.k", lambda a: a.astype("int8")), "stored as I8"),
    "a version": (lambda t, m: m.update(version="2"), "has version '2' and this npllama reads"),
    "no version": (lambda t, m: m.pop("version"), "has version ''"),
    "no shape": (lambda t, m: m.pop("shape"), "is in the shape"),
    "other weights": (lambda t, m: m.update(weights="\x1b[31m\n"), "is in the weights"),
    "a shape of controls": (lambda t, m: m.update(shape="\x1b[31m\n"), r"\('\\x1b\[31m\\n' there"),
    "no format": (lambda t, m: m.pop("format"), "not a prompt cache of npllama"),
}


@pytest.mark.parametrize(("change", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(path, change, said):
    llama = plain_llama()
    saved(llama, path)
    edited(path, change)
    assert re.search(said, refused(llama, path))


def test_a_number_too_large_for_the_caches_dtype_is_refused(path):
    llama = plain_llama()
    saved(llama, path)
    edited(path, set_item("layers.0.k", lambda a: a * np.float32(1e9)))
    assert llama.load_cache(path).lengths == [17]
    llama.cache_dtype = np.dtype("float16")
    assert "layers.0.k has elements that are not finite" in refused(llama, path)


def test_a_truncated_file_is_refused_wherever_it_ends(path):
    llama = plain_llama()
    saved(llama, path)
    content = path.read_bytes()
    for size in range(0, len(content), 97):
        path.write_bytes(content[:size])
        assert "is damaged or truncated" in refused(llama, path)
        with pytest.raises(InputError, match="damaged"):  # nor is it replaced
            llama.save_cache(llama.load_cache(good(llama, path)), path)


def good(llama, path):
    """A whole file beside `path`."""
    beside = path.with_name("good")
    if not beside.exists():
        saved(llama, beside)
    return beside


def test_no_flipped_byte_raises_anything_else(path, rng):
    llama = plain_llama()
    saved(llama, path)
    content = path.read_bytes()
    for _ in range(150):
        damaged = bytearray(content)
        for position in rng.integers(0, 1500, 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            cache = llama.load_cache(path)
        except InputError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert cache.lengths == [17]


# -- saving


def foreign_files(folder):
    """Things that are no prompt caches, by what is said of them."""
    model = write_model(folder / "model", TINY) / "model.safetensors"
    (folder / "text").write_text("not a cache at all")
    (folder / "empty").touch()
    (folder / "page").write_text("<!DOCTYPE html>")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        model: "not a prompt cache of npllama: give the name of a new file",
        folder / "text": "damaged or truncated",
        folder / "empty": "damaged or truncated",
        folder / "page": "a web page",
        folder / "model": "is a directory: expected the name of a file",
        folder / "pipe": "is not a regular file",
        folder / "loop": "cannot be read: Too many levels",
        folder / "text" / "x": "cannot be read: Not a directory",
        folder / ("n" * 300): "cannot be read: File name too long",
        f"{folder}/null\0": "cannot be read: .*null",
        "": "expected the name of a file",
        3: "expected the name of a file",
    }


def test_nothing_else_is_ever_replaced(tmp_path):
    llama = plain_llama()
    cache = llama.new_cache()
    llama.prefill(PROMPT, cache)
    foreign = foreign_files(tmp_path)
    files = [file for file in tmp_path.rglob("*") if not file.is_symlink() and file.is_file()]
    before = {file: file.read_bytes() for file in files}
    for path, said in foreign.items():
        for use in (lambda: llama.save_cache(cache, path), lambda: llama.load_cache(path)):  # noqa: B023
            with pytest.raises(InputError, match=said) as caught:
                use()
            assert "\n" not in str(caught.value)
    assert all(file.read_bytes() == content for file, content in before.items())
    assert not list(tmp_path.rglob("*.partial"))


def test_what_cannot_be_saved_is_said(path, tmp_path):
    llama = plain_llama()
    cache = llama.new_cache()
    with pytest.raises(InputError, match="row 0 of the cache is empty"):
        llama.save_cache(cache, path)
    with pytest.raises(InputError, match="there is no row 1"):
        llama.save_cache(cache, path, row=1)
    with pytest.raises(InputError, match="not this model's"):
        llama.save_cache(plain_llama().new_cache(), path)
    llama.prefill(PROMPT, cache)
    with pytest.raises(InputError, match="none/file cannot be written: No such file"):
        llama.save_cache(cache, tmp_path / "none" / "file")
    assert not path.exists()
    with pytest.raises(InputError, match="does not exist"):
        llama.load_cache(path)


def test_a_link_is_followed_and_permissions_stay(path, tmp_path):
    llama = plain_llama()
    saved(llama, path)
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path.name)
    saved(llama, link, PROMPT[:4])
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert llama.load_cache(path).ids[0][:4] == PROMPT[:4]


KILLED = """
import os, signal, sys
import conftest
llama = conftest.make_llama(conftest.make_ops("numpy"))
cache = llama.new_cache()
llama.prefill([1, 2, 3], cache)
if int(sys.argv[2]):
    write = llama.backend.to_host
    calls = iter(range(10**6))
    def to_host(array):
        if array.ndim == 3 and array.shape[1] == 3 and next(calls) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(array)
    llama.backend.to_host = to_host
llama.save_cache(cache, sys.argv[1])
"""


def test_a_program_that_is_killed_leaves_the_old_file(path):
    llama = plain_llama()
    stored = saved(llama, path)
    command = [sys.executable, "-c", KILLED, str(path)]
    options = {"timeout": 60, "cwd": os.path.dirname(__file__)}
    assert subprocess.run([*command, "1"], **options).returncode == -signal.SIGKILL
    assert path.with_name(path.name + ".partial").exists()
    assert llama.load_cache(path).ids == [stored]
    assert subprocess.run([*command, "0"], **options).returncode == 0
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert llama.load_cache(path).ids == [[1, 2, 3]]


# -- the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model"), replace(TINY, context_length=256)))


def call(capsys, model, *args):
    """Exit code, stdout and stderr of the command."""
    greedy = ["--temperature", "0", "--max-new-tokens", "12", "--ignore-eos"]
    code = main(["--model", model, "--backend", "numpy", *greedy, *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def ids_of(path):
    return safetensors.numpy.load_file(path)["ids"].tolist()


def test_the_option_keeps_what_prompts_begin_with(model, path, capsys):
    llama, stored = load(model, "numpy"), []
    for prompt in ("Once upon a time", "Once upon a time there", "Once more", "Once", "Once"):
        ids = llama.encode(prompt)
        n_kept = min(n_common(stored, ids), len(ids) - 1)
        plain = call(capsys, model, "--prompt", prompt)
        code, out, err = call(capsys, model, "--prompt", prompt, "--prompt-cache", path, "--stats")
        assert plain[0] == code == 0 and out == plain[1]
        assert f"prompt cache         {n_kept} of {len(ids)} ids kept\n" in err
        stored = ids_of(path)
        assert stored[: len(ids)] == ids
    assert n_kept == len(ids) - 1 > 0


def test_a_file_that_would_hold_no_more_is_not_written(model, path, capsys):
    options = ["--prompt", "Once upon", "--prompt-cache", path]
    call(capsys, model, *options)
    before = path.stat()
    call(capsys, model, *options)
    call(capsys, model, *options, "--max-new-tokens", "3")
    assert os.path.samestat(before, path.stat())
    call(capsys, model, *options, "--max-new-tokens", "20")
    assert not os.path.samestat(before, path.stat())


def test_read_only_leaves_the_file_as_it_is(model, path, capsys):
    call(capsys, model, "--prompt", "Once upon", "--prompt-cache", path)
    content = path.read_bytes()
    code, out, err = call(
        capsys, model, "--prompt", "Once upon a time", "--prompt-cache", path,
        "--prompt-cache-read-only", "--stats",
    )  # fmt: skip
    assert code == 0 and path.read_bytes() == content and "11 of 18 ids kept" in err
    assert out == call(capsys, model, "--prompt", "Once upon a time")[1]


def test_what_the_option_refuses_is_said_before_a_model_is_loaded(model, path, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    weights = f"{model}/model.safetensors"
    wrong = [
        (["--prompt-file", prompts, "--prompt-cache", path], "for one prompt and there are 2"),
        (["--prompt", "a", "--prompt-cache-read-only"], "is for --prompt-cache: give both"),
        (["--prompt", "a", "--prompt-cache", path, "--prompt-cache-read-only"], "does not exist"),
        (["--prompt", "a", "--prompt-cache", weights], "not a prompt cache of npllama"),
        (["--prompt", "a", "--prompt-cache", tmp_path / "none" / "x"], "cannot be written: No"),
        (["--prompt", "a", "--prompt-cache", tmp_path], "is a directory"),
        (["--prompt", "a", "--prompt-cache", ""], "expected the name of a file"),
    ]
    for options, said in wrong:
        code, out, err = call(capsys, "/nowhere", *options)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("npllama: error: ") and said in err


def test_a_file_that_can_only_be_read_has_a_hint(model, path, capsys, monkeypatch):
    def refuse(_path):
        raise InputError("it cannot be written: Permission denied")

    monkeypatch.setattr("npllama.prompt_cache_file.check_writable", refuse)
    options = ["--prompt", "Once", "--prompt-cache", path]
    assert call(capsys, model, *options)[2].endswith(": Permission denied\n")
    monkeypatch.undo()
    call(capsys, model, *options)
    monkeypatch.setattr("npllama.prompt_cache_file.check_writable", refuse)
    err = call(capsys, model, *options)[2]
    assert err.endswith(": Permission denied; --prompt-cache-read-only only reads it\n")


def test_another_models_file_stops_the_program_before_the_text(model, path, tmp_path, capsys):
    other = write_model(tmp_path / "other", replace(TINY, context_length=256), seed=1)
    call(capsys, str(other), "--prompt", "Once", "--prompt-cache", path)
    content = path.read_bytes()
    code, out, err = call(capsys, model, "--prompt", "Once", "--prompt-cache", path)
    assert (code, out, err.count("\n")) == (2, "", 1) and "is in the weights" in err
    assert path.read_bytes() == content


@pytest.mark.parametrize("json_lines", [False, True])
def test_after_ctrl_c_what_was_read_is_kept(model, path, capsys, monkeypatch, json_lines):
    from npllama.row import Row

    accept, calls = Row.accept, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return accept(*args)

    monkeypatch.setattr(Row, "accept", interrupted)
    options = ["--prompt", "Once", "--prompt-cache", path, *(["--json"] if json_lines else [])]
    code, out, _ = call(capsys, model, *options)
    monkeypatch.undo()
    assert code == 130
    llama = load(model, "numpy")
    prompt = llama.encode("Once")
    completion = llama.generate(prompt, temperature=0, max_new_tokens=4, ignore_eos=True)
    assert ids_of(path) == prompt + completion.ids[:3]
    if json_lines:
        assert json.loads(out)["ids"] == completion.ids


def test_after_sigterm_what_was_read_is_kept(model, path, capsys, monkeypatch):
    from npllama.row import Row

    accept, calls = Row.accept, []

    def ended(*args):
        calls.append(args)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return accept(*args)

    monkeypatch.setattr(Row, "accept", ended)
    with pytest.raises(SystemExit) as end:
        call(capsys, model, "--prompt", "Once", "--prompt-cache", path)
    assert end.value.code == 143
    prompt = load(model, "numpy").encode("Once")
    assert ids_of(path)[: len(prompt)] == prompt and len(ids_of(path)) > len(prompt)


def test_where_the_reader_leaves_what_was_read_is_kept(model, path, capsys, monkeypatch):
    def left(_text):
        raise ReaderLeftError("left")

    monkeypatch.setattr("npllama.console.write", left)
    code, out, err = call(capsys, model, "--prompt", "Once", "--prompt-cache", path)
    monkeypatch.undo()
    assert (code, out, err) == (0, "", "")
    assert ids_of(path) == load(model, "numpy").encode("Once")


def test_a_full_disk_is_said_after_the_text(model, path, capsys, monkeypatch):
    def full(_file):
        raise OSError(28, os.strerror(28))

    plain = call(capsys, model, "--prompt", "Once")
    monkeypatch.setattr("npllama.atomic_file.os.fsync", full)
    code, out, err = call(capsys, model, "--prompt", "Once", "--prompt-cache", path, "--stats")
    assert code == 2 and out == plain[1] and "of 6 ids kept" in err
    assert err.endswith(f"npllama: error: {path} cannot be written: No space left on device\n")
    assert list(path.parent.iterdir()) == []
