"""Reads files of torch.save without torch: valid contents, and malicious files."""

import copyreg
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from conftest import FIXTURES, ROOT
from converting.source import Tensor
from converting.torch_file import is_torch_file, read_torch_file
from npllama.errors import WeightsError

TORCH = FIXTURES / "torch"
META_TO_HF = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
SIX = np.arange(6, dtype="float32")


# -- helpers that write pickles and files


def value(x):
    """The opcodes that push a value."""
    return pickle.dumps(x, 2)[2:-1]


def name_of(module, name):
    return f"c{module}\n{name}\n".encode()


def pushed(*parts):
    """The opcodes of a tuple of given parts."""
    return b"(" + b"".join(parts) + b"t"


def storage(key="0", n=6, kind="FloatStorage", more=b""):
    kind = name_of("torch", kind) if isinstance(kind, str) else kind
    return pushed(value("storage"), kind, value(key), value("cpu"), value(n), more) + b"Q"


def tensor(offset=0, shape=(2, 3), stride=(3, 1), of=None, rebuild="_rebuild_tensor_v2"):
    args = (storage() if of is None else of, value(offset), value(shape), value(stride))
    ordered = name_of("collections", "OrderedDict") + b")R"
    return name_of("torch._utils", rebuild) + pushed(*args, value(False), ordered) + b"R"


def named(*tensors):
    """A state dict with the names t0, t1, ..."""
    items = b"".join(value(f"t{i}") + t for i, t in enumerate(tensors))
    return b"}(" + items + b"u"


def write_zip(path, opcodes, storages=(("0", SIX),), names="archive/{}", **others):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(names.format("data.pkl"), b"\x80\x02" + opcodes + b".")
        for name, content in others.items():
            archive.writestr(names.format(name), content)
        for key, values in storages:
            archive.writestr(names.format(f"data/{key}"), values.tobytes())
    return path


def write_legacy(path, opcodes, keys=("0",), storages=((6, SIX),), **changes):
    parts = {"magic": 0x1950A86A20F9469CFC6C, "protocol": 1001, "system": {"little_endian": True}}
    parts |= changes
    content = b"".join(pickle.dumps(part, 2) for part in parts.values())
    content += b"\x80\x02" + opcodes + b"." + pickle.dumps(list(keys), 2)
    for n, values in storages:
        content += struct.pack("<q", n) + values.tobytes()
    path.write_bytes(content)
    return path


def refusal(path):
    """The one-line message with which a file is refused."""
    with pytest.raises(WeightsError) as caught:
        read_torch_file(path)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(str(path))
    assert len(line) < len(str(path)) + 1000
    return line


@pytest.fixture
def pth(tmp_path):
    return tmp_path / "model.pth"


# -- valid files


@pytest.mark.parametrize("case", ["meta-mp1", "meta-legacy"])
def test_metas_files_are_read_as_torch_wrote_them(case):
    expected = safetensors.numpy.load_file(TORCH / case / "expected.safetensors")
    read = read_torch_file(TORCH / case / "consolidated.00.pth")
    dtype = {"meta-mp1": "bfloat16", "meta-legacy": "float16"}[case]
    truth = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    for i in (0, 1):
        for meta, hf in META_TO_HF.items():
            truth[f"layers.{i}.{meta}.weight"] = f"model.layers.{i}.{hf}.weight"
    turned = {f"layers.{i}.attention.{w}.weight" for i in (0, 1) for w in ("wq", "wk")}
    assert read.keys() == truth.keys() | turned | {"rope.freqs"}
    for name, hf_name in truth.items():
        assert read[name].dtype == dtype
        assert read[name].shape == expected[f"hf.{hf_name}"].shape
        values = read[name].read()
        assert (values.dtype, values.shape) == (read[name].dtype, read[name].shape)
        assert np.array_equal(values.astype("float32"), expected[f"hf.{hf_name}"]), name
    assert read["layers.0.attention.wk.weight"].shape == (12, 36)
    assert read["rope.freqs"].dtype == "float32"
    assert read["rope.freqs"].read().tolist() == [1.0, 1.0, 1.0]


