"""The reader of .safetensors files: its views, and one-line errors for whatever the library
refuses."""

import json
import mmap
import re
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from npllama.errors import WeightsError
from npllama.safetensors_file import DTYPES, SafetensorsFile, header_of

FLOAT_DTYPES = ["float32", "float16", ml_dtypes.bfloat16]
SHAPES = [(), (1,), (0,), (3, 0), (7,), (3, 5), (2, 3, 4)]


def raw_file(path, header, data=b"", length=None):
    """Write a file with this header, JSON or raw bytes, and with `length` as its stated length."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + data)
    return path


def entry(begin, end, shape=None, dtype="F32"):
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refused(path):
    """The one-line message with which a file is refused, without the path."""
    with pytest.raises(WeightsError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


def damaged(path):
    """The reason in the message for a damaged file, which also contains the file's size."""
    message = refused(path)
    match = re.fullmatch(
        r" is damaged or truncated \(it has (\d+) bytes; (.+)\): get the file again", message
    )
    assert match is not None, message
    assert int(match[1]) == path.stat().st_size
    return match[2]


def refused_by_the_library(path):
    """Check that the safetensors library refuses the file too, so the file is invalid and not only
    unusual."""
    with pytest.raises((safetensors.SafetensorError, ValueError)):
        safetensors.numpy.load_file(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def written(path, rng):
    """Write a file with three tensors, and return its bytes."""
    tensors = {"a": rng.random((2, 3)), "b.weight": rng.random(5), "c": rng.random(())}
    tensors = {name: np.asarray(array, dtype="float32") for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, path)
    return path.read_bytes()


# -- agreement with the library


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_it_reads_what_the_library_wrote(path, rng, dtype):
    tensors = {
        f"tensor.{i}": np.asarray(rng.standard_normal(shape)).astype(dtype)
        for i, shape in enumerate(SHAPES)
    }
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    file, library = SafetensorsFile(path), safetensors.numpy.load_file(path)
    assert set(file.tensors) == set(tensors) == set(library)
    for name, array in tensors.items():
        got = file[name]
        assert got.dtype == array.dtype == library[name].dtype == file.tensors[name].dtype
        assert got.shape == array.shape == library[name].shape == file.tensors[name].shape
        assert got.tobytes() == array.tobytes() == library[name].tobytes()


def test_one_file_may_mix_dtypes(path, rng):
    tensors = {np.dtype(dtype).name: rng.random((3, 5)).astype(dtype) for dtype in FLOAT_DTYPES}
    safetensors.numpy.save_file(tensors, path)
    file = SafetensorsFile(path)
    for name, array in tensors.items():
        assert file[name].dtype == array.dtype and np.array_equal(file[name], array)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_bit_pattern_survives(path, dtype):
    words = np.arange(2**16, dtype="uint16")
    bits = np.concatenate([words, words]).view(dtype)  # includes NaNs and infinities
    safetensors.numpy.save_file({"w": bits}, path)
    assert SafetensorsFile(path)["w"].tobytes() == bits.tobytes()


def test_names_may_be_any_text(path):
    names = ["", "a b", "ünï", "羊驼", "🦙", 'quote"', "dot.dot"]
    tensors = {name: np.full(2, i, dtype="float32") for i, name in enumerate(names)}
    safetensors.numpy.save_file(tensors, path)
    file = SafetensorsFile(path)
    assert [file[name][0] for name in names] == list(range(len(names)))


def test_a_file_without_tensors_is_a_file(path):
    safetensors.numpy.save_file({}, path)
    assert SafetensorsFile(path).tensors == {}


def test_the_order_in_the_header_is_not_the_order_of_the_data(path):
    header = {"second": entry(4, 12), "first": entry(0, 4), "empty": entry(4, 4)}
    raw_file(path, header, np.arange(3, dtype="float32").tobytes())
    file = SafetensorsFile(path)
    assert file["first"].tolist() == [0] and file["second"].tolist() == [1, 2]
    assert file["empty"].shape == (0,)
    assert safetensors.numpy.load_file(path)["second"].tolist() == [1, 2]


@pytest.mark.parametrize("padding", range(4))
def test_data_may_begin_at_any_byte(path, padding):
    header = json.dumps({"w": entry(0, 12)}).encode() + b" " * padding
    raw_file(path, header, np.array([1.5, -2, 3], dtype="float32").tobytes())
    w = SafetensorsFile(path)["w"]
    assert w.tolist() == [1.5, -2, 3] and (w @ w).item() == 15.25


# -- the memory map


def test_a_tensor_is_a_view_of_the_file_and_not_a_copy(path, written):
    file = SafetensorsFile(path)
    whole = np.frombuffer(file._map, dtype="uint8")
    for name, info in file.tensors.items():
        assert np.shares_memory(file[name], whole[info.begin : info.end])
        assert file[name].tobytes() == written[info.begin : info.end]
    assert isinstance(file._map, mmap.mmap)


def test_a_tensor_is_read_only(path, written):
    with pytest.raises(ValueError, match="read-only"):
        SafetensorsFile(path)["a"][0] = 1
    assert path.read_bytes() == written


def test_a_tensor_outlives_its_file(path, written):
    a = SafetensorsFile(path)["a"]
    path.unlink()
    assert a.tobytes() in written


def test_opening_a_large_file_reads_none_of_it(path):
    size = 2**33  # too large to copy
    header = json.dumps({"w": entry(0, size)}).encode()
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + size)  # a sparse file, which uses no disk space
    w = SafetensorsFile(path)["w"]
    assert w.shape == (2**31,) and w[-1] == 0


