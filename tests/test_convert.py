"""tools/convert.py: llama2.c checkpoints of version 0, and its tokenizers."""

import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import DATA, ROOT, TINY, data_file
from model_directory import random_tensors

from npllama import load
from npllama.config import LlamaConfig
from npllama.llama import Llama
from npllama.tokenizer import Tokenizer
from npllama.untrained import BYTE_PIECES
from npllama.weights import EMBEDDING, LM_HEAD, NORM, layer_name

STORY = (  # what llama2.c publishes for stories260K: 200 greedy steps from BOS
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. "
    'She said, "I want to play with your ball, but I can\'t find it."\n'
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    "do.\"\nLily didn't want to help her mom, so she"
)
LLAMA2C_ORDER = (
    "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate", "w_down", "w_up",
)  # fmt: skip


def convert(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert.py"), *map(str, args)],
        capture_output=True,
        text=True,
    )


def error_line(*args):
    result = convert(*args)
    assert result.returncode == 2
    assert result.stderr.startswith("convert: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def to_meta_row_order(w, heads):
    """Hugging Face's rows (i, i + C/2) to Meta's (2i, 2i+1), head by head."""
    out = []
    for head in np.split(w, heads):
        c = len(head)
        for i in range(c // 2):
            out += [head[i], head[i + c // 2]]
    return np.array(out)


def write_llama2c(path, config, tensors):
    """A version 0 checkpoint with Hugging Face's `tensors`."""
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
    result = convert(source, tmp_path / "s", "--tokenizer", DATA / "stories260K" / "tok512.bin")
    assert result.returncode == 0, result.stderr
    command = [sys.executable, "-m", "npllama.generate", "--model", str(tmp_path / "s")]
    command += ["--prompt", "", "--temperature", "0", "--max-new-tokens", "200"]
    command += ["--backend", "numpy"]
    told = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    assert told == STORY + "\n"


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


def test_a_tokenizer_bin_encodes_and_decodes_as_sentencepiece(tmp_path):
    tok512 = data_file("stories260K/tok512.bin")
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from convert import read_tokenizer
    finally:
        sys.path.pop(0)
    tokenizer = Tokenizer.from_bytes(read_tokenizer(tok512))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    for text in ("Once upon a time", " two  spaces ", "größe\n\t🦙", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("Once upon a time, there was")) < 10


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

    assert "cannot be read" in error_line(tmp_path / "nothing.bin", dest)
    assert f"has {len(content) - 4} bytes and its header describes" in line(content[:-4])
    assert "truncated or damaged" in line(content + b"more")
    assert "its header makes no model" in line(b"")
    assert "its header makes no model" in line(b"\xff" * 100)
    assert "its header makes no model" in line(b"\0" * 100)
    assert "version 2: only version 0" in line(struct.pack("<Ii", 0x616B3432, 2) + bytes(300))
    infinite = bytearray(content)
    infinite[28:32] = struct.pack("<f", np.inf)
    assert "has values that float32 cannot hold" in line(bytes(infinite))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.bin", "model.bin"]


def test_wrong_tokenizers_are_one_line_and_leave_nothing(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    tokenizer = write_tokenizer_bin(tmp_path / "tok.bin")

    def line(content, name="tok.bin"):
        (tmp_path / name).write_bytes(content)
        return error_line(source, tmp_path / "out", "--tokenizer", tmp_path / name)

    content = tokenizer.read_bytes()
    assert "is truncated or not a llama2.c tokenizer.bin" in line(content[:-1])
    assert "expected at least the 259 special" in line(content[:30])
    assert "is not a sentencepiece model" in line(b"nonsense", "tokenizer.model")
    larger = [*BYTE_PIECES, ("x", 0.0, 1)]
    write_tokenizer_bin(tmp_path / "tok.bin", larger)
    assert "has 261 pieces and the model 260" in line((tmp_path / "tok.bin").read_bytes())
    assert not (tmp_path / "out").exists()


def test_a_dest_with_content_is_refused_and_kept(tmp_path):
    source = write_llama2c(tmp_path / "model.bin", TINY, random_tensors(TINY))
    dest = tmp_path / "out"
    dest.mkdir()
    assert convert(source, dest).returncode == 0  # empty: fine
    before = {path.name: path.read_bytes() for path in dest.iterdir()}
    assert "exists: choose a new directory" in error_line(source, dest)
    assert before == {path.name: path.read_bytes() for path in dest.iterdir()}
