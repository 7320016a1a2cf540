"""tools/convert.py: all formats and dtypes. The output is complete or absent."""

import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.numpy

import converting.dtypes as dtypes
from conftest import DATA, FIXTURES, ROOT, TINY, data_file, make_llama
from convert import main as convert_main
from converting.conversion import convert as convert_in_process
from converting.read_source import read_source
from converting.source import read_numbers
from converting.tokenizers import read_tokenizer
from model_directory import BYTE_PIECES, random_tensors, write_model
from npllama import load
from npllama.config import LlamaConfig
from npllama.errors import NpllamaError, WeightsError
from npllama.llama import Llama
from npllama.quantization import quantize
from npllama.safetensors_file import SafetensorsFile
from npllama.sentencepiece_model import bpe_model
from npllama.tokenizer import Tokenizer
from npllama.weight_formats import FORMATS
from npllama.weights import EMBEDDING, INDEX, LM_HEAD, NORM, layer_name

STORY = (  # the text that llama2.c publishes for stories260K: 200 greedy steps from BOS
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    "do.\"\nLily didn't want to help her mom, so she"
)
SMALL = LlamaConfig(36, 1, 6, 3, 40, 260)
LLAMA2C_ORDER = (
    "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate", "w_down", "w_up",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Replace fsync, which can take minutes on a busy disk. test_atomic_directory.py tests it."""
    monkeypatch.setattr("atomic.os.fsync", lambda _file: None)


def convert(*args):
    """Run the command line in this process, which is faster than starting Python for each call."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = convert_main([str(arg) for arg in args])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def error_line(*args):
    result = convert(*args)
    assert result.returncode == 2
    assert result.stderr.startswith("convert: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def to_meta_row_order(w, heads):
    """Convert Hugging Face's row order (i, i + C/2) to Meta's (2i, 2i+1) in each head."""
    out = []
    for head in np.split(w, heads):
        c = len(head)
        for i in range(c // 2):
            out += [head[i], head[i + c // 2]]
    return np.array(out)


def write_llama2c(path, config, tensors):
    """Write a version 0 checkpoint from tensors with Hugging Face's names."""
    v = config.vocab_size if config.tie_embeddings else -config.vocab_size
    header = struct.pack(
        "<7i", config.dim, config.ffn_dim, config.n_layers, config.n_heads,
        config.n_kv_heads, v, config.context_length,
    )  # fmt: skip
    parts = [tensors[EMBEDDING]]
    for field in LLAMA2C_ORDER:
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(field)
        for i in range(config.n_layers):
            w = tensors[layer_name(i, field)]
            parts.append(w if heads is None else to_meta_row_order(w, heads))
    parts += [tensors[NORM], np.full(config.context_length * config.head_dim, 99.0)]
    if not config.tie_embeddings:
        parts.append(tensors[LM_HEAD])
    path.write_bytes(header + b"".join(p.astype("<f4").tobytes() for p in parts))
    return path


def write_tokenizer_bin(path, pieces=BYTE_PIECES):
    content = struct.pack("<i", 27)
    for i, (text, score, _) in enumerate(pieces):
        text = {1: "\n<s>\n", 2: "\n</s>\n"}.get(i, text).replace("\u2581", " ").encode()
        content += struct.pack("<fi", score, len(text)) + text
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("n_kv_heads", [6, 3, 1])
def test_a_converted_model_computes_what_its_source_says(tmp_path, tied, n_kv_heads):
    config = LlamaConfig(**{**vars(TINY), "tie_embeddings": tied, "n_kv_heads": n_kv_heads})
    tensors = random_tensors(config)
    source = write_llama2c(tmp_path / "model.bin", config, tensors)
    write_tokenizer_bin(tmp_path / "tokenizer.bin")
    result = convert(source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)
    llama = load(tmp_path / "out", backend="numpy")
    assert llama.config == config
    assert llama.tokenizer.encode("a b") == [1, 259, 100, 259, 101]


def test_stories260k_tells_its_published_story_to_the_letter(tmp_path):
    source = data_file("stories260K/stories260K.bin")
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(tmp_path / "s")]
    subprocess.run([*command, "--tokenizer", str(source.with_name("tok512.bin"))], check=True)
    command = [sys.executable, "-m", "npllama.generate", "--model", str(tmp_path / "s")]
    command += ["--prompt", "", "--temperature", "0", "--max-new-tokens", "200"]
    command += ["--backend", "numpy"]
    told = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert told == STORY + "\n"


@pytest.mark.array_calls
def test_stories260k_tells_its_story_on_every_backend(tmp_path, ops):
    source = data_file("stories260K/stories260K.bin")
    convert(source, tmp_path / "s", "--tokenizer", DATA / "stories260K" / "tok512.bin")
    host = load(tmp_path / "s", backend="numpy")

    def to_device(array):
        return ops.backend.to_device(array)

    from npllama.parameters import Parameters

    p = host.parameters
    parameters = Parameters(
        p.embedding.map(to_device),
        tuple(layer.map(to_device) for layer in p.layers),
        p.head.map(to_device),
    )
    llama = Llama(host.config, parameters, ops, tokenizer=host.tokenizer)
    assert llama.generate("", max_new_tokens=200, temperature=0).text == STORY


def test_a_tokenizer_bin_encodes_and_decodes_as_sentencepiece():
    tokenizer = Tokenizer.from_bytes(read_tokenizer(data_file("stories260K/tok512.bin"), 512))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    for text in ("Once upon a time", " two  spaces ", "größe\n\t🦙", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("Once upon a time, there was")) < 10


WRITTEN = FIXTURES / "tokenizers"  # in the format of transformers 5
WITH_ADDED = LlamaConfig(**{**vars(TINY), "vocab_size": 1026})


def test_a_tokenizer_json_becomes_a_tokenizer_model(tmp_path):
    source = write_model(tmp_path / "hf", WITH_ADDED, tokenizer=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(WRITTEN / name, source)
    assert convert(source, tmp_path / "out").returncode == 0
    made, shipped = Tokenizer(tmp_path / "out" / "tokenizer.model"), load().tokenizer
    for text in ("Once upon a  time\n", "🦙 <s>", ""):
        assert made.encode(text) == shipped.encode(text)
    tokenizer = load(tmp_path / "out", "numpy").tokenizer
    assert tokenizer.decode([416, 1025, 1024]) == shipped.decode([416]) + "<step>"


def test_a_tokenizer_json_may_be_given_and_its_added_tokens_go_with_it(tmp_path):
    source = write_llama2c(tmp_path / "m.bin", WITH_ADDED, random_tensors(WITH_ADDED))
    convert(source, tmp_path / "out", "--tokenizer", WRITTEN / "tokenizer.json")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.model" in names and "tokenizer.json" not in names
    tokenizer = load(tmp_path / "out", "numpy").tokenizer
    assert tokenizer.encode("Once") == load().encode("Once")
    assert tokenizer.decode([416, 1025, 1024]) == load().tokenizer.decode([416]) + "<step>"


def test_a_tokenizer_json_of_another_kind_is_named_and_the_model_takes_ids(tmp_path):
    source = write_model(tmp_path / "hf", TINY, tokenizer=False)
    (source / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    result = convert(source, tmp_path / "out")
    assert result.returncode == 0
    assert f"convert: {source / 'tokenizer.json'} is a WordPiece model" in result.stderr
    assert "the model takes only token ids; --tokenizer FILE adds one" in result.stderr
    assert load(tmp_path / "out", backend="numpy").generate([1], max_new_tokens=2).text is None
    line = error_line(source, tmp_path / "other", "--tokenizer", source / "tokenizer.json")
    assert "is a WordPiece model" in line and not (tmp_path / "other").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGED = [LFS, b"<!DOCTYPE html><html></html>", b"", b'{"a": ', b"[1]"]
BAD_TOKENS = {
    "added_tokens.json": [b'{"<a>": "7"}', b'{"<a>": null}'],
    "tokenizer_config.json": [
        b'{"added_tokens_decoder": {"x": {"content": "<a>"}}}',
        b'{"added_tokens_decoder": [1]}',
        b'{"add_bos_token": "no"}',
    ],
    "tokenizer.json": [
        b'{"model": {"type": "BPE", "byte_fallback": true, "vocab": []}, '
        b'"normalizer": {"type": "Prepend", "prepend": "\\u2581"}}',
    ],
}
ALONE = "tokenizer.json"  # without a tokenizer.model


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name in BAD_TOKENS for content in (*DAMAGED, *BAD_TOKENS[name])],
)
def test_what_generate_would_refuse_of_a_tokenizer_is_not_converted(tmp_path, name, content):
    source = write_model(tmp_path / "m", TINY, tokenizer=name != ALONE)
    (source / name).write_bytes(content)
    with pytest.raises(NpllamaError) as refused:
        load(source, "numpy").encode("a")
    for more in ([], ["--dry-run"]):
        line = error_line(source, tmp_path / "out", *more)
        assert str(source / name) in line
        assert line == f"convert: error: {refused.value}\n"
        assert [path.name for path in tmp_path.iterdir()] == ["m"]
    tokenizer = write_tokenizer_bin(tmp_path / "tok.bin")
    assert convert(source, tmp_path / "out", "--tokenizer", tokenizer).returncode == 0
    load(tmp_path / "out", "numpy").encode("a")  # the damaged files were not copied


def test_bad_added_tokens_of_a_tokenizer_json_that_is_given_are_refused(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", WITH_ADDED, random_tensors(WITH_ADDED))
    fields = json.loads((FIXTURES / "tokenizers" / "tokenizer.json").read_text())
    fields["added_tokens"].append({"id": None, "content": "<a>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    line = error_line(source, tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.json")
    assert "tokenizer.json: the added token '<a>' has the id None: expected" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [b"\x18\x00", b"\x20\x01"], ids=["no prefix", "spaces removed"])
def test_tokenizers_that_treat_spaces_otherwise_are_kept_as_they_are(tmp_path, flags):
    model = bpe_model(BYTE_PIECES) + b"\x1a\x02" + flags  # the flags are merged into the settings
    (tmp_path / "tokenizer.model").write_bytes(model)
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    assert convert(source, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model
    llama = load(tmp_path / "out", "numpy")
    assert llama.encode("a  b") == [1, *llama.tokenizer.processor.encode("a  b")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_what_is_stored(tmp_path, dtype):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    convert(source, tmp_path / "out", "--dtype", dtype)
    llama = load(tmp_path / "out", backend="numpy")
    assert llama.dtype == dtype
    exact = load_from(tmp_path, source).logits([1, 5, 9])
    assert np.abs(llama.logits([1, 5, 9]) - exact).max() < 0.05 * np.abs(exact).max()


def load_from(tmp_path, source):
    convert(source, tmp_path / "float32")
    return load(tmp_path / "float32", backend="numpy")


def test_a_source_without_a_tokenizer_converts_and_takes_ids(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    result = convert(source, tmp_path / "out")
    assert result.returncode == 0
    assert "no tokenizer was found" in result.stderr
    assert load(tmp_path / "out", backend="numpy").generate([1], max_new_tokens=2).text is None


def test_wrong_sources_are_one_line_and_leave_nothing(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    content = source.read_bytes()
    dest = tmp_path / "out"

    def line(changed):
        (tmp_path / "changed.bin").write_bytes(changed)
        return error_line(tmp_path / "changed.bin", dest)

    assert "does not exist" in error_line(tmp_path / "nothing.bin", dest)
    assert f"has {len(content) - 4} bytes, but its header describes" in line(content[:-4])
    assert "truncated or damaged" in line(content + b"more")
    assert "not a checkpoint of a known format" in line(b"")
    assert "not a checkpoint of a known format" in line(b"\xff" * 100)
    assert "not a checkpoint of a known format" in line(b"\0" * 100)
    infinite = bytearray(content)
    infinite[28:36] = struct.pack("<ff", np.inf, np.nan)
    assert "embed_tokens.weight holds 2 infinities or NaNs" in line(bytes(infinite))
    (tmp_path / "empty").mkdir()
    assert "empty is empty: expected a checkpoint" in error_line(tmp_path / "empty", dest)
    assert "DEST is missing" in error_line(source)
    assert "--max-shard-size is 'big'" in error_line(source, dest, "--max-shard-size", "big")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"changed.bin", "model.bin", "empty"}


def test_wrong_tokenizers_are_one_line_and_leave_nothing(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    tokenizer = write_tokenizer_bin(tmp_path / "tok.bin")

    def line(content, name="tok.bin"):
        (tmp_path / name).write_bytes(content)
        return error_line(source, tmp_path / "out", "--tokenizer", tmp_path / name)

    content = tokenizer.read_bytes()
    assert "is truncated, or is not a llama2.c tokenizer.bin" in line(content[:-1])
    assert "expected at least the 259 special" in line(content[:30])
    assert "is not a sentencepiece model" in line(b"nonsense", "tokenizer.model")
    larger = [*BYTE_PIECES, ("x", 0.0, 1)]
    write_tokenizer_bin(tmp_path / "tok.bin", larger)
    assert "has 261 pieces, but the model has 260 embedding rows" in line(
        (tmp_path / "tok.bin").read_bytes()
    )
    assert not (tmp_path / "out").exists()


def test_a_dest_with_content_is_refused_and_kept(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    dest = tmp_path / "out"
    dest.mkdir()
    assert convert(source, dest).returncode == 0  # an empty directory is accepted
    before = {path.name: path.read_bytes() for path in dest.iterdir()}
    assert "has content: choose another, or replace it with --overwrite" in error_line(source, dest)
    assert before == {path.name: path.read_bytes() for path in dest.iterdir()}


# -- llama2.c versions 1 and 2


def write_llama2c_new(path, config, tensors, group=0):
    """Write a version 1 checkpoint, or version 2 (int8) if a group size is given."""
    header = struct.pack("<Ii", 0x616B3432, 2 if group else 1)
    header += struct.pack(
        "<7i", config.dim, config.ffn_dim, config.n_layers, config.n_heads,
        config.n_kv_heads, config.vocab_size, config.context_length,
    )  # fmt: skip
    header += struct.pack("<B", config.tie_embeddings) + (
        struct.pack("<i", group) if group else b""
    )
    layers = range(config.n_layers)
    norms = [tensors[layer_name(i, f)] for f in ("attention_norm", "ffn_norm") for i in layers]
    matrices = [tensors[EMBEDDING]]
    for field in ("wq", "wk", "wv", "wo", "w_gate", "w_down", "w_up"):
        heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(field)
        for i in layers:
            w = tensors[layer_name(i, field)]
            matrices.append(w if heads is None else to_meta_row_order(w, heads))
    if not config.tie_embeddings:
        matrices.append(tensors[LM_HEAD])
    body = b"".join(w.astype("<f4").tobytes() for w in [*norms, tensors[NORM]])
    for w in matrices:
        if group:
            flat = w.reshape(-1, group)
            scale = np.abs(flat).max(axis=1) / 127
            body += np.rint(flat / scale[:, None]).astype("int8").tobytes()
            body += scale.astype("<f4").tobytes()
        else:
            body += w.astype("<f4").tobytes()
    path.write_bytes(header.ljust(256, b"\0") + body)
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_has_the_same_tensors(tmp_path, tied):
    config = LlamaConfig(**{**vars(TINY), "tie_embeddings": tied})
    tensors = random_tensors(config)
    source = write_llama2c_new(tmp_path / "model.bin", config, tensors)
    assert convert(source, tmp_path / "out").returncode == 0
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == tensors.keys()
    assert all(np.array_equal(stored[name], tensors[name]) for name in tensors)


def test_version_2_has_groups_that_may_straddle_rows(tmp_path):
    tensors = random_tensors(TINY)
    for group in (32, 16):  # rows have 48 and 56 elements
        source = write_llama2c_new(tmp_path / f"{group}.bin", TINY, tensors, group)
        assert convert(source, tmp_path / f"out-{group}").returncode == 0
        stored = safetensors.numpy.load_file(tmp_path / f"out-{group}" / "model.safetensors")
        for name, tensor in tensors.items():
            assert stored[name].dtype == np.float32
            assert np.abs(stored[name] - tensor).max() <= np.abs(tensor).max() / 127
            assert tensor.ndim > 1 or np.array_equal(stored[name], tensor)
    seven = write_llama2c_new(tmp_path / "7.bin", TINY, tensors, 16)
    content = bytearray(seven.read_bytes())
    content[37:41] = struct.pack("<i", 7)
    seven.write_bytes(content)
    assert "group size 7 does not divide the shape [260, 48]" in error_line(seven, tmp_path / "out")


# -- files of torch: Meta, pytorch_model.bin, training checkpoints


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_heads_of_a_width_of_their_own_are_converted(tmp_path, dtype):
    source = FIXTURES / "hf" / "head-dim"
    expected = safetensors.numpy.load_file(source / "expected.safetensors")
    options = () if dtype is None else ("--dtype", dtype)
    assert convert(source, tmp_path / "out", *options).returncode == 0
    llama = load(tmp_path / "out", backend="numpy")
    assert (llama.config.dim, llama.config.n_heads, llama.config.head_dim) == (36, 6, 10)
    error = np.abs(llama.logits(expected["ids"]) - expected["logits"]).max()
    assert error <= (1e-5 if dtype is None else 0.1) * np.abs(expected["logits"]).max()


TORCH_CASES = sorted(path.name for path in (FIXTURES / "torch").iterdir())


def torch_case(name):
    directory = FIXTURES / "torch" / name
    source = directory / "ckpt.pt" if name == "llama2c-training" else directory
    return source, safetensors.numpy.load_file(directory / "expected.safetensors")


def test_every_torch_case_is_there():
    assert set(TORCH_CASES) == {
        "meta-mp1", "meta-mp2", "meta-mp4", "meta-mp8", "meta-legacy",
        "bin", "bin-sharded", "llama2c-training",
    }  # fmt: skip


@pytest.mark.parametrize("case", TORCH_CASES)
def test_every_tensor_is_what_transformers_converts_it_to(tmp_path, case):
    source, expected = torch_case(case)
    result = convert(source, tmp_path / "out")
    assert result.returncode == 0, result.stderr
    file = SafetensorsFile(tmp_path / "out" / "model.safetensors")
    truth = {name[3:]: values for name, values in expected.items() if name.startswith("hf.")}
    if case == "llama2c-training":
        truth.pop("lm_head.weight")  # the embedding is the head
    assert file.tensors.keys() == truth.keys()
    for name, values in truth.items():
        assert np.array_equal(file[name].astype("float32"), values), name
    dtypes = {info.dtype.name for info in file.tensors.values()}
    stored = {"meta-legacy": "float16", "bin": "float16", "bin-sharded": "float16"}
    stored |= {"meta-mp4": "float32", "llama2c-training": "float32"}
    assert dtypes == {stored.get(case, "bfloat16")}


@pytest.mark.parametrize("case", TORCH_CASES)
def test_a_converted_model_computes_what_transformers_computes(tmp_path, case):
    source, expected = torch_case(case)
    convert(source, tmp_path / "out", "--dtype", "float32")
    llama = load(tmp_path / "out", backend="numpy")
    logits = llama.logits(expected["ids"])
    assert np.abs(logits - expected["logits"]).max() <= 1e-5 * np.abs(expected["logits"]).max()
    greedy = llama.generate(
        expected["ids"].tolist(), max_new_tokens=len(expected["greedy"]), temperature=0,
        ignore_eos=True,
    )  # fmt: skip
    assert greedy.ids == expected["greedy"].tolist()


def test_meta_configs_are_read_as_facts_say(tmp_path):
    convert(torch_case("meta-mp2")[0], tmp_path / "mp2")
    config = LlamaConfig.from_directory(tmp_path / "mp2")
    assert (config.vocab_size, config.ffn_dim) == (48, 48)  # in params.json: -1 and missing
    assert (config.rope_theta, config.context_length) == (1e6, 16384)
    convert(torch_case("meta-mp1")[0], tmp_path / "mp1")
    config = LlamaConfig.from_directory(tmp_path / "mp1")
    assert (config.rope_theta, config.context_length) == (10000.0, 4096)


def copy_of(case, tmp_path):
    return Path(shutil.copytree(FIXTURES / "torch" / case, tmp_path / case))


def test_damaged_meta_sources_name_file_and_tensor(tmp_path):
    dest = tmp_path / "out"
    source = copy_of("meta-mp2", tmp_path)
    (source / "consolidated.00.pth").unlink()
    line = error_line(source, dest)
    assert f": consolidated.00.pth is missing: {source} holds consolidated.01.pth; get" in line
    (source / "consolidated.01.pth").rename(tmp_path / "01")
    assert f": consolidated.00.pth is missing: {source} holds no shard;" in error_line(source, dest)
    (tmp_path / "01").rename(source / "consolidated.01.pth")
    shutil.copy(FIXTURES / "torch" / "meta-mp1" / "consolidated.00.pth", source)
    assert "shards of different models" in error_line(source, dest)
    shutil.rmtree(source)
    source = copy_of("meta-mp2", tmp_path)
    shard = source / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:-3000])
    assert "consolidated.01.pth is damaged" in error_line(source, dest)
    shutil.rmtree(source)
    source = copy_of("meta-mp8", tmp_path)
    shutil.copy(source / "consolidated.00.pth", source / "consolidated.08.pth")
    assert "holds 9 shards" in error_line(source, dest)
    for i in range(9, 16):
        shutil.copy(source / "consolidated.00.pth", source / f"consolidated.{i:02}.pth")
    assert "holds 16 shards: expected 1, 2, 4 or 8" in error_line(source, dest)
    shutil.rmtree(source)
    source = copy_of("meta-mp1", tmp_path)
    params = json.loads((source / "params.json").read_text())
    for change, message in (
        ({"n_layers": 3}, "model.layers.2.input_layernorm.weight, "),
        ({"n_layers": 1}, "weight is not part of the model"),
        ({"n_kv_heads": 3}, "wk.weight has shape [12, 36]: the config asks for [18, 36]"),
        ({"dim": 32.5}, "dim is 32.5"),
        ({"n_heads": "6"}, "n_heads is '6': expected a number"),
        ({"use_scaled_rope": True}, "use_scaled_rope is set"),
        ({"n_layers": 10**9}, "layers are missing"),
    ):
        (source / "params.json").write_text(json.dumps(params | change))
        assert message in error_line(source, dest)
    assert not dest.exists()


def test_a_bad_number_of_a_config_names_its_file_once(tmp_path):
    source = copy_of("meta-mp1", tmp_path)
    params = json.loads((source / "params.json").read_text())
    for change in ({"norm_eps": "x"}, {"norm_eps": -1}, {"dim": None}, {"rope_theta": []}):
        (source / "params.json").write_text(json.dumps(params | change))
        line = error_line(source, tmp_path / "out")
        assert line.count("params.json: ") == 1 and next(iter(change)) in line


@pytest.mark.parametrize(("case", "n", "kept"), [
    ("meta-mp2", 2, 1), ("meta-mp4", 4, 2), ("meta-mp8", 8, 4), ("meta-mp8", 8, 1),
])  # fmt: skip
def test_missing_last_shards_are_told_from_a_wrong_shape(tmp_path, case, n, kept):
    source = copy_of(case, tmp_path)
    for path in sorted(source.glob("consolidated.*"))[kept:]:
        path.unlink()
    line = error_line(source, tmp_path / "out")
    assert f"holds {kept} of {n} shards" in line
    assert line.startswith(f"convert: error: consolidated.{kept:02}.pth is missing: {source} ")


def test_a_directory_of_several_formats_is_read_as_one_that_is_named(tmp_path):
    source = write_model(tmp_path / "source", TINY)
    shutil.copy(FIXTURES / "torch" / "bin" / "pytorch_model.bin", source)
    shutil.copytree(FIXTURES / "torch" / "meta-mp1", source, dirs_exist_ok=True)
    result = convert(source, "--inspect")
    assert "Hugging Face, safetensors, 1 file" in result.stdout
    assert result.stderr == (
        f"convert: {source} also holds pytorch_model.bin; the safetensors are read\n"
        f"convert: {source} also holds Meta's files; those of Hugging Face are read\n"
    )
    assert convert(torch_case("meta-mp1")[0], "--inspect").stderr == ""


@pytest.mark.parametrize("case", ["safetensors", "bin"])
def test_an_index_is_held_against_the_files(tmp_path, case):
    if case == "bin":
        source, index = copy_of("bin-sharded", tmp_path), "pytorch_model.bin.index.json"
    else:
        source, index = write_model(tmp_path / "hf", TINY, shards=2), INDEX
    fields = json.loads((source / index).read_text())
    files = fields["weight_map"]
    first, second = sorted(set(files.values()))
    name = next(name for name in files if files[name] == first)
    for shard, message in (
        (second, f"{second} lacks tensor {name}, which {index} assigns to it"),
        ("", "weight_map does not name a file for each tensor"),
        (".", "weight_map does not name a file for each tensor"),
        ("..", "weight_map does not name a file for each tensor"),
    ):
        (source / index).write_text(json.dumps(fields | {"weight_map": files | {name: shard}}))
        assert message in error_line(source, tmp_path / "out")


@pytest.mark.parametrize("case", ["safetensors", "bin"])
def test_a_directory_that_loads_converts(tmp_path, case):
    """Old spellings, fields without meaning, and an index that lists more than the files
    contain."""
    if case == "bin":
        source, index = copy_of("bin-sharded", tmp_path), "pytorch_model.bin.index.json"
    else:
        source, index = write_model(tmp_path / "hf", TINY, shards=2), INDEX
    assert convert(source, tmp_path / "plain").returncode == 0
    config = json.loads((source / "config.json").read_text()) | {
        "architectures": ["LLaMAForCausalLM"],
        "quantization_config": {},
        "rope_scaling": {"type": "linear", "factor": 1.0},
        "eos_token_id": -1,
        "hidden_act": None,
    }
    (source / "config.json").write_text(json.dumps(config))
    files = json.loads((source / index).read_text())["weight_map"]
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": min(files.values())}
    (source / index).write_text(json.dumps({"weight_map": files | table}))
    (source / "generation_config.json").unlink(missing_ok=True)
    result = convert(source, tmp_path / "old")
    assert result.returncode == 0, result.stderr
    plain, old = load(tmp_path / "plain"), load(tmp_path / "old")
    assert old.config.eos_ids == () and plain.config.eos_ids == (2,)
    assert np.array_equal(plain.logits([1, 5, 9]), old.logits([1, 5, 9]))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_file_that_cannot_be_read_is_named_rather_than_dest(tmp_path, name):
    source = write_model(tmp_path / "hf", TINY)
    (source / name).unlink(missing_ok=True)
    (source / name).mkdir()
    line = error_line(source, tmp_path / "a" / "out")
    assert f"{source / name} cannot be read: Is a directory" in line
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("case", ["safetensors", "meta-mp1"])
def test_a_source_that_goes_away_is_named_rather_than_dest(tmp_path, case):
    path = write_model(tmp_path / "m", TINY) if case == "safetensors" else copy_of(case, tmp_path)
    source = read_source(path)
    file = path / ("model.safetensors" if case == "safetensors" else "consolidated.00.pth")
    (path / "aside").mkdir()
    for change in (lambda: file.rename(path / "aside" / "x"), file.mkdir):  # missing; a directory
        change()
        with pytest.raises(NpllamaError) as caught:
            convert_in_process(source, tmp_path / "out")
        assert str(caught.value).startswith(f"{file} cannot be read: ")
    file.rmdir()
    file.write_bytes((path / "aside" / "x").read_bytes()[:20_000])
    with pytest.raises(NpllamaError, match="is truncated: get the file again"):
        convert_in_process(source, tmp_path / "out")


def test_a_new_tokenizer_takes_the_place_of_all_that_describe_the_old_one(tmp_path):
    source = write_model(tmp_path / "hf", TINY)
    kept = {"chat_template.jinja": "{{ messages }}"}
    old = dict.fromkeys(
        ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        '{"old": 1}',
    )
    for name, content in (kept | old).items():
        (source / name).write_text(content)
    tokenizer = write_tokenizer_bin(tmp_path / "tok.bin")
    result = convert(source, tmp_path / "new", "--tokenizer", tokenizer)
    files = {path.name for path in (tmp_path / "new").iterdir()}
    others = {"config.json", "generation_config.json", "model.safetensors"}
    assert files == others | {"tokenizer.model", "tokenizer_config.json", *kept}
    written = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "LlamaTokenizer"
    assert "not copied, because --tokenizer replaces what they describe: tok" in result.stderr
    # the source's own, named explicitly, replaces nothing
    convert(source, tmp_path / "own", "--tokenizer", source / "tokenizer.model")
    assert {path.name for path in (tmp_path / "own").iterdir()} >= {*old, *kept}
    assert (tmp_path / "own" / "tokenizer_config.json").read_text() == '{"old": 1}'


@pytest.mark.parametrize("more", [(), ("--max-shard-size", "50KB"), ("--tokenizer", "tok.bin")])
def test_a_dry_run_names_every_file_with_its_size(tmp_path, monkeypatch, more):
    source = write_model(tmp_path / "hf", TINY, tokenizer=False)
    (source / "tokenizer.json").write_text("{}")
    write_tokenizer_bin(tmp_path / "tok.bin")
    monkeypatch.chdir(tmp_path)
    dry = convert(source, "out", "--dry-run", *more).stdout
    told = dict(re.findall(r"^  (\S+) +([\d,]+) bytes$", dry[dry.index("would write") :], re.M))
    assert convert(source, "out", *more).returncode == 0
    sizes = {path.name: f"{path.stat().st_size:,}" for path in (tmp_path / "out").iterdir()}
    assert told == sizes
    write_tokenizer_bin(tmp_path / "tok.bin", [*BYTE_PIECES, ("x", 0.0, 1)])
    args = (source, "other", "--dry-run", "--tokenizer", "tok.bin")
    assert "has 261 pieces, but the model has 260 embedding rows" in error_line(
        *args
    )  # as the conversion would say


@pytest.mark.parametrize("case", ["int8", "groups"])
def test_inspect_tells_what_the_file_holds(tmp_path, case):
    if case == "int8":
        source = write_model(tmp_path / "hf", TINY, tensors=random_int8(TINY))
        extra = 4 * sum(w.shape[0] for w in random_tensors(TINY).values() if w.ndim == 2)
    else:
        source = write_llama2c_new(tmp_path / "model.bin", TINY, random_tensors(TINY), 16)
        extra = 4 * sum(w.size // 16 for w in random_tensors(TINY).values() if w.ndim == 2)
    told = convert(source, "--inspect").stdout
    for name, w in random_tensors(TINY).items():
        dtype = "int8" if w.ndim == 2 else "float32"
        assert re.search(rf"^  {re.escape(name)} +{dtype} ", told, re.M)
    assert re.search(r"^dtype +float32, int8$", told, re.M)
    n_bytes = sum(w.size * (1 if w.ndim == 2 else 4) for w in random_tensors(TINY).values())
    assert f"bytes       {n_bytes + extra:,}" in told


def test_a_tied_head_of_a_training_checkpoint_is_known_without_reading_it(monkeypatch):
    def unread(*_args, **_kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("converting.torch_file.read_numbers", unread)
    source = read_source(torch_case("llama2c-training")[0])
    assert source.config.tie_embeddings
    with pytest.raises(AssertionError, match="was read"):
        source.tensors[EMBEDDING].read()


# -- dtypes and rounding


def test_a_conversion_says_what_it_lost(tmp_path):
    tensors = random_tensors(TINY)
    w = tensors[EMBEDDING]
    w[:] = 1.0
    for name in tensors:
        if name != EMBEDDING:
            tensors[name][:] = 0.5

    def said(dtype, *numbers):
        w[0, : len(numbers)] = numbers
        source = write_llama2c(tmp_path / "model.bin", TINY, tensors)
        result = convert(source, tmp_path / "out", "--dtype", dtype, "--overwrite")
        assert result.returncode == 0, result.stderr
        lines = result.stderr.splitlines()
        assert lines[0].startswith("convert: wrote") and "no tokenizer" in lines[-1]
        return [line.removeprefix("convert: ") for line in lines[1:-1]]

    for dtype in ("float32", "float16", "bfloat16"):
        assert said(dtype, 1.5, -0.25, 0.0) == []
    # 2^-12 / (1 + 2^-12) is 0.0244 %
    rounded = "largest relative error by rounding: 0.0244 %"
    assert said("float16", 1.0 + 2.0**-12) == [rounded]
    # 1e-6 and 3e-8 become subnormal, and -1e-9 becomes 0
    assert said("float16", -1.0 - 2.0**-12, 1e-6, 3e-8, -1e-9, 0.0) == [
        rounded,
        "elements too small for the new dtype's full precision: 3, of which 1 became 0",
    ]
    assert said("bfloat16", 3.0 + 2.0**-7, 1.0, 1.0, 1.0) == [
        f"largest relative error by rounding: {100 * 2.0**-7 / (3 + 2.0**-7):.3g} %"
    ]
    assert said("bfloat16", 1e-40, 1.0) == [
        "elements too small for the new dtype's full precision: 1, of which 0 became 0"
    ]
    w[0, :] = 127.0
    assert said("int8", 1.0, -63.0) == []
    assert said("int8", 5.25, 6.0) == [
        f"largest error by rounding to int8: {100 * 0.25 / 127:.3g} % of the largest element in "
        "the same row"
    ]
    w[1, 1] = 70000.0
    source = write_llama2c(tmp_path / "model.bin", TINY, tensors)
    line = error_line(source, tmp_path / "over", "--dtype", "float16")
    assert "embed_tokens.weight holds 1 or more elements beyond float16's range" in line
    assert convert(source, tmp_path / "over", "--dtype", "bfloat16").returncode == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_what_a_conversion_lost_is_measured_over_all_numbers(rng, dtype, monkeypatch):
    monkeypatch.setattr(dtypes, "_CHUNK", 100)
    w = rng.standard_normal((7, 53)).astype("float32")
    w[:, 3] *= 1e-5
    loss = dtypes.Loss()
    if dtype == "int8":
        values, scale = dtypes.quantized(w, FORMATS["int8"], loss)
        error = np.abs(values * scale[:, None] - w).max(axis=1) / np.abs(w).max(axis=1)
        assert loss.int8_error == pytest.approx(error.max(), rel=1e-4)
        assert 0.3 * 0.5 / 127 < loss.int8_error < 1.01 * 0.5 / 127
        return
    after = dtypes.as_dtype(w, np.dtype(dtype), "here", loss).astype("float32")
    is_small = np.abs(after) < (2.0**-14 if dtype == "float16" else 1e-37)
    error = np.abs((after - w) / w)[~is_small]
    assert loss.relative_error == pytest.approx(error.max(), rel=1e-4)
    assert loss.underflowed == is_small.sum() and (loss.underflowed > 0) == (dtype == "float16")


def test_a_row_of_zeros_and_one_that_scales_to_nothing_lose_nothing_and_all():
    loss = dtypes.Loss()
    dtypes.quantized(np.zeros((2, 3), dtype="float32"), FORMATS["int8"], loss)
    assert loss.lines() == []
    dtypes.quantized(np.full((1, 3), 1e-45, dtype="float32"), FORMATS["int8"], loss)
    assert loss.int8_error == 1


def test_int8_is_one_scale_a_row_and_runs(tmp_path):
    directory = write_model(tmp_path / "hf", TINY)
    result = convert(directory, tmp_path / "int8", "--dtype", "int8")
    assert result.returncode == 0, result.stderr
    file = SafetensorsFile(tmp_path / "int8" / "model.safetensors")
    for name, values in random_tensors(TINY).items():
        if values.ndim == 1:
            assert np.array_equal(file[name], values)
            continue
        q, scale = file[name], file[name + ".scale"]
        assert (q.dtype, scale.dtype, scale.shape) == ("int8", "float32", values.shape[:1])
        assert np.array_equal(np.abs(q).max(axis=1), np.full(len(q), 127))
        assert (np.abs(q * scale[:, None] - values) <= scale[:, None] * 0.5001).all()
    exact, narrow = (load(tmp_path / d, backend="numpy") for d in ("hf", "int8"))
    assert narrow.dtype == "int8"
    assert narrow.parameters.nbytes < 0.3 * exact.parameters.nbytes
    logits, truth = narrow.logits([1, 5, 9]), exact.logits([1, 5, 9])
    assert 0 < np.abs(logits - truth).max() < 0.05 * np.abs(truth).max()
    at_load = load(tmp_path / "hf", backend="numpy", dtype="int8")
    assert np.array_equal(at_load.logits([1, 5, 9]), logits)
    back = load(tmp_path / "int8", backend="numpy", dtype="float32")
    assert np.abs(back.logits([1, 5, 9]) - logits).max() < 1e-5 * np.abs(truth).max()
    assert convert(tmp_path / "int8", tmp_path / "again", "--dtype", "float32").returncode == 0
    again = load(tmp_path / "again", backend="numpy")
    assert np.array_equal(again.logits([1, 5, 9]), back.logits([1, 5, 9]))


def test_int8_runs_through_every_implementation(ops):
    exact = make_llama(ops).logits([1, 5, 9, 200])
    narrow = make_llama(ops, dtype="int8")
    assert narrow.dtype == "int8"
    assert 0 < np.abs(narrow.logits([1, 5, 9, 200]) - exact).max() < 0.05 * np.abs(exact).max()


def test_other_programs_refuse_int8_rather_than_misread_it(tmp_path):
    convert(write_model(tmp_path / "hf", TINY), tmp_path / "int8", "--dtype", "int8")
    fields = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert fields["quantization_config"] == {"format": "npllama-int8"}
    # There is no quant_method, because transformers ignores an unknown one; see make_reference.py
    # check.
    convert(tmp_path / "int8", tmp_path / "back", "--dtype", "float16")
    fields = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in fields
    assert fields["torch_dtype"] == "float16"


def test_int8_stays_as_it_is_stored(tmp_path):
    convert(write_model(tmp_path / "hf", TINY), tmp_path / "int8", "--dtype", "int8")
    for more in ((), ("--dtype", "int8")):
        dest = tmp_path / f"again{len(more)}"
        assert convert(tmp_path / "int8", dest, *more).returncode == 0
        for name in ("model.safetensors", "config.json"):
            assert (dest / name).read_bytes() == (tmp_path / "int8" / name).read_bytes()
    stored = safetensors.numpy.load_file(tmp_path / "int8" / "model.safetensors")
    scale = layer_name(0, "wq") + ".scale"
    for bad, message in (
        (np.float16(1), f"{scale} is stored as float16: expected float32"),
        (np.float32(3e36), "holds 36 infinities"),  # multiplied by 127, it exceeds float32
        (np.float32(np.nan), "holds 36 infinities"),
    ):
        tensors = random_int8(SMALL) | {scale: np.full(36, bad)}
        broken = write_model(tmp_path / "broken", SMALL, tensors=tensors)
        assert message in error_line(broken, tmp_path / "out")
    assert stored[scale].dtype == np.float32


def random_int8(config):
    """A random int8 checkpoint in npllama's format."""
    tensors = {}
    for name, values in random_tensors(config).items():
        tensors[name] = values
        if values.ndim == 2:
            tensors[name], tensors[name + ".scale"] = quantize(values)
    return tensors


def test_float64_is_read_from_every_format_and_becomes_float32(tmp_path):
    exact = random_tensors(TINY)
    source = write_model(tmp_path / "hf", TINY, tensors=random_tensors(TINY, dtype="float64"))
    assert convert(source, tmp_path / "out").returncode == 0
    stored = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert all(np.array_equal(stored[name], exact[name]) for name in exact)
    assert convert(source, tmp_path / "int8", "--dtype", "int8").returncode == 0
    narrow = safetensors.numpy.load_file(tmp_path / "int8" / "model.safetensors")
    assert np.array_equal(narrow[EMBEDDING], quantize(exact[EMBEDDING])[0])


@pytest.mark.parametrize(
    ("dtype", "value", "hint"),
    [
        ("float16", 7e4, "use --dtype bfloat16 or float32"),
        ("float16", 3.4e38, "use --dtype float32"),  # also beyond the range of bfloat16
        ("bfloat16", 3.4e38, "use --dtype float32"),
        *((dtype, 1e40, "no --dtype can hold them, so the checkpoint is damaged; get it again")
          for dtype in (None, "int8", "float32", "float16", "bfloat16")),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused_with_the_dtypes_that_hold_them(
    tmp_path, capsys, dtype, value, hint
):
    tensors = random_tensors(TINY, dtype="float64")
    tensors[EMBEDDING][3, 3] = -value
    source = write_model(tmp_path / "hf", TINY, tensors=tensors)
    more = ["--dtype", dtype] if dtype else []
    assert convert_main([str(source), str(tmp_path / "out"), *more]) == 2
    line = capsys.readouterr().err
    assert line.endswith(f": {hint}\n")
    assert "embed_tokens.weight holds 1 or more elements beyond" in line
    assert not (tmp_path / "out").exists()


# -- memory


@pytest.fixture(scope="module")
def large_source(tmp_path_factory):
    """A function that returns a source with the given storage. Nearly all of its bytes are in gate,
    up and down. Each source is created once."""
    config = LlamaConfig(64, 1, 8, 8, 2**16, 260)

    @functools.cache
    def make(stored):
        folder = tmp_path_factory.mktemp("large")
        if stored == "groups":
            return write_llama2c_new(folder / "model.bin", config, random_tensors(config), 64)
        if stored == "int8":
            return write_model(folder, config, tensors=random_int8(config))
        return write_model(folder, config, dtype=stored)

    return make


@pytest.mark.parametrize(
    ("stored", "dtype", "factor"),
    [
        # the most bytes per element of the largest tensor, for reading and writing together
        ("float32", None, 4),
        ("bfloat16", None, 2),
        ("bfloat16", "float32", 2 + 4),
        ("float32", "float16", 4 + 2),
        ("float32", "int8", 4 + 1),
        ("bfloat16", "int8", 2 + 1),
        ("int8", None, 1),
        ("int8", "float16", 4 + 2),
        ("groups", None, 1 + 4),
        ("groups", "int8", 4 + 1),
    ],
)
def test_memory_holds_one_tensor_at_a_time(
    tmp_path, monkeypatch, large_source, stored, dtype, factor
):
    source = large_source(stored)
    monkeypatch.setattr("converting.dtypes._CHUNK", 2**14)
    source = read_source(source)
    tracemalloc.start()
    try:
        convert_in_process(source, tmp_path / "out", dtype)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    more = 2**20 * (10 if dtype == "int8" and stored != "int8" else 1)  # arrays inside quantize
    assert factor - 1 < peak / 2**22 < factor + more / 2**22


def test_a_conversion_opens_one_file_at_a_time(tmp_path):
    """The number of shards is not limited by the number of open files: 22 shards, 12 open files."""
    source = write_model(tmp_path / "hf", TINY, shards=4)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), str(tmp_path / "out")]
        + ["--max-shard-size", "1KB"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12)),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 14
    load(tmp_path / "out", backend="numpy")


# -- the files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_q_k_v_are_neighbours_and_gate_and_up_in_every_file(tmp_path, dtype):
    source = write_model(tmp_path / "hf", TINY, shards=2)
    result = convert(source, tmp_path / "out", "--dtype", dtype, "--max-shard-size", "50KB")
    assert result.returncode == 0, result.stderr
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) > (1 if dtype == "int8" else 2)
    place = {}
    for path in paths:
        assert path.stat().st_size < 80_000  # one group may exceed the limit, two may not
        for name, info in SafetensorsFile(path).tensors.items():
            place[name] = (path, info.begin, info.end)
            assert info.begin % info.dtype.itemsize == 0
    for i in range(TINY.n_layers):
        for group in (("wq", "wk", "wv"), ("w_gate", "w_up")):
            names = [layer_name(i, field) for field in group]
            for first, second in pairwise(names):
                assert place[first][0] == place[second][0]
                assert place[first][2] == place[second][1]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: path.name for name, (path, _, _) in place.items()}
    whole, parts = load(tmp_path / "hf", "numpy", dtype), load(tmp_path / "out", "numpy")
    # the norms of `whole` are float32, and those in the written files bfloat16
    truth = whole.logits([1, 5, 9])
    tolerance = 0.02 if dtype == "bfloat16" else 0
    assert np.abs(parts.logits([1, 5, 9]) - truth).max() <= tolerance * np.abs(truth).max()


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    tensors = random_tensors(TINY)
    convert(write_model(tmp_path / "hf", TINY), tmp_path / "out")
    read = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert read.keys() == tensors.keys()
    assert all(np.array_equal(read[name], tensors[name]) for name in tensors)


def test_files_of_the_source_are_kept(tmp_path):
    source = write_model(tmp_path / "hf", TINY, pretraining_tp=1, attention_dropout=0.0)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7], "top_p": 0.5}')
    (source / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')
    convert(source, tmp_path / "out", "--dtype", "bfloat16")
    read = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert json.loads(read["generation_config.json"]) == {"eos_token_id": [2, 7], "top_p": 0.5}
    assert read["tokenizer_config.json"] == b'{"chat_template": "[INST]"}'
    assert read["tokenizer.model"] == (source / "tokenizer.model").read_bytes()
    before = json.loads((source / "config.json").read_text())
    assert json.loads(read["config.json"]) == before | {"torch_dtype": "bfloat16"}


def test_inspect_and_dry_run_say_what_is_and_write_nothing(tmp_path):
    source, _ = torch_case("meta-mp2")
    inspected = convert(source, "--inspect")
    parameters = f"{36 * (2 * 48 + 1) + 2 * (2 * 36 * 36 + 2 * 12 * 36 + 3 * 48 * 36 + 2 * 36):,}"
    assert inspected.returncode == 0, inspected.stderr
    for told in ("Meta, 2 shards", "D 36, L 2, H 6, K 2, C 6, F 48, V 48", "bfloat16", parameters,
                 "model.layers.1.mlp.down_proj.weight", "[36, 48]"):  # fmt: skip
        assert told in inspected.stdout, told
    dry = convert(source, tmp_path / "out", "--dry-run", "--dtype", "int8")
    assert dry.stdout.startswith(inspected.stdout)
    size = int(re.search(r"model\.safetensors +([\d,]+) bytes", dry.stdout)[1].replace(",", ""))
    assert list(tmp_path.iterdir()) == []
    convert(source, tmp_path / "out", "--dtype", "int8")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == size


# -- complete output or none


def test_a_tied_head_that_is_stored_all_the_same_must_be_the_embedding(tmp_path):
    config = LlamaConfig(**{**vars(TINY), "tie_embeddings": True})
    tensors = random_tensors(config)
    same = write_model(tmp_path / "same", config, tensors=tensors | {LM_HEAD: tensors[EMBEDDING]})
    assert convert(same, tmp_path / "out").returncode == 0
    assert LM_HEAD not in SafetensorsFile(tmp_path / "out" / "model.safetensors").tensors
    other = write_model(
        tmp_path / "other", config, tensors=tensors | {LM_HEAD: tensors[EMBEDDING] + 1}
    )
    assert "differs from the embedding" in error_line(other, tmp_path / "no")


def test_overwrite_replaces_and_nothing_else_does(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    dest = tmp_path / "out"
    dest.mkdir()
    (dest / "mine.txt").write_text("kept")
    assert "has content" in error_line(source, dest)
    broken = tmp_path / "broken.bin"
    broken.write_bytes(source.read_bytes()[:-8] + struct.pack("<ff", np.nan, 0))
    assert "has content but no config.json" in error_line(source, dest, "--overwrite")
    assert [path.name for path in dest.iterdir()] == ["mine.txt"]
    (dest / "config.json").write_text("{}")
    assert "NaN" in error_line(broken, dest, "--overwrite")
    assert {path.name for path in dest.iterdir()} == {"config.json", "mine.txt"}
    assert convert(source, dest, "--overwrite").returncode == 0
    assert not (dest / "mine.txt").exists()
    load(dest, backend="numpy")
    assert {path.name for path in tmp_path.iterdir()} == {"model.bin", "broken.bin", "out"}
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in error_line(source, file, "--overwrite")
    assert "cannot be written" in error_line(source, file / "below")


def test_what_is_read_is_never_replaced(tmp_path):
    folder = copy_of("meta-mp1", tmp_path)
    before = {path.name for path in folder.iterdir()}
    for dest in (folder, tmp_path, folder / "..", folder / "params.json" / ".."):
        for more in ((), ("--overwrite",)):
            assert "is or holds" in error_line(folder, dest, *more)
    (tmp_path / "tokens").mkdir()
    tokenizer = write_tokenizer_bin(tmp_path / "tokens" / "tok.bin")
    assert "is or holds" in error_line(
        folder, tokenizer.parent, "--overwrite", "--tokenizer", tokenizer
    )
    assert {path.name for path in folder.iterdir()} == before
    assert tokenizer.exists()


@pytest.mark.parametrize("what", ["partial", "replaced", "lock"])
def test_what_is_read_is_none_of_the_names_beside_dest(tmp_path, what):
    source = tmp_path / f".out.{what}"
    write_llama2c(source, TINY, random_tensors(TINY))
    before = source.read_bytes()
    assert "is or holds" in error_line(source, tmp_path / "out")
    assert source.read_bytes() == before


def test_links_into_dest_are_read_and_not_replaced(tmp_path):
    real = write_model(tmp_path / "real", TINY)
    (tmp_path / "links").mkdir()
    for path in real.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    before = {path.name for path in real.iterdir()}
    assert "is or holds" in error_line(tmp_path / "links", real, "--overwrite")
    assert {path.name for path in real.iterdir()} == before


def test_an_empty_dest_is_not_the_current_directory(tmp_path, monkeypatch, capsys):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as ended:
        convert_main([str(source), "", "--overwrite"])
    assert ended.value.code == 2
    assert "it is empty" in capsys.readouterr().err
    assert list((tmp_path / "here").iterdir()) == []


def test_a_dest_is_known_by_its_real_name(tmp_path, monkeypatch):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    assert convert_main([str(source), str(link)]) == 0
    assert convert_main([str(source), str(link), "--overwrite"]) == 0
    assert link.is_symlink()
    assert loadable(real)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert convert_main([str(source), "."]) == 0
    assert loadable(tmp_path / "here")
    assert "/ cannot hold a model" in error_line(source, "/", "--overwrite")


def test_a_size_beyond_the_memory_is_one_line(tmp_path, monkeypatch):
    def too_large(*_args, **_kwargs):
        raise MemoryError

    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    monkeypatch.setattr("converting.source._read_into", too_large)
    assert "more than the free memory" in error_line(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def test_too_little_disk_space_is_said_before_the_first_byte(tmp_path, monkeypatch, capsys):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    usage = SimpleNamespace(free=100_000)
    monkeypatch.setattr("atomic.shutil.disk_usage", lambda _path: usage)
    assert convert_main([str(source), str(tmp_path / "out")]) == 2
    assert "needs 0.02 GB, but" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]


def loadable(directory):
    try:
        load(directory, backend="numpy")
    except NpllamaError:
        return False
    return True


# Runs convert.py in a forked process for each line of standard input. "step 3" kills it before its
# third file operation next to DEST, and "size 500" when a file exceeds 500 bytes.
KILLED = """
import os, resource, signal, sys
sys.path.insert(0, sys.argv[1])
import convert
folder, operations = sys.argv[2], ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
for line in sys.stdin:
    what, n = line.split()[0], int(line.split()[1])
    pid = os.fork()
    if pid == 0:
        def kill_at_last(event, args):
            global n
            if event in operations and str(args[0]).startswith(folder):
                n -= 1
                if n == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        if what == "step":
            sys.addaudithook(kill_at_last)
        else:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os._exit(convert.main(sys.argv[3:]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_killed_run_leaves_nothing_half_written_and_a_rerun_succeeds(tmp_path, old):
    """SIGKILL before each file operation, and in the middle of writing a file."""
    source = write_llama2c(tmp_path / "model.bin", SMALL, random_tensors(SMALL))
    dest = tmp_path / "folder" / "out"
    assert convert(source, dest).returncode == 0
    written = (dest / "model.safetensors").read_bytes()
    aside = dest.with_name(".out.replaced")
    command = [sys.executable, "-c", KILLED, ROOT / "tools", dest.parent, source, dest]
    sizes = [f"size {n}" for n in (1, 1000, len(written) // 2, len(written) - 1)]
    ended = []
    with subprocess.Popen(
        [*map(str, command), "--overwrite"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        for where in (*sizes, *(f"step {n}" for n in range(1, 1000))):
            if not old:
                shutil.rmtree(dest)
            print(where, file=process.stdin, flush=True)
            ended.append(int(process.stdout.readline()))
            # the old model is at DEST or, briefly, moved aside; the new model is complete or absent
            assert loadable(dest) or not dest.exists()
            assert not old or dest.exists() or loadable(aside)
            for path in dest.parent.iterdir():  # partial output is not a model
                if loadable(path):
                    assert (path / "model.safetensors").read_bytes() == written
            assert convert(source, dest, "--overwrite").returncode == 0
            assert [path.name for path in dest.parent.iterdir()] == ["out"]
            assert loadable(dest)
            if ended[-1] == 0:  # the conversion ended before this step
                break
    steps = ended[len(sizes) :]
    assert ended[: len(sizes)] == [-signal.SIGXFSZ] * len(sizes)
    assert steps == [-signal.SIGKILL] * (len(steps) - 1) + [0] and len(steps) > 10


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_between_the_renames_is_put_right(tmp_path, monkeypatch, step, capsys):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    dest = tmp_path / "folder" / "out"
    assert convert_main([str(source), str(dest)]) == 0
    (dest / "old").touch()
    rename, calls = os.rename, []

    class Killed(BaseException):
        pass

    def killed_after(*args):
        if len(calls) >= step:
            raise Killed
        calls.append(rename(*args))
        if len(calls) == step:
            raise Killed

    monkeypatch.setattr("atomic.os.rename", killed_after)
    monkeypatch.setattr("atomic.shutil.rmtree", lambda *args, **kwargs: None)
    with pytest.raises(Killed):
        convert_main([str(source), str(dest), "--overwrite"])
    monkeypatch.undo()
    left = {path.name for path in dest.parent.iterdir()}
    assert left == ({".out.partial", ".out.replaced"} if step == 1 else {"out", ".out.replaced"})
    # either the old model is restored, or the new one is complete
    assert convert_main([str(source), str(dest)]) == 2
    assert "has content" in capsys.readouterr().err
    assert (dest / "old").exists() == (step == 1)
    assert convert_main([str(source), str(dest), "--overwrite"]) == 0
    assert [path.name for path in dest.parent.iterdir()] == ["out"]
    assert loadable(dest)
    assert not (dest / "old").exists()


def test_a_bar_is_shown_on_a_terminal_alone(tmp_path):
    import fcntl
    import pty
    import termios

    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    assert "%" not in convert(source, tmp_path / "quiet").stderr
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source)]
    subprocess.run([*command, str(tmp_path / "shown")], stderr=child, check=True)
    shown = os.read(parent, 100_000).decode()
    os.close(parent)
    os.close(child)
    assert "100%" in shown
    assert "B/s" in shown
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", shown)  # elapsed and remaining time


def test_small_files_of_absurd_sizes_and_pipes_are_refused_unread(tmp_path):
    """Refused by the converter and by load. Reading from a pipe would block forever."""
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        source = write_model(tmp_path / name.replace(".", "-"), TINY)
        for damage in ("size", "pipe"):
            (source / name).unlink(missing_ok=True)
            if damage == "size":
                with open(source / name, "wb") as file:
                    file.truncate(30 * 2**30)
            else:
                os.mkfifo(source / name)
            what = "expected at most" if damage == "size" else "not a regular file"
            assert what in error_line(source, tmp_path / "out")
            with pytest.raises(NpllamaError, match=what):
                load(source, backend="numpy")


def test_a_name_given_twice_is_refused(tmp_path):
    source = write_model(tmp_path / "config", TINY)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text[:-1] + ', "vocab_size": 7}')
    assert "'vocab_size' is given twice" in error_line(source, tmp_path / "out")
    source = write_model(tmp_path / "header", TINY)
    content = (source / "model.safetensors").read_bytes()
    n = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + n].rstrip()
    (name, _), (_, entry), *_ = json.loads(header).items()  # a second entry for the first tensor
    header = header[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    (source / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + content[8 + n :]
    )
    assert "invalid offset for tensor" in error_line(source, tmp_path / "out")
    with pytest.raises(NpllamaError, match="invalid offset"):
        load(source, backend="numpy")


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_shards_without_their_index_are_told_what_is_missing(tmp_path, shard, index):
    source = write_model(tmp_path / "hf", TINY)
    (source / "model.safetensors").rename(source / shard)
    assert f"has shards but no {index}" in error_line(source, tmp_path / "out")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "pytorch_model.bin", "model.safetensors"])
def test_a_part_of_a_checkpoint_is_told_to_give_its_directory(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert f"give its directory, {tmp_path}" in error_line(tmp_path / name, tmp_path / "out")


def test_an_untied_model_without_a_head_is_told_of_ties(tmp_path):
    tensors = random_tensors(TINY)
    del tensors[LM_HEAD]
    source = write_model(tmp_path / "hf", TINY, tensors=tensors)
    assert '"tie_word_embeddings": true' in error_line(source, tmp_path / "out")


def test_a_stored_tie_is_not_read_by_an_inspection(tmp_path, monkeypatch, capsys):
    tensors = random_tensors(TINY)
    tensors[LM_HEAD] = tensors[EMBEDDING].copy()
    source = write_model(tmp_path / "hf", TINY, tensors=tensors, tie_word_embeddings=True)

    def read(*_args, **_kwargs):
        raise AssertionError("numbers were read")

    with monkeypatch.context() as patch:
        patch.setattr("converting.source._read_into", read)
        assert convert_main([str(source), "--inspect"]) == 0
    assert convert(source, tmp_path / "out").returncode == 0
    tensors[EMBEDDING][1, 1] = tensors[LM_HEAD][1, 1] = np.nan
    source = write_model(tmp_path / "nan", TINY, tensors=tensors, tie_word_embeddings=True)
    assert "NaN" in error_line(source, tmp_path / "no")


def test_a_norm_that_differs_between_shards_is_refused(tmp_path):
    folder = copy_of("meta-mp2", tmp_path)
    path = folder / "consolidated.01.pth"
    with zipfile.ZipFile(path) as archive:
        parts = {info: archive.read(info) for info in archive.infolist()}
    norm_bytes = (2 * 36, 4 * 36)  # the sizes of a norm's storage, in which one bit is flipped
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in parts.items():
            if "/data/" in info.filename and len(data) in norm_bytes:
                data = bytes([data[0] ^ 1]) + data[1:]
            archive.writestr(info, data)
    assert "differs from the same tensor in another shard" in error_line(folder, tmp_path / "out")


@pytest.mark.parametrize(("size", "n"), [("4GiB", 2**32), ("2G", 2 * 10**9), ("500MB", 5 * 10**8)])
def test_shard_sizes_are_read_as_they_are_spelt(size, n):
    from convert import _bytes

    assert _bytes(size) == n


def test_a_closed_pipe_is_one_line(tmp_path):
    source = write_model(tmp_path / "hf", TINY)
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(ROOT / "tools" / "convert.py"), str(source), "--inspect"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "standard output cannot be written" in result.stderr


def test_an_error_of_the_disk_is_not_taken_for_the_end_of_a_file():
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("this system has no file whose first bytes cannot be read")
    with pytest.raises(WeightsError, match="/proc/self/mem cannot be read: Input/output error"):
        read_numbers(unreadable, np.dtype("float32"), 4, 0, "tensor w")
