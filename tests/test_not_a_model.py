"""Errors for paths that are not models, from load, generate and convert.py. Each one names what was
found, and what to do."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from conftest import FIXTURES, TINY
from convert import main as convert
from model_directory import write_model
from npllama import load
from npllama.errors import InputError, NpllamaError
from npllama.generate import main as generate

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 9976576152\n"
HTML = b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>"
REFUSAL = b"Access to model meta-llama/Llama-2-7b-hf is restricted. You must be authenticated."
GGUF = b"GGUF\x03\x00\x00\x00" + bytes(24)
LLAMA2C = struct.pack("<7i", 48, 56, 2, 6, 3, -260, 64) + bytes(100)
SHARD = "model-00001-of-00002.safetensors"
SNAPSHOT = "snapshots/0123abc"


@pytest.fixture
def lines(tmp_path, capsys):
    """The error messages of load, generate --model and convert.py for a path, without the path."""

    def refuse(path, *more):
        given = str(path)
        with pytest.raises(NpllamaError) as error:
            load(given, backend="numpy")
        assert generate(["--model", given, "--prompt", "a", "--backend", "numpy"]) == 2
        assert capsys.readouterr() == ("", f"npllama: error: {error.value}\n")
        assert convert([given, str(tmp_path / "dest"), *more]) == 2
        assert not (tmp_path / "dest").exists()
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        message = err.removeprefix("convert: error: ").rstrip("\n")
        return str(error.value), message

    return refuse


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", TINY)


# -- files with other contents


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LFS, ("is a Git LFS pointer", "git lfs pull")),
        (HTML, ("is a web page", "hf auth login")),
        (b"<html>", ("is a web page",)),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ("is a web page",)),
        (REFUSAL, ("refused download", "hf auth login")),
        (b"Entry not found", ("refused download",)),
        (GGUF, ("is a GGUF file", "the Hugging Face directory")),
    ],
    ids=range(7),
)
def test_a_file_that_holds_something_else_is_named(model, lines, name, content, words):
    (model / name).write_bytes(content)
    for line in lines(model):
        assert line.startswith(f"{model / name} ")
        assert all(word in line for word in words)


@pytest.mark.parametrize("content", [LFS, HTML, REFUSAL], ids=range(3))
def test_a_tokenizer_that_is_something_else_is_named(model, lines, content):
    (model / "tokenizer.model").write_bytes(content)
    for line in lines(model):
        assert line.startswith(f"{model / 'tokenizer.model'} ")
        assert "git lfs pull" in line or "hf auth login" in line


@pytest.mark.parametrize("content", [LFS, HTML], ids=range(2))
@pytest.mark.parametrize("name", [SHARD, "model.safetensors.index.json"])
def test_a_shard_or_an_index_that_is_something_else_is_named(tmp_path, lines, name, content):
    model = write_model(tmp_path / "model", TINY, shards=2)
    (model / name).write_bytes(content)
    for line in lines(model):
        assert line.startswith(f"{model / name} is a ") and "get the file again" in line


@pytest.mark.parametrize(
    ("case", "name"), [("bin", "pytorch_model.bin"), ("meta-mp1", "consolidated.00.pth")]
)
def test_a_file_of_another_format_that_is_something_else_is_named(tmp_path, capsys, case, name):
    source = shutil.copytree(FIXTURES / "torch" / case, tmp_path / case)
    (source / name).write_bytes(LFS)
    assert convert([str(source), str(tmp_path / "dest")]) == 2
    assert f"error: {source / name} is a Git LFS pointer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
def test_half_a_download_is_named(model, lines, name):
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    for line in lines(model):
        assert line.startswith(f"{model / name} ")
        assert "get the file again" in line or "expected the tokenizer.model" in line


# -- directories with other contents


def test_an_adapter_is_named(tmp_path, model, lines):
    (tmp_path / "lora").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora" / name).write_bytes(b"{}")
        for line in (*lines(tmp_path / "lora"), *lines(tmp_path / "lora" / name)):
            assert "a LoRA adapter, not a whole model: merge it into its base model" in line
    (model / "adapter_config.json").write_text("{}")  # left over from a merge
    assert load(model, backend="numpy").config == TINY


def test_a_gguf_file_is_named(tmp_path, lines):
    file = tmp_path / "llama-2-7b.Q4_K_M.gguf"
    file.write_bytes(GGUF)
    for line in lines(file):
        assert line.startswith(f"{file} is a GGUF file") and "Hugging Face directory" in line
    for line in lines(tmp_path):
        assert line.startswith(f"{tmp_path} holds {file.name}, a GGUF file, which")


@pytest.mark.parametrize("where", ["models--org--name", "", "models--org--name/snapshots"])
def test_the_snapshot_in_a_cache_is_named(tmp_path, lines, where):
    hub = tmp_path / "hub"
    repository = hub / "models--org--name"
    snapshot = write_model(repository / SNAPSHOT, TINY)
    for line in lines(hub / where):
        assert line.endswith(f" {snapshot}") and "give " in line
    assert load(snapshot, backend="numpy").config == TINY


def test_of_several_snapshots_that_of_the_main_branch_is_named(tmp_path, lines):
    for revision in ("aaa", "bbb", "ccc"):
        write_model(tmp_path / "snapshots" / revision, TINY)
        os.utime(tmp_path / "snapshots" / revision, (1, 1))
    os.utime(tmp_path / "snapshots" / "aaa", (2, 2))
    assert all(line.endswith(f"{tmp_path / 'snapshots' / 'aaa'}") for line in lines(tmp_path))
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("bbb")
    assert all(line.endswith(f"{tmp_path / 'snapshots' / 'bbb'}") for line in lines(tmp_path))


def test_a_cache_without_a_snapshot_is_named(tmp_path, lines):
    (tmp_path / "snapshots").mkdir()
    assert all("without a snapshot: run the download again" in line for line in lines(tmp_path))


def test_a_link_to_nothing_is_named(model, lines):
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to("../../blobs/4d7a2146")
    for line in lines(model):
        assert "holds model.safetensors, a link to a file that does not exist" in line


def test_shards_without_an_index_are_named(tmp_path, lines):
    model = write_model(tmp_path / "model", TINY, shards=2)
    (model / "model.safetensors.index.json").unlink()
    for line in lines(model):
        assert line.startswith(f"{model} has shards but no model.safetensors.index.json: get that")


@pytest.mark.parametrize("folder", ["", ".cache/huggingface/download"])
def test_an_unfinished_download_is_named(tmp_path, lines, folder):
    model = write_model(tmp_path / "model", TINY, shards=2)
    (model / folder).mkdir(parents=True, exist_ok=True)
    (model / folder / "Kx3.4d7a2146.incomplete").touch()
    assert load(model, backend="numpy").config == TINY  # an unrelated incomplete download
    (model / SHARD).unlink()
    for line in lines(model):
        assert f"{SHARD} is missing" in line and "4d7a2146.incomplete is an unfinished" in line
    (model / "model.safetensors.index.json").unlink()
    for line in lines(model):
        assert "holds an unfinished download, Kx3.4d7a2146.incomplete: run it again" in line


def test_a_file_of_an_unfinished_download_is_named(tmp_path, lines):
    file = tmp_path / "model.safetensors.incomplete"
    file.write_bytes(b"x")
    assert all("is an unfinished download: run the download again" in line for line in lines(file))


@pytest.mark.parametrize("name", ["stories15M.bin", "out.bin"])
def test_a_file_of_llama2cs_is_named(tmp_path, lines, name):
    (tmp_path / name).write_bytes(LLAMA2C)
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<ifi", 5, -1e30, 3) + b"<s>" + bytes(30))
    loading, converting = lines(tmp_path)
    assert f"holds {name}" in loading and f"npllama convert {tmp_path / name} DEST" in loading
    assert converting.endswith(f"give that file, {tmp_path / name}")
    loading, _ = lines(tmp_path / name)  # the converter reports a truncated file
    assert f"npllama convert {tmp_path / name} DEST" in loading


@pytest.mark.parametrize("case", ["bin", "bin-sharded", "meta-mp1", "meta-mp2"])
def test_another_format_is_named_with_the_command_that_converts_it(tmp_path, case):
    source = FIXTURES / "torch" / case
    weights = next(path for path in source.iterdir() if path.suffix in (".bin", ".pth"))
    for path in (source, weights):
        with pytest.raises(NpllamaError, match=rf"npllama convert {source} DEST makes a model"):
            load(path, backend="numpy")


def test_a_model_in_a_folder_of_the_given_one_is_named(tmp_path, model, lines):
    line = f"{tmp_path} is not a model directory, but its folder model is: give {model}"
    assert lines(tmp_path) == (line, line)


# -- paths that are empty, files or missing


def test_an_empty_path_is_not_the_current_directory(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(model)
    with pytest.raises(InputError, match=r"^path is empty: expected a model directory$"):
        load("")
    with pytest.raises(SystemExit) as ended:
        convert(["", str(tmp_path / "dest")])
    assert ended.value.code == 2
    line = "convert: error: argument SOURCE: it is empty: expected the name of a file or directory"
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1
    assert not (tmp_path / "dest").exists()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.model", SHARD, "x.index.json"]
)
def test_a_file_of_a_checkpoint_is_named_with_its_directory(model, lines, name):
    (model / name).touch()
    for line in lines(model / name):
        assert line == f"{model / name} is part of a checkpoint: give its directory, {model}"


@pytest.mark.parametrize(
    "given",
    [
        "meta-llama/Llama-2-7b-hf",
        "https://huggingface.co/meta-llama/Llama-2-7b-hf",
        "hf.co/meta-llama/Llama-2-7b-hf",
    ],
)
def test_a_name_on_the_hub_is_named_with_the_command_that_downloads_it(
    lines, given, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    download = "hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf"
    loading, converting = lines(given)
    begin = f"{given} does not exist; if it is a repository on the hub: {download}"
    assert loading == f'{begin} --exclude "*.bin"; then give --model Llama-2-7b-hf'
    assert converting == f"{begin}; then convert Llama-2-7b-hf"
    for same in (Path(given), f"{given}/"):  # perplexity.py passes a Path
        with pytest.raises(InputError) as error:
            load(same)
        assert str(error.value).startswith(given + ("/ " if same == f"{given}/" else " "))
    (tmp_path / "meta-llama").mkdir()  # a folder of the user
    if given.startswith("meta"):
        assert not any("hf download" in line for line in lines(given))


@pytest.mark.parametrize("given", ["nowhere", "/no/where", "a/b/c", "../org/name", "org/na me"])
def test_other_paths_are_no_names_on_the_hub(lines, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not any("hf download" in line for line in lines(given))


def test_a_pipe_is_not_waited_for(tmp_path, lines):
    os.mkfifo(tmp_path / "model.bin")
    assert all(line.startswith(f"{tmp_path}") for line in lines(tmp_path))
    loading, converting = lines(tmp_path / "model.bin")
    assert "is a file: expected a model directory" in loading
    assert "does not exist or is no file" in converting


def test_what_is_nothing_known_keeps_its_message(tmp_path, lines):
    loading, converting = lines(tmp_path)
    is_empty = f"{tmp_path} is empty: expected "
    assert loading.startswith(f"{is_empty}a model directory; hf download NAME --local-dir DIR ")
    assert converting.startswith(f"{is_empty}a checkpoint: download one first")
    (tmp_path / "notes.txt").touch()
    loading, converting = lines(tmp_path)
    assert loading.startswith(f"{tmp_path} has no config.json: expected a model directory; hf ")
    assert "npllama convert makes one" in loading
    assert converting.startswith(f"{tmp_path} holds no checkpoint")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf()))
    loading, converting = lines(tmp_path)
    assert "has neither model.safetensors nor" in loading
    assert converting.startswith(f"{tmp_path} holds no checkpoint")