def test_a_pytorch_model_bin_is_read_as_torch_wrote_it():
    expected = safetensors.numpy.load_file(TORCH / "bin" / "expected.safetensors")
    read = read_torch_file(TORCH / "bin" / "pytorch_model.bin")
    assert {f"hf.{name}" for name in read} == {name for name in expected if name[:3] == "hf."}
    for name, tensor in read.items():
        assert tensor.dtype == "float16"
        assert tensor.where == f"{TORCH / 'bin' / 'pytorch_model.bin'}: tensor {name}"
        assert np.array_equal(tensor.read().astype("float32"), expected[f"hf.{name}"])


def test_a_training_checkpoint_keeps_its_dicts_and_numbers():
    path = TORCH / "llama2c-training" / "ckpt.pt"
    expected = safetensors.numpy.load_file(path.with_name("expected.safetensors"))
    read = read_torch_file(path)
    assert read.keys() == {
        "model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"
    }  # fmt: skip
    assert read["iter_num"] == 100
    assert read["config"] == {"out_dir": "out", "learning_rate": 5e-4}
    assert read["model_args"]["max_seq_len"] == 64
    loss = read["best_val_loss"]
    assert (loss.shape, loss.dtype, loss.read().item()) == ((), np.dtype("float32"), 1.5)
    names = ("tok_embeddings", "output")
    embedding, head = (read["model"][f"_orig_mod.{name}.weight"].read() for name in names)
    assert np.array_equal(embedding, head)
    assert np.array_equal(embedding, expected["hf.model.embed_tokens.weight"])


def test_both_layouts_are_told_from_other_files(tmp_path):
    assert is_torch_file(TORCH / "meta-mp1" / "consolidated.00.pth")
    assert is_torch_file(TORCH / "meta-legacy" / "consolidated.00.pth")
    assert not is_torch_file(TORCH / "meta-mp1" / "expected.safetensors")
    (tmp_path / "empty").touch()
    assert not is_torch_file(tmp_path / "empty")


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize(
    ("view", "values"),
    [
        (tensor(), [[0, 1, 2], [3, 4, 5]]),
        (tensor(shape=(3, 2), stride=(1, 3)), [[0, 3], [1, 4], [2, 5]]),  # a transpose
        (tensor(offset=1, shape=(2, 2), stride=(3, 1)), [[1, 2], [4, 5]]),
        (tensor(offset=5, shape=(), stride=()), 5),
        (tensor(shape=(2,), stride=(0,)), [0, 0]),
        (tensor(shape=(0, 3), stride=(3, 1)), np.empty((0, 3))),
        (tensor(rebuild="_rebuild_tensor"), [[0, 1, 2], [3, 4, 5]]),
        (name_of("torch._utils", "_rebuild_parameter")
         + pushed(tensor(), value(True), name_of("collections", "OrderedDict") + b")R") + b"R",
         [[0, 1, 2], [3, 4, 5]]),
    ],
)  # fmt: skip
def test_a_tensor_is_the_view_that_its_strides_say(pth, write, view, values):
    read = read_torch_file(write(pth, named(view)))
    assert list(read) == ["t0"]
    assert np.array_equal(read["t0"].read(), values)
    assert read["t0"].shape == np.shape(values)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("FloatStorage", "float32"), ("HalfStorage", "float16"), ("BFloat16Storage", "bfloat16"),
        ("DoubleStorage", "float64"), ("LongStorage", "int64"), ("IntStorage", "int32"),
        ("ShortStorage", "int16"), ("CharStorage", "int8"), ("ByteStorage", "uint8"),
        ("BoolStorage", "bool"),
    ],
)  # fmt: skip
def test_each_storage_has_its_dtype(pth, kind, dtype):
    values = np.array([0, 1, 1]).astype(dtype)
    view = tensor(shape=(3,), stride=(1,), of=storage(n=3, kind=kind))
    read = read_torch_file(write_zip(pth, named(view), [("0", values)]))["t0"]
    assert read.dtype == dtype
    assert np.array_equal(read.read(), values)


def test_a_state_dicts_metadata_is_passed_over(pth):
    ordered = name_of("collections", "OrderedDict") + b")R"
    state = ordered + b"(" + value("t0") + tensor() + b"u"
    state += b"}" + value("_metadata") + ordered + b"sb"  # as torch.save(model.state_dict())
    assert np.array_equal(read_torch_file(write_zip(pth, state))["t0"].read().ravel(), SIX)


