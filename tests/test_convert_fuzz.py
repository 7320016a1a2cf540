"""Thousands of damaged files of all formats: each one converts, loads, or is refused in one
line."""

import copy
import io
import json
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import npllama
from conftest import FIXTURES, ROOT, TINY
from converting.conversion import convert
from converting.read_source import read_source
from converting.tokenizers import read_tokenizer
from model_directory import BYTE_PIECES, random_tensors, write_model
from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.errors import NpllamaError
from npllama.sentencepiece_model import bpe_model
from npllama.tokenizer import StreamDecoder, Tokenizer
from npllama.weights import Checkpoint
from test_convert import write_llama2c, write_llama2c_new, write_tokenizer_bin

TORCH, HF = FIXTURES / "torch", FIXTURES / "hf"
SMALL = LlamaConfig(**vars(TINY) | {"dim": 12, "head_dim": 2, "ffn_dim": 16, "context_length": 16})
DTYPES = (None, None, None, "float32", "float16", "bfloat16", "int8")
SECONDS = 10  # processor time per case, usually a few ms
MEMORY = 2**30  # additional memory per case
ODD_NUMBERS = (0, 1, -1, 2, 3, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
               2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
ODD_VALUES = (
    *ODD_NUMBERS, None, True, False, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"),
    10**25, 10**400, -(10**4000), "", "x", "12", "..", "/etc/passwd", "a\0b", "\ud800", "\n\x1b[2J",
    "config.json", [], {}, [[]], [1, 2], [2, None], {"": {}}, {"rope_type": "default"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Replace fsync, which can take minutes on a busy disk. test_atomic_directory.py tests it."""
    monkeypatch.setattr("atomic.os.fsync", lambda _file: None)


# -- files to damage


def hf(case, *names):
    return lambda folder: [shutil.copy(HF / case / name, folder) for name in names] and folder


def torch_written(case, is_file=False):
    def make(folder):
        for path in (TORCH / case).iterdir():
            if path.name != "expected.safetensors":
                shutil.copy(path, folder)
        return folder / "ckpt.pt" if is_file else folder

    return make


def llama2c_v0(folder):
    return write_llama2c(folder / "model.bin", SMALL, random_tensors(SMALL))


def llama2c_v1(folder):
    return write_llama2c_new(folder / "model.bin", SMALL, random_tensors(SMALL))


def llama2c_v2(folder):
    return write_llama2c_new(folder / "model.bin", SMALL, random_tensors(SMALL), 8)


def int8(folder):
    convert(read_source(write_model(folder.parent / "float", SMALL)), folder, "int8")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


JSON_OF_HF = ("config.json", "generation_config.json")
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FORMATS = {
    "meta-mp1": torch_written("meta-mp1"),
    "meta-mp2": torch_written("meta-mp2"),
    "meta-legacy": torch_written("meta-legacy"),
    "safetensors": hf("gqa", *JSON_OF_HF, "model.safetensors"),
    "safetensors-sharded": hf("sharded", *JSON_OF_HF, *SHARDS, "model.safetensors.index.json"),
    "safetensors-int8": int8,
    "bin": torch_written("bin"),
    "bin-sharded": torch_written("bin-sharded"),
    "training": torch_written("llama2c-training", is_file=True),
    "llama2c-v0": llama2c_v0,
    "llama2c-v1": llama2c_v1,
    "llama2c-v2": llama2c_v2,
}
LOADED = {
    "single": lambda folder: write_model(folder, SMALL, tokenizer=False),
    "sharded": lambda folder: write_model(folder, SMALL, shards=3, tokenizer=False),
    "int8": int8,
    "fixture": hf("bfloat16", *JSON_OF_HF, "model.safetensors"),
}


# -- damage: bytes -> bytes


def _place(rng, content, hot):
    """A random position, mostly in meaningful parts: headers, directories, pickles."""
    if hot and rng.random() < 0.8:
        begin, end = rng.choice(hot)
        return rng.randrange(begin, max(begin + 1, end))
    return rng.randrange(max(1, len(content)))


def flip_bits(rng, content, place):
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = place()
        content[at : at + 1] = bytes([content[at] ^ 1 << rng.randrange(8)] if content[at:] else b"")


def overwrite(rng, content, place):
    at, n = place(), rng.choice((1, 2, 4, 8, 32, 500))
    n = max(0, min(n, len(content) - at))
    content[at : at + n] = rng.choice((rng.randbytes(n), b"\0" * n, b"\xff" * n))


def truncate(rng, content, place):
    del content[rng.choice((place(), len(content) - rng.randrange(1, 9))) :]


def insert(rng, content, place):
    at, n = place(), rng.choice((1, 2, 8, 100))
    content[at:at] = rng.choice((rng.randbytes(n), b"\0" * n))


def duplicate(rng, content, place):
    at, n = place(), rng.choice((1, 8, 64, 1000))
    content[at:at] = content[at : at + n]


def remove(rng, content, place):
    at = place()
    del content[at : at + rng.choice((1, 8, 64, 1000))]


def move(rng, content, place):
    at, to, n = place(), place(), rng.choice((1, 4, 30, 300))
    some = content[at : at + n]
    content[to : to + len(some)] = some


def write_number(rng, content, place):
    n = rng.choice((1, 2, 4, 4, 8))
    at = min(place(), max(0, len(content) - n))
    at -= at % rng.choice((1, n))
    content[at : at + n] = (rng.choice(ODD_NUMBERS) % 256**n).to_bytes(n, "little")


BYTES = (flip_bits, overwrite, truncate, insert, duplicate, remove, move, write_number)


def damage_bytes(rng, content, hot):
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(BYTES)(rng, content, lambda: _place(rng, content, hot))
    return bytes(content)


def damage_json(rng, content):
    """Change a value, key or entry, or damage bytes."""
    if rng.random() < 0.2:
        return damage_bytes(rng, content, [])
    root = json.loads(content)
    for _ in range(rng.choice((1, 1, 2))):
        change_json(rng, root)
    if rng.random() < 0.05:
        root = [root]
    return to_json(root)


def change_json(rng, root):
    at = [root]
    while True:  # descend to a random dict or list
        values = at[-1].values() if isinstance(at[-1], dict) else at[-1]
        inner = [value for value in values if isinstance(value, dict | list) and value]
        if not inner or rng.random() < 0.3:
            break
        at.append(rng.choice(inner))
    place = at[-1]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    if not keys:
        return
    key, other = rng.choice(keys), rng.choice(keys)
    kind = rng.randrange(7)
    if kind < 3:
        place[key] = odd_value(rng)
    elif kind == 3:
        del place[key]
    elif kind == 4:
        place[key], place[other] = place[other], place[key]
    elif kind == 5 and isinstance(place, dict):
        place[rng.choice(("x", "", "lm_head.weight", "rope_scaling", key + ".scale"))] = place[key]
    elif isinstance(place[key], int) and not isinstance(place[key], bool):
        place[key] += rng.choice((-1, 1, 8, -8))
    else:
        place[key] = place[other]


def odd_value(rng):
    if rng.random() < 0.1:  # as deep as json can read, and deeper than it can write or print
        return f"deep{rng.choice((5, 100, 850, 900, 920, 940, 960, 10_000))}"
    return copy.deepcopy(rng.choice(ODD_VALUES))


def to_json(root):
    text = json.dumps(root, separators=(",", ":"))
    return re.sub(r'"deep(\d+)"', lambda m: "[" * int(m[1]) + "]" * int(m[1]), text).encode()


def damage_safetensors(rng, content):
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        return damage_bytes(rng, content, [(0, 8), (8, 8 + length)])
    header = json.loads(content[8 : 8 + length])
    change_json(rng, header)
    text = to_json(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def damage_zip(rng, content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        entries = [[info.filename, archive.read(info)] for info in infos]
    i = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
    if rng.random() < 0.4:  # damage bytes of the archive
        begin = infos[i].header_offset
        hot = [
            (begin, begin + len(entries[i][1])),
            (content.rindex(b"PK\5\6") - 2000, len(content)),
        ]
        return damage_bytes(rng, content, hot)
    kind = rng.randrange(8)  # a valid archive with changed entries
    if kind < 5:
        entries[i][1] = damage_bytes(rng, entries[i][1], [])
    elif kind == 5:
        entry = rng.choice(entries)
        entry[1] = damage_bytes(rng, entry[1], [])
    elif kind == 6:
        del entries[rng.randrange(len(entries))]
    else:
        entry = rng.choice(entries)
        entry[0] = rng.choice(("../x", "/x", "a/data.pkl", rng.choice(entries)[0] + "0"))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a duplicate name
        for name, values in entries:
            archive.writestr(name, values)
    return out.getvalue()


def damage(rng, name, content):
    if name.endswith(".json"):
        return damage_json(rng, content)
    if name.endswith(".safetensors"):
        return damage_safetensors(rng, content)
    if content[:2] == b"PK":
        return damage_zip(rng, content)
    if name.endswith(".pth"):  # the older layout has pickles first, then storages
        return damage_bytes(rng, content, [(0, 8000)])
    return damage_bytes(rng, content, [(0, 64)])


# -- running cases


class Hang(BaseException):
    """Not an Exception, because readers catch Exceptions as signs of damage."""


@contextmanager
def bounded():
    """Limit the time of a case, and the growth of this process's memory to MEMORY."""

    def hang(*_args):
        raise Hang

    before = signal.signal(signal.SIGPROF, hang)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_bytes = Backend().peak_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
    assert Backend().peak_bytes() - before_bytes < 300 * 2**20


@contextmanager
def in_time():
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def assert_one_line(error):
    line = str(error)
    assert "MemoryError" not in line and "Unable to allocate" not in line
    assert line.isprintable() and line
    assert len(line) < 20_000


def fuzz(folder, files, seeds, run):
    """For each seed, damage one of the files, call `run`, and restore the file. Returns the counts
    of outcomes."""
    originals = {path: path.read_bytes() for path in files}
    counts = {"done": 0, "refused": 0}
    with bounded():
        for seed in seeds:
            rng = random.Random(seed)
            path = rng.choice(sorted(originals))
            changed = damage(rng, path.name, originals[path])
            path.write_bytes(changed)
            try:
                with in_time():
                    run(rng)
                counts["done"] += 1
            except NpllamaError as error:
                assert_one_line(error)
                counts["refused"] += 1
            except BaseException as error:
                error.add_note(f"seed {seed}, {path.name}, {len(changed)} bytes")
                raise
            finally:
                path.write_bytes(originals[path])
    print(folder.name, counts)
    return counts


def fuzz_convert(tmp_path, make, seeds):
    source_folder, dest_folder = tmp_path / "source", tmp_path / "dest"
    source_folder.mkdir(), dest_folder.mkdir()
    source = make(source_folder)
    convert(read_source(source), tmp_path / "undamaged")

    def run(rng):
        try:
            with np.errstate(all="raise", under="ignore"):  # a warning would be a second line
                convert(read_source(source), dest_folder / "out", rng.choice(DTYPES))
        except NpllamaError:
            assert list(dest_folder.iterdir()) == []
            raise
        assert [path.name for path in dest_folder.iterdir()] == ["out"]
        out = dest_folder / "out"
        Checkpoint(out, LlamaConfig.from_directory(out))  # the output can be loaded
        shutil.rmtree(out)

    return fuzz(tmp_path, list(source_folder.iterdir()), seeds, run)


def fuzz_load(tmp_path, make, seeds):
    (tmp_path / "model").mkdir()
    folder = make(tmp_path / "model")
    if not (folder / "generation_config.json").exists():
        (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2]}')
    npllama.load(folder, backend="numpy")
    return fuzz(tmp_path, list(folder.iterdir()), seeds,
                lambda _rng: npllama.load(folder, backend="numpy"))  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_source_converts_or_is_one_line(tmp_path, name):
    counts = fuzz_convert(tmp_path, FORMATS[name], range(60))
    assert counts["refused"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_thousands_of_damaged_sources_convert_or_are_one_line(tmp_path, name):
    counts = fuzz_convert(tmp_path, FORMATS[name], range(1000, 5000))
    assert counts["refused"] >= 500 and counts["done"] >= 50


@pytest.mark.parametrize("name", LOADED)
def test_a_damaged_model_loads_or_is_one_line(tmp_path, name):
    counts = fuzz_load(tmp_path, LOADED[name], range(60))
    assert counts["refused"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_thousands_of_damaged_models_load_or_are_one_line(tmp_path, name):
    counts = fuzz_load(tmp_path, LOADED[name], range(1000, 6000))
    assert counts["refused"] >= 500 and counts["done"] >= 50


# -- tokenizers, in separate processes, because sentencepiece may crash


def damaged_tokenizer(kind, seed):
    rng = random.Random(seed)
    hot = [(0, 60), (len(TOKENIZERS[kind]) - 80, len(TOKENIZERS[kind]))]
    return damage_bytes(rng, TOKENIZERS[kind], hot)


def _tokenizers():
    words = [("a", -2.0, 1), ("\u2581a", -3.0, 1), ("b", -4.0, 1)]
    words += [("größe", -5.0, 1), ("\u2581\u2581", -6.0, 1)]
    pieces = [*BYTE_PIECES, *words]
    path = Path("tokenizer.bin")
    out = io.BytesIO()
    path_like = type("Memory", (), {"write_bytes": lambda _self, content: out.write(content)})()
    write_tokenizer_bin(path_like, pieces)
    return {"tokenizer.model": bpe_model(pieces), path.name: out.getvalue()}


TOKENIZERS = _tokenizers()


def tokenizer_worker(kind, folder, first, last):
    """Read each damaged tokenizer, and encode and decode with it. Prints its seed and the
    outcome."""

    resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
    path = Path(folder) / kind
    for seed in range(first, last):
        path.write_bytes(damaged_tokenizer(kind, seed))
        print(seed, end=" ", flush=True)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            tokenizer = Tokenizer.from_bytes(read_tokenizer(path, 1000))
            ids = tokenizer.encode("größe a 🦙\n")
            tokenizer.decode(ids)
            decoder = StreamDecoder(tokenizer)
            for id_ in range(tokenizer.vocab_size):
                decoder.push(id_)
            print("done", flush=True)
        except NpllamaError as error:
            assert_one_line(error)
            print("refused", flush=True)
        except BaseException as error:
            print(ascii(error)[:200], flush=True)


def fuzz_tokenizer(tmp_path, kind, first, last):
    (tmp_path / kind).write_bytes(TOKENIZERS[kind])
    read_tokenizer(tmp_path / kind, 1000)  # the undamaged file is valid
    outcomes = {}
    while first < last:
        code = (
            f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
            "import conftest\nfrom test_convert_fuzz import tokenizer_worker\n"
            f"tokenizer_worker({kind!r}, {str(tmp_path)!r}, {first}, {last})"
        )
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace"
        )
        for line in result.stdout.splitlines():
            seed, _, outcome = line.partition(" ")
            outcomes[int(seed)] = outcome or f"killed by {result.returncode}"
        assert outcomes, result.stderr
        first = max(outcomes) + 1
    bad = {seed: how for seed, how in outcomes.items() if how not in ("done", "refused")}
    counts = {how: list(outcomes.values()).count(how) for how in ("done", "refused")}
    print(kind, counts, bad)
    assert bad == {}
    return counts


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_damaged_tokenizer_reads_or_is_one_line(tmp_path, kind):
    counts = fuzz_tokenizer(tmp_path, kind, 0, 60)
    assert counts["refused"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_thousands_of_damaged_tokenizers_read_or_are_one_line(tmp_path, kind):
    counts = fuzz_tokenizer(tmp_path, kind, 1000, 5000)
    assert counts["refused"] >= 500 and counts["done"] >= 50


# -- cases found by reasoning


def refused_source(path, dest):
    with pytest.raises(NpllamaError) as caught:
        convert(read_source(path), dest)
    assert_one_line(caught.value)
    assert not dest.exists()
    return str(caught.value)


def test_a_scale_beside_a_norm_is_refused(tmp_path):
    tensors = random_tensors(SMALL)
    tensors["model.norm.weight.scale"] = np.ones(SMALL.dim, "float32")
    source = write_model(tmp_path / "model", SMALL, tensors=tensors)
    assert "model.norm.weight" in refused_source(source, tmp_path / "out")


def test_a_layer_number_of_thousands_of_digits_is_refused(tmp_path):
    from test_torch_file import tensor, value, write_zip

    shutil.copy(TORCH / "meta-mp1" / "params.json", tmp_path)
    name = f"layers.{'9' * 5000}.attention.wq.weight"
    write_zip(tmp_path / "consolidated.00.pth", b"}" + value(name) + tensor() + b"s")
    assert "is not part of a LLaMA" in refused_source(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (1296,), (36, 36, 1)])
@pytest.mark.parametrize("name", ["attention.wq", "attention.wk", "feed_forward.w1"])
def test_a_matrix_of_other_axes_is_refused(tmp_path, name, shape):
    from test_torch_file import storage, tensor, value, write_zip

    of = storage(n=1296)
    items = b""
    stride = tuple(np.ones(len(shape), int).tolist())
    for field in ("attention.wq", "attention.wk", "feed_forward.w1"):
        view = tensor(shape=(36, 36), stride=(36, 1), of=of)
        if field == name:
            view = tensor(shape=shape, stride=stride, of=of)
        items += value(f"layers.0.{field}.weight") + view
    items += value("tok_embeddings.weight") + tensor(shape=(36, 36), stride=(36, 1), of=of)
    shutil.copy(TORCH / "meta-mp1" / "params.json", tmp_path)
    zeros = [("0", np.zeros(1296, "float32"))]
    write_zip(tmp_path / "consolidated.00.pth", b"}(" + items + b"u", zeros)
    assert str(tmp_path) in refused_source(tmp_path, tmp_path / "out")


def doubled_lists(times):
    """A pickle of nested [[x, x], [x, x]] lists in memo entry 255: few bytes, but 2 ** times
    leaves."""
    steps = b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(times))
    return b"]q\0" + b"0" + steps + b"h%cq\xff0" % times


@pytest.mark.parametrize(
    "nested", [doubled_lists(60), b"]" * 30_000 + b"a" * 29_999 + b"q\xff0"], ids=["wide", "deep"]
)
def test_model_args_that_cannot_be_printed_are_refused(tmp_path, nested):
    from test_torch_file import storage, tensor, value, write_zip

    matrix = tensor(of=storage())
    model = value("layers.0.feed_forward.w1.weight") + matrix
    model += value("tok_embeddings.weight") + matrix
    opcodes = nested + b"}(" + value("model") + b"}(" + model + b"u"
    opcodes += value("model_args") + b"}" + value("n_heads") + b"h\xffsu"
    path = write_zip(tmp_path / "ckpt.pt", opcodes)
    with in_time_killing():
        assert "n_heads is a list" in refused_source(path, tmp_path / "out")


@contextmanager
def in_time_killing():
    def hang(*_args):
        raise Hang

    before = signal.signal(signal.SIGPROF, hang)
    try:
        with in_time():
            yield
    finally:
        signal.signal(signal.SIGPROF, before)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["hidden_size", "unread"])
def test_json_of_any_depth_is_read_or_refused(tmp_path, file, key):
    """A depth that json can read may be too deep for Python to print, or for json to indent."""
    source = write_model(tmp_path / "model", SMALL)
    (source / "generation_config.json").write_text("{}")
    text = (source / file).read_text()[1:].replace('"hidden_size": 12', '"x": 1')
    if key != "hidden_size" and file == "config.json":
        text = text.replace('"x": 1', '"hidden_size": 12')
    comma = "" if text == "}" else ", "
    for depth in (100, *range(850, 1000), 5000, 100_000):
        (source / file).write_text(f'{{"{key}": ' + "[" * depth + "]" * depth + comma + text)
        for run in (
            lambda: npllama.load(source, backend="numpy"),
            lambda: convert(read_source(source), tmp_path / "out"),
        ):
            with pytest.raises(NpllamaError) as caught:
                run()
            assert_one_line(caught.value)
            assert not (tmp_path / "out").exists()


def test_a_context_beyond_any_float_is_refused(tmp_path):
    for context in (10**18, 10**300, 10**400, 10**4200):
        folder = write_model(tmp_path / "model", SMALL, max_position_embeddings=context)
        with pytest.raises(NpllamaError) as caught:
            npllama.load(folder, backend="numpy")
        assert_one_line(caught.value)


def test_a_large_tokenizer_bin_is_read_in_time(tmp_path):
    (tmp_path / "tokenizer.bin").write_bytes(b"\0" * 2_000_000)  # 250,000 empty pieces
    with pytest.raises(NpllamaError) as caught, in_time_killing():
        read_tokenizer(tmp_path / "tokenizer.bin", 260)
    assert_one_line(caught.value)


@pytest.mark.parametrize("at", ["empty", "directory", "dangling"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_none_is_refused(tmp_path, name, at):
    (tmp_path / "source").mkdir()
    source = FORMATS[name](tmp_path / "source")
    for path in sorted((tmp_path / "source").iterdir()):
        if path.name == "generation_config.json":
            continue
        content = path.read_bytes()
        path.unlink()
        if at == "directory":
            path.mkdir()
        elif at == "dangling":
            path.symlink_to("nowhere")
        else:
            path.touch()
        assert str(tmp_path) in refused_source(source, tmp_path / "out")
        path.rmdir() if at == "directory" else path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xe2\x96"])
def test_a_tokenizer_whose_unknown_is_no_text_is_refused(text):
    unk_surface = b"\xe2\x02" + bytes([len(text)]) + text  # field 44 of the trainer's settings
    trainer = b"\x12" + bytes([len(unk_surface)]) + unk_surface
    with pytest.raises(NpllamaError):
        Tokenizer.from_bytes(TOKENIZERS["tokenizer.model"] + trainer)