# -- truncated and extended files


def test_a_truncated_file_is_refused_wherever_it_ends(path, written):
    for size in range(len(written)):
        path.write_bytes(written[:size])
        assert "header" in damaged(path)
    path.write_bytes(written)
    assert len(SafetensorsFile(path).tensors) == 3


@pytest.mark.parametrize("surplus", [b"\0", b" " * 8, b"\0" * 4096])
def test_bytes_after_the_last_tensor_are_refused(path, written, surplus):
    path.write_bytes(written + surplus)
    assert "file not fully covered" in damaged(path)
    refused_by_the_library(path)


@pytest.mark.parametrize("length", [10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_huge_header_length_is_refused_before_it_is_read(path, length):
    raw_file(path, b"{}", length=length)
    assert "header too large" in damaged(path)


def test_a_header_beyond_the_librarys_limit_is_refused_even_if_it_is_there(path):
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", 10**8 + 1))
        out.truncate(8 + 10**8 + 1)
    assert "header too large" in damaged(path)
    refused_by_the_library(path)


@pytest.mark.parametrize("change", [-9, -2, -1, 1, 2, 9])
def test_a_header_length_that_is_off_is_refused(path, written, change):
    length = struct.unpack("<Q", written[:8])[0]
    path.write_bytes(struct.pack("<Q", length + change) + written[8:])
    assert "header" in damaged(path)


@pytest.mark.parametrize("name", ["a b.safetensors", "ünï🦙.safetensors", "\udcff.safetensors"])
def test_a_path_may_be_any_that_the_system_knows(tmp_path, name):
    safetensors.numpy.save_file({"w": np.ones(2, dtype="float32")}, tmp_path / "plain")
    try:
        (tmp_path / "plain").rename(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    assert SafetensorsFile(tmp_path / name)["w"].tolist() == [1, 1]


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert "No such file" in refused(tmp_path / "model.safetensors")
    assert "directory" in refused(tmp_path)


# -- inconsistent headers

NOT_A_HEADER = {
    "empty": b"",
    "not JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "a string": b'"a"',
    "not UTF-8": b'{"\xff": 1}',
    "deeply nested": b"[" * 100_000,
    "an integer of 5000 digits": b'{"w": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("header", NOT_A_HEADER.values(), ids=NOT_A_HEADER)
def test_a_header_that_is_no_json_object_is_refused(path, header):
    raw_file(path, header)
    assert "in header" in damaged(path)
    refused_by_the_library(path)


OTHER_DTYPES = {  # bytes of 8 elements
    "F64": 64,
    "I32": 32,
    "I64": 64,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F4": 4,
    "C64": 64,
    "U16": 16,
}
F32 = np.array([1, 2, 3], dtype="float32").tobytes()

MALFORMED = {
    "no object": [1, 2],
    "null": None,
    "a string": "dtype",
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "shape is a number": entry(0, 4, 1),
    "shape is null": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]},
    "shape is a string": entry(0, 4, "1"),
    "shape of strings": entry(0, 4, ["1"]),
    "shape of fractions": entry(0, 4, [1.0]),
    "shape of truths": entry(0, 4, [True]),
    "nested shape": entry(0, 4, [[1]]),
    "negative shape": entry(0, 4, [-1]),
    "twice negative shape": entry(0, 4, [-1, -1]),
    "shape is an object": entry(0, 4, {}),
    "one offset": {"dtype": "F32", "shape": [1], "data_offsets": [0]},
    "three offsets": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
    "offsets are a number": {"dtype": "F32", "shape": [1], "data_offsets": 4},
    "offsets are null": {"dtype": "F32", "shape": [1], "data_offsets": None},
    "offsets of fractions": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]},
    "offsets of strings": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
    "negative offset": entry(-4, 0, [1]),
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_entry_is_refused_with_its_place(path, value):
    raw_file(path, {"my.tensor": value}, bytes(4))
    assert re.search(r"header: .+ at line 1 column \d+$", damaged(path))
    refused_by_the_library(path)


@pytest.mark.parametrize(("dtype", "n"), OTHER_DTYPES.items())
def test_a_dtype_of_no_use_here_is_refused_with_those_of_use(path, dtype, n):
    raw_file(path, {"my.tensor": entry(0, n, [8], dtype)}, bytes(n))
    message = refused(path)
    assert "my.tensor" in message and f"as {dtype}" in message and "F32, F16, BF16" in message


@pytest.mark.parametrize(("dtype", "n"), OTHER_DTYPES.items())
def test_an_ignored_tensor_may_have_any_dtype(path, dtype, n):
    header = {
        "a": entry(0, 4),
        "ignored": entry(4, 4 + n, [8], dtype),
        "b": entry(4 + n, 12 + n),
    }
    raw_file(path, header, b"".join([F32[:4], bytes(n), F32[4:]]))
    file = SafetensorsFile(path, is_ignored=lambda name: name == "ignored")
    assert set(file.tensors) == {"a", "b"}
    assert file["a"].tolist() == [1] and file["b"].tolist() == [2, 3]


@pytest.mark.parametrize("dtype", ["f32", "float32", "", "X", None, 32, [], ["F32"], {}, "F\n32"])
def test_a_dtype_that_there_is_not_is_refused(path, dtype):
    raw_file(path, {"my.tensor": entry(0, 4, [1], dtype)}, bytes(4))
    assert "in header: " in damaged(path)
    refused_by_the_library(path)


@pytest.mark.parametrize(
    "value",
    [
        entry(0, 8, [3]),
        entry(0, 8, [1]),
        entry(0, 8, []),
        entry(0, 8, [0]),
        entry(0, 8, [2, 2]),
        entry(0, 8, [2], "BF16"),
        entry(8, 0, [2]),
    ],
)
def test_a_shape_that_does_not_fill_its_bytes_is_refused(path, value):
    raw_file(path, {"my.tensor": value}, bytes(8))
    assert re.search("invalid (shape|offset)", damaged(path))
    refused_by_the_library(path)


IMPOSSIBLE = {
    "2^64 x 0": [2**64, 0],
    "2^63 x 0": [2**63, 0],
    "2^62 x 2^62 x 0": [2**62, 2**62, 0],
    "no bytes if counted in 64 bits": [2**32, 2**32],
    "1000 digits, of one number": [10**999],
    "8000 digits, of two": [10**4000, 10**4000],
    "5000 digits, of many": [2**62] * 300,
    "more axes than NumPy has": [1] * 100 + [0],
}


@pytest.mark.parametrize("shape", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_shape_that_no_array_can_have_is_refused(path, shape):
    raw_file(path, {"my.tensor": entry(0, 0, shape)})
    assert re.search("shape|number|invalid type", damaged(path))
    refused_by_the_library(path)


LAYOUTS = {
    "a gap before the first": ({"a": entry(4, 8), "b": entry(8, 12)}, 12),
    "a gap between": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "a gap after the last": ({"a": entry(0, 4), "b": entry(4, 8)}, 12),
    "one over another": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "one inside another": ({"a": entry(0, 12), "b": entry(4, 8)}, 12),
    "two at one place": ({"a": entry(0, 12), "b": entry(0, 12)}, 12),
    "an empty one inside another": ({"a": entry(0, 12), "b": entry(4, 4)}, 12),
    "past the end": ({"a": entry(0, 4), "b": entry(4, 16)}, 12),
    "far past the end": ({"a": entry(0, 2**40)}, 12),
    "an empty one past the end": ({"a": entry(0, 12), "b": entry(16, 16)}, 12),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_that_overlap_or_leave_gaps_are_refused(path, layout):
    header, size = layout
    raw_file(path, header, bytes(size))
    assert re.search("invalid offset for tensor `[ab]`|file not fully covered", damaged(path))
    refused_by_the_library(path)


def test_a_line_break_in_a_name_does_not_break_the_message(path):
    raw_file(path, {"my\ntensor": entry(4, 8)}, bytes(8))
    assert r"`my\ntensor`" in damaged(path)


def test_no_flipped_byte_of_the_header_raises_anything_else(path, written, rng):
    length = struct.unpack("<Q", written[:8])[0]
    for _ in range(2000):
        damaged = bytearray(written)
        for position in rng.integers(0, 8 + length, rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
        except WeightsError as error:
            assert len(str(error).splitlines()) == 1
        else:  # a name may have changed, or the bytes are the same as before
            assert all(file[name].nbytes <= 24 for name in file.tensors)


# -- writing


def test_the_library_reads_what_a_header_describes(path, rng):
    tensors = {
        "ids": np.arange(3, dtype="int32"),
        "single": rng.random((2, 3)).astype("float32"),
        "empty": np.zeros((0, 4), dtype="float32"),
        "half": rng.random(5).astype("float16"),
        "brain": rng.random((1, 2)).astype(ml_dtypes.bfloat16),
        "small": np.array(7, dtype="int8"),
    }
    header = header_of({n: (a.dtype, a.shape) for n, a in tensors.items()}, {"why": "a test"})
    assert len(header) % 8 == 0
    path.write_bytes(header + b"".join(array.tobytes() for array in tensors.values()))
    library = safetensors.numpy.load_file(path)
    assert set(library) == set(tensors)
    for name, array in tensors.items():
        assert library[name].dtype == array.dtype and np.array_equal(library[name], array)
    dtypes = {**DTYPES, "I32": np.dtype("int32")}
    file = SafetensorsFile(path, dtypes)
    assert file.metadata == {"why": "a test"}
    assert all(np.array_equal(file[name], array) for name, array in tensors.items())


def test_a_file_without_metadata_has_none(path, written):
    assert SafetensorsFile(path).metadata == {}