# -- pickles that run code


def call(function, *args):
    return function + pushed(*map(value, args)) + b"R"


def touching(sentinel):
    """Pickles that create the file `sentinel` if they are executed, and the name in the refusal."""
    command, python = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w').close()"
    imported = call(name_of("builtins", "__import__"), "os")
    return {
        "os.system": (call(name_of("os", "system"), command), "os.system"),
        "eval": (call(name_of("builtins", "eval"), python), "builtins.eval"),
        "exec": (call(name_of("builtins", "exec"), python), "builtins.exec"),
        "Python 2's names": (call(name_of("__builtin__", "eval"), python), "__builtin__.eval"),
        "STACK_GLOBAL": (
            call(b"\x8c\x05posix\x8c\x06system\x93", command), "posix.system",
        ),
        "getattr": (
            call(name_of("builtins", "getattr") + pushed(imported, value("system")) + b"R",
                 command),
            "builtins.getattr",
        ),
        "attrgetter": (
            call(call(name_of("operator", "attrgetter"), "system") + pushed(imported) + b"R",
                 command),
            "operator.attrgetter",
        ),
        "methodcaller": (
            call(name_of("operator", "methodcaller"), "system", command)
            + pushed(imported) + b"R",
            "operator.methodcaller",
        ),
        "a dotted name": (
            call(b"\x80\x04\x8c\x09posixpath\x8c\x09os.system\x93", command),
            "posixpath.os.system",
        ),
        "partial": (
            name_of("functools", "partial") + pushed(name_of("os", "system"), value(command))
            + b"R)R",
            "functools.partial",
        ),
        "nested in a list": (b"](" + call(name_of("os", "system"), command) + b"e", "os.system"),
        "nested in arguments": (
            name_of("collections", "OrderedDict")
            + pushed(b"](" + call(name_of("os", "system"), command) + b"0e") + b"R",
            "os.system",
        ),
        "after an allowed one": (
            name_of("collections", "OrderedDict") + b")R0" + call(name_of("os", "system"), command),
            "os.system",
        ),
        "pickle.loads": (
            call(name_of("pickle", "loads"),
                 b"\x80\x02" + call(name_of("os", "system"), command) + b"."),
            "pickle.loads",
        ),
        "INST": (b"(" + value(command) + b"ios\nsystem\n", "INST"),
        "OBJ": (b"(cos\nsystem\n" + value(command) + b"o", "OBJ"),
    }  # fmt: skip


HOSTILE = list(touching(""))


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(
    tmp_path, pth, case, write
):
    sentinel = tmp_path / "sentinel"
    opcodes, name = touching(sentinel)[case]
    line = refusal(write(pth, opcodes))
    if name.isupper():
        assert f"opcode {name}, which torch does not write" in line
    else:
        assert f"would call {name}, which tensors do not need: it was not run" in line
    assert not sentinel.exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_the_same_pickle_runs_where_pickle_reads_it(tmp_path, case):
    sentinel = tmp_path / "sentinel"  # a control, which shows that the pickles are effective
    opcodes, _ = touching(sentinel)[case]
    subprocess.run(  # some of them crash the reader
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"],
        input=b"\x80\x02" + opcodes + b".",
        capture_output=True,
    )
    assert sentinel.exists()


@pytest.mark.parametrize("part", ["magic", "protocol", "system", "keys"])
def test_each_pickle_of_a_legacy_file_is_guarded(tmp_path, pth, part):
    sentinel = tmp_path / "sentinel"

    class Evil:
        def __reduce__(self):
            return open, (str(sentinel), "w")

    if part == "keys":
        write_legacy(pth, named(tensor()), keys=[Evil()])
    else:
        write_legacy(pth, named(tensor()), **{part: Evil()})
    assert "would call io.open" in refusal(pth)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__.__getitem__"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch", "load"),
        ("torch", "_utils._rebuild_tensor_v2"),
        ("torch", "FloatStorage.__class__"),
        ("torch.hub", "load"),
        ("collections", "OrderedDict.__init__.__globals__"),
        ("collections", "OrderedDict.__subclasses__"),
        ("collections", "_eq"),
        ("Collections", "OrderedDict"),
        ("copyreg", "_reconstructor"),
        ("converting.torch_file", "_rebuild_tensor"),
        ("numpy", "dtype"),
        ("", ""),
        ("os\nsystem", "x\r\ny"),
        ("\u2028", "a\x1b[2Jb"),
    ],
)
def test_any_other_global_is_refused_by_name(pth, module, name):
    opcodes = b"".join(
        b"X" + struct.pack("<I", len(text.encode())) + text.encode() for text in (module, name)
    )
    line = refusal(write_zip(pth, opcodes + b"\x93"))
    shown = f"{module}.{name}".encode("unicode_escape").decode()
    assert f"would call {shown}, which tensors do not need" in line


def test_extension_codes_are_refused(pth):
    copyreg.add_extension("os", "system", 0x77)
    try:
        for opcodes in (b"\x82\x77", b"\x83\x77\0", b"\x84\x77\0\0\0"):
            assert "opcode EXT" in refusal(write_zip(pth, opcodes))
    finally:
        copyreg.remove_extension("os", "system", 0x77)


@pytest.mark.parametrize("opcode", [b"R", b"\x81", b"}\x92"])
@pytest.mark.parametrize(
    "what",
    [name_of("torch", "FloatStorage"), storage(), tensor(), value("text"), value(None)],
    ids=["StorageType", "Storage", "tensor", "text", "None"],
)
def test_what_is_no_function_cannot_be_called(pth, what, opcode):
    assert "its pickle cannot be read" in refusal(write_zip(pth, what + b")" + opcode))


def test_a_function_is_no_class(pth):
    function = name_of("torch._utils", "_rebuild_tensor_v2")
    assert "its pickle cannot be read" in refusal(write_zip(pth, function + b")\x81"))


ATTRIBUTES = ("dtype", "key", "n", "shape", "stride", "storage", "offset")


@pytest.mark.parametrize("how", ["dict", "slots"])
@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("target", ["StorageType", "Storage", "tensor"])
def test_a_pickle_cannot_change_what_was_checked(pth, target, attribute, how):
    """BUILD sets attributes, even of frozen dataclasses."""
    state = {attribute: "changed"}
    change = value(state if how == "dict" else (None, state)) + b"b"
    if target == "StorageType":
        view = tensor(of=storage(kind=name_of("torch", "FloatStorage") + change))
    elif target == "Storage":
        view = tensor(of=storage() + change)
    else:
        view = tensor() + change
    assert "its pickle cannot be read" in refusal(write_zip(pth, named(view)))


@pytest.mark.parametrize("attribute", ["__defaults__", "__name__", "__doc__", "marked"])
@pytest.mark.parametrize("name", ["_rebuild_tensor_v2", "_rebuild_parameter"])
def test_a_pickle_cannot_change_the_functions_that_stand_for_torchs(pth, name, attribute):
    change = value((None, {attribute: ("changed",) if attribute == "__defaults__" else "changed"}))
    opcodes = name_of("torch._utils", name) + change + b"b0" + named(tensor())
    assert "its pickle cannot be read" in refusal(write_zip(pth, opcodes))


@pytest.mark.parametrize("method", ["items", "get", "keys", "__class__"])
def test_a_pickle_cannot_change_a_dicts_methods(pth, method):
    ordered = name_of("collections", "OrderedDict") + b")R"
    change = value({method: "text"}) + b"b"
    state = ordered + change + b"(" + value("t0") + tensor() + b"u"
    read = read_torch_file(write_zip(pth, state))
    assert list(read) == ["t0"]
    system = ordered + b"(" + value("little_endian") + b"\x88u" + change
    content = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    content += b"\x80\x02" + system + b"." + b"\x80\x02" + named(tensor()) + b"."
    pth.write_bytes(content + pickle.dumps(["0"], 2) + struct.pack("<q", 6) + SIX.tobytes())
    assert list(read_torch_file(pth)) == ["t0"]


@pytest.mark.parametrize(
    "pid",
    [
        pushed(value("module"), name_of("torch", "FloatStorage"), value("0"), value("cpu"), b"K\6"),
        pushed(value("storage"), value("FloatStorage"), value("0"), value("cpu"), b"K\6"),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value(0), value("cpu"), b"K\6"),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value("0"), b"N", b"\x88"),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value("0"), b"N", value(-1)),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value("0"), b"N", value(6.0)),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value("0")),
        pushed(value("storage"), name_of("torch", "FloatStorage"), value("0"), b"N", b"K\6",
               value(("view", 0, 6))),
        value("storage"),
        value({"storage": 1}),
        value(None),
        value(7),
    ],
)  # fmt: skip
def test_other_persistent_ids_are_refused(pth, pid):
    assert "its pickle cannot be read" in refusal(write_zip(pth, pid + b"Q"))


def test_a_persistent_id_in_text_is_refused(pth):
    assert "its pickle cannot be read" in refusal(write_zip(pth, b"Pstorage\n"))


# -- tensors beyond their storage


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (tensor(offset=1), "t0 of shape [2, 3] reaches outside its storage"),
        (tensor(shape=(3, 3)), "t0 of shape [3, 3] reaches outside its storage"),
        (tensor(stride=(4, 1)), "reaches outside its storage"),
        (tensor(shape=(2,), stride=(6,)), "reaches outside its storage"),
        (tensor(shape=(2**62,), stride=(1,)), "reaches outside its storage"),
        (tensor(shape=(2**63, 2**63), stride=(2**63, 1)), "reaches outside its storage"),
        (tensor(offset=2**64), "reaches outside its storage"),
        (tensor(shape=(2, 1), stride=(2**64, 1)), "reaches outside its storage"),
        (tensor(shape=(7,), stride=(0,)), "is larger than its storage"),
        (tensor(shape=(10**6, 10**6), stride=(0, 0)), "is larger than its storage"),
        (tensor(offset=-1), "a malformed tensor"),
        (tensor(shape=(-2, -3)), "a malformed tensor"),
        (tensor(stride=(-3, 1)), "a malformed tensor"),
        (tensor(offset=True), "a malformed tensor"),
        (tensor(shape=(True, 3)), "a malformed tensor"),
        (tensor(shape=(2.0, 3)), "a malformed tensor"),
        (tensor(shape=("2", 3)), "a malformed tensor"),
        (tensor(of=value("0")), "a malformed tensor"),
        (tensor(shape=6, stride=1), "its pickle cannot be read"),
        (tensor(shape=(2, 3), stride=(1,)), "a tensor of 2 axes and 1 strides"),
        (tensor(shape=(1,) * 40, stride=(1,) * 40), "a tensor of 40 axes"),
        (tensor(of=storage(key="1")), "storage 1 is not in the file"),
        (tensor(of=storage(key="../data.pkl")), "storage ../data.pkl is not in the file"),
        (tensor(of=storage(kind="ComplexFloatStorage")), "would call torch.ComplexFloatStorage"),
        (tensor(of=storage(kind="DoubleStorage")), "reaches outside its storage"),
    ],
)  # fmt: skip
def test_a_tensor_outside_its_storage_is_refused(pth, view, message):
    assert message in refusal(write_zip(pth, named(view)))


def test_an_integer_of_thousands_of_digits_is_refused(pth):
    huge = b"\x8b" + struct.pack("<i", 4000) + b"\x7f" * 4000  # LONG4
    for view in (tensor().replace(b"K\2K\3", huge + b"K\3", 1), tensor(of=storage(n=1)) + huge):
        line = refusal(write_zip(pth, named(view)))
        assert "damaged" in line


def test_an_empty_tensor_of_an_absurd_size_does_not_pass_for_one(pth):
    for shape in ((10**30, 0), (2**62, 2**62, 0)):
        path = write_zip(pth, named(tensor(shape=shape, stride=(1,) * len(shape))))
        assert "t0" in refusal(path)


def test_a_storage_shorter_than_its_tensor_is_refused(pth):
    path = write_zip(pth, named(tensor()), [("0", SIX[:5])])
    assert "tensor t0 of shape [2, 3] reaches outside its storage" in refusal(path)
    path = write_zip(pth, named(tensor()), [])
    assert "storage 0 is not in the file" in refusal(path)


# -- zip archives


def patched_directory(path, name, **fields):
    """Overwrite fields of an entry in the zip's directory."""
    offsets = {"method": (10, "<H"), "compressed": (20, "<I"), "size": (24, "<I"),
               "begin": (42, "<I")}  # fmt: skip
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\x01\x02", at + 1)
    for field, number in fields.items():
        offset, code = offsets[field]
        struct.pack_into(code, content, at + offset, number)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("names", ["../{}", "/{}", "../../etc/{}", "a/../{}", "C:/{}", "{}"])
def test_paths_in_an_archive_lead_nowhere(tmp_path, names):
    folder = tmp_path / "in"
    folder.mkdir()
    read = read_torch_file(write_zip(folder / "model.pth", named(tensor()), names=names))
    assert np.array_equal(read["t0"].read().ravel(), SIX)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "model.pth"]


def test_an_archive_has_one_data_pkl(pth):
    with zipfile.ZipFile(pth, "w") as archive:
        archive.writestr("archive/data/0", SIX.tobytes())
    assert "holds 0 data.pkl: expected one" in refusal(pth)
    with zipfile.ZipFile(pth, "w") as archive:
        for name in ("a/data.pkl", "../data.pkl"):
            archive.writestr(name, b"\x80\x02}.")
    assert "holds 2 data.pkl: expected one" in refusal(pth)


@pytest.mark.parametrize("twice", ["archive/data.pkl", "archive/data/0"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(pth, twice):
    write_zip(pth, named(tensor()))
    with zipfile.ZipFile(pth, "a") as archive:
        archive.writestr(twice, b"\x80\x02}.")
    assert "names a file twice" in refusal(pth)


def test_compressed_entries_are_refused(pth):
    for name in ("archive/data.pkl", "archive/data/0"):
        write_zip(pth, named(tensor()))
        patched_directory(pth, name, method=8)
        assert f"its entry {name} is compressed" in refusal(pth)
    with zipfile.ZipFile(pth, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}" + b"00" * 10_000 + b".")
    assert "is compressed: torch.save does not compress" in refusal(pth)


@pytest.mark.parametrize("size", [2**31, 2**32 - 2])
def test_sizes_beyond_the_file_are_refused(pth, size):
    entry = {"size": size, "compressed": size}
    write_zip(pth, named(tensor()))
    assert "tensor t0 of shape [2, 3] ends beyond the file" in refusal(
        patched_directory(pth, "archive/data/0", **entry)
    )
    write_zip(pth, named(tensor()))
    line = refusal(patched_directory(pth, "archive/data.pkl", **entry))
    assert f"its data.pkl claims {size} bytes" in line


def zip64(path, name, size=0, begin=0):
    """Replace the entry's sizes by 64-bit ones, which can exceed any disk."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name.encode():
        at = content.index(b"PK\x01\x02", at + 1)
    extra = struct.pack("<HHQQQ", 1, 24, size, size, begin)
    struct.pack_into("<II", content, at + 20, 2**32 - 1, 2**32 - 1)
    struct.pack_into("<I", content, at + 42, 2**32 - 1)
    struct.pack_into("<H", content, at + 30, len(extra))
    content[at + 46 + len(name) : at + 46 + len(name)] = extra
    end = content.index(b"PK\x05\x06")
    length = struct.unpack_from("<I", content, end + 12)[0]
    struct.pack_into("<I", content, end + 12, length + len(extra))
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("size", [2**42, 2**63 - 1, 2**63, 2**64 - 1])
def test_terabytes_are_refused(pth, size):
    write_zip(pth, named(tensor()))
    with zipfile.ZipFile(pth) as archive:
        begin = archive.getinfo("archive/data/0").header_offset
    zip64(pth, "archive/data/0", size, begin)
    assert "ends beyond the file" in refusal(pth)
    write_zip(pth, named(tensor()))
    assert f"claims {size} bytes" in refusal(zip64(pth, "archive/data.pkl", size, 0))


@pytest.mark.parametrize("begin", [1, 2**31, 2**62, 2**63, 2**64 - 1])
def test_entries_that_begin_elsewhere_are_refused(pth, begin):
    write_zip(pth, named(tensor()))
    line = refusal(zip64(pth, "archive/data.pkl", 40, begin))
    assert "does not begin where the directory says" in line or "zip directory" in line


def test_a_directory_that_begins_before_the_file_is_refused(pth):
    content = bytearray(write_zip(pth, named(tensor())).read_bytes())
    end = content.index(b"PK\x05\x06")
    for place in (12, 16):  # length and offset of the directory
        for number in (0, 1, 2**31, 2**32 - 2):
            changed = content[:]
            struct.pack_into("<I", changed, end + place, number)
            pth.write_bytes(changed)
            refusal(pth)


def test_big_endian_storages_are_refused(pth):
    assert "not little-endian" in refusal(write_zip(pth, named(tensor()), byteorder=b"big"))
    assert read_torch_file(write_zip(pth, named(tensor()), byteorder=b"little"))
    assert "not little-endian" in refusal(
        write_legacy(pth, named(tensor()), system={"little_endian": False})
    )


# -- the older layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 1}, "neither a zip archive nor a legacy file"),
        ({"protocol": 1002}, "its protocol is not 1001"),
        ({"system": {}}, "not little-endian"),
        ({"system": [1]}, "not little-endian"),
        ({"keys": ["0", "1"]}, "storage '1' belongs to no tensor"),
        ({"keys": [0]}, "not a list of names"),
        ({"keys": []}, "tensor t0 lies in storage 0, which is not in the file"),
        ({"storages": [(5, SIX)]}, "storage 0 has another length than its tensors say"),
        ({"storages": [(-1, SIX)]}, "storage 0 has another length"),
        ({"storages": [(2**62, SIX)]}, "storage 0 has another length"),
        ({"storages": [(6, SIX[:5])]}, "storage 0 ends beyond the file"),
        ({"storages": []}, "damaged"),
        ({"keys": ["0", "0"]}, "damaged"),
    ],
)
def test_a_lying_legacy_file_is_refused(pth, changes, message):
    assert message in refusal(write_legacy(pth, named(tensor()), **changes))


def test_a_legacy_storage_cannot_have_two_lengths(pth):
    views = named(tensor(), tensor(of=storage(n=7)))
    assert "storage 0 has two lengths" in refusal(write_legacy(pth, views))
    huge = named(tensor(of=storage(n=2**62)))
    path = write_legacy(pth, huge, storages=[(2**62, SIX)])
    assert "storage 0 ends beyond the file" in refusal(path)


@pytest.mark.parametrize("case", ["meta-mp1", "meta-legacy"])
def test_a_file_cut_anywhere_is_refused(pth, case):
    content = (TORCH / case / "consolidated.00.pth").read_bytes()
    for n in [*range(0, 600, 7), *range(600, len(content), 997), len(content) - 1]:
        pth.write_bytes(content[:n])
        refusal(pth)


# -- excessive memory or time, each in a separate process


def long_key(n):
    return b"\x8d" + struct.pack("<Q", n) + b"x" * 20


def doubled(times):
    """((x, x), (x, x)) ...: few bytes, 2 ** times leaves."""
    return b")" + b"2\x86" * times


BOMBS = {
    "memo-index": b"N" + b"r" + struct.pack("<I", 2**31) + b"0}",
    "memo-index-text": b"Np2147483648\n0}",
    "memo-steps": b"".join(b"Nr" + struct.pack("<I", 250 * 17**i) + b"0" for i in range(6)) + b"}",
    "BINUNICODE8": long_key(2**62),
    "BINUNICODE8-top-bit": long_key(2**64 - 1),
    "BINBYTES8": b"\x8e" + struct.pack("<Q", 2**62),
    "BYTEARRAY8": b"\x96" + struct.pack("<Q", 2**40) + b"x",
    "BINSTRING": b"T" + struct.pack("<i", 2**31 - 1) + b"x",
    "BINSTRING-negative": b"T" + struct.pack("<i", -5) + b"x",
    "LONG4": b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01",
    "LONG4-negative": b"\x8b" + struct.pack("<i", -1),
    "FRAME": b"\x95" + struct.pack("<Q", 2**62) + b"}",
    "LONG-text": b"L" + b"9" * 2_000_000 + b"L\n",
    "INT-text": b"I" + b"9" * 2_000_000 + b"\n",
    "deep-lists": b"]" * 300_000 + b"a" * 299_999,
    "deep-tuples": b")" + b"\x85" * 300_000,
    "deep-dicts": (b"}" + value("k")) * 30_000 + b"}" + b"s" * 30_000,
    "many-lists": b"]" * 12_000_000,
    "many-dicts": b"}" * 12_000_000,
    "many-marks": b"(" * 20_000_000,
    "hash-deep": b"}" + b")" + b"\x85" * 1_000_000 + b"Ns",
    "hash-doubled": b"}" + doubled(64) + b"Ns",
    "hash-in-ordered": name_of("collections", "OrderedDict")
    + b"](" + doubled(64) + b"N\x86e\x85R",
    "dict-of-a-dict": b"}q\0(" + b"".join(value(i) + b"N" for i in range(3000)) + b"u0]("
    + (name_of("collections", "OrderedDict") + b"h\0\x85R") * 4000 + b"e",
    "hash-of-huge": b"}(" + b"".join(value(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u",
    "hash-of-pairs": b"}(" + b"".join(
        b"(" + b"".join(value(-1 - (i >> bit & 1)) for bit in range(14)) + b"tN"
        for i in range(2**14)
    ) + b"u",
    "hash-in-set": b"\x8f(" + doubled(64) + b"\x90",
    "dict-in-itself": b"}q\0(" + b"".join(value(f"k{i}") + b"h\0" for i in range(400)) + b"u",
    "list-in-itself": b"]q\0h\0a",
    "dicts-shared": b"}q\0"
    + b"".join(
        b"}(" + b"".join(value(f"k{i}")[:-2] + b"h" + bytes([level]) for i in range(400))
        + b"uq" + bytes([level + 1])
        for level in range(5)
    ),
    "long-names": b"}" + value("x" * 1_000_000) + b"}("
    + b"".join(value(str(i))[:-2] + tensor() for i in range(2_000)) + b"us",
}  # fmt: skip
HARMLESS = ("list-in-itself", "dict-in-itself", "dicts-shared", "deep-lists", "deep-dicts")

WORKER = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from converting.torch_file import read_torch_file
from npllama.errors import WeightsError
resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
for path in map(Path, sys.argv[2:]):
    print(path.stem, end="\\t", flush=True)
    # Limit the processor time to 10 seconds. A bomb would need forever, and all others need much
    # less. The signal ends this process even during a call of C code.
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        read_torch_file(path)
        outcome = "read"
    except WeightsError as error:
        outcome = "refused" if str(error).isprintable() else "many lines"
    except BaseException as error:
        outcome = repr(error)[:200]
    signal.setitimer(signal.ITIMER_PROF, 0)
    # not ru_maxrss, which starts with the peak of the parent process
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) // 1024
    print(outcome, peak, sep="\\t", flush=True)
"""


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Name -> (outcome, peak MB) of every bomb, including those that kill the process."""
    folder = tmp_path_factory.mktemp("bombs")
    left = [write_zip(folder / f"{name}.pth", opcodes) for name, opcodes in BOMBS.items()]
    results = {}
    while left:
        command = [sys.executable, "-c", WORKER, str(ROOT / "tools"), *map(str, left)]
        result = subprocess.run(command, capture_output=True, text=True)
        for line in result.stdout.splitlines():
            name, *fields = line.split("\t")
            if fields == [""]:
                results[name] = (f"ended with {result.returncode}", 0)
            else:
                results[name] = (fields[0], int(fields[1]))
        assert results, result.stderr
        left = [path for path in left if path.stem not in results]
    return results


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_defused(bombs, name):
    outcome, megabytes = bombs[name]
    assert outcome == "refused" or (outcome == "read" and name in HARMLESS)
    assert megabytes < 500


def test_the_tests_pickles_say_what_they_mean(pth):
    """A control: Python's unpickler reads the plain parts in the same way."""
    for plain in (1, "text", (1, "two"), {"a": [1]}, -(2**70)):
        assert pickle.loads(b"\x80\x02" + value(plain) + b".") == plain
    read = read_torch_file(write_zip(pth, named(tensor())))
    assert isinstance(read["t0"], Tensor)
    assert json.dumps(list(read)) == '["t0"]'
    assert zipfile.ZipFile(io.BytesIO(pth.read_bytes())).testzip() is None
