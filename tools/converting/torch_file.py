"""Reads files that torch.save wrote, without torch and without trusting them.

A .pth or .bin file holds a pickle whose tensors are views of raw storages. In the layout since
PyTorch 1.6 it is a zip archive with data.pkl and the storages under data/N. In the older (legacy)
layout, several pickles are followed by the storages.

A pickle is a program that may call anything. Here it runs with an allow list of the few globals
that tensors need. Each of them is replaced by a function of this module that only records its
arguments. Any other global is refused by name and never called.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from converting.source import Tensor, read_numbers
from npllama.errors import WeightsError
from npllama.not_a_model import content_instead

_STORAGES = {
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("float64"),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}
_MAX_PICKLE = 64 * 2**20  # bytes; far more than the largest models' or optimizers' pickles have
_MAX_OPCODES = 2**19  # per pickle; far more than the shards of a 70B model have
_MAX_TEXT = 2**16
_MAX_LEAVES = 256  # of a tuple; a nested tuple counts each time it occurs
_MAX_HUGE = 64  # integers beyond 61 bits, because thousands of them can share one hash
_MAX_NAME = 200
_MAX_AXES = 8
_REFUSED_OPCODES = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Unchangeable:
    """An object that a pickle may receive but not modify. A BUILD opcode would otherwise set
    attributes, even of a frozen dataclass."""

    __slots__ = ()

    def __setstate__(self, _state: Any) -> NoReturn:
        raise pickle.UnpicklingError("a change to an object that torch does not change")


class _Dict(dict):
    """Replaces OrderedDict. Attributes that torch sets on it (_metadata) are dropped."""

    __slots__ = ()

    def __init__(self) -> None:  # takes no items: torch adds them one by one
        super().__init__()

    def __setstate__(self, _state: Any) -> None:
        pass


@dataclass(frozen=True)
class _Function(_Unchangeable):
    """Replaces a function of torch."""

    run: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)


@dataclass(frozen=True)
class _StorageType(_Unchangeable):
    """Replaces torch.FloatStorage and similar classes."""

    dtype: np.dtype


@dataclass(frozen=True)
class _Storage(_Unchangeable):
    """A storage that a tensor refers to: its key in the file, its dtype and its length."""

    key: str
    dtype: np.dtype
    n: int


class _View(_Unchangeable):
    """A tensor as the pickle describes it: a strided view of a storage."""

    __slots__ = ("offset", "shape", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, shape: tuple, stride: tuple) -> None:
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride


def read_torch_file(path: Path) -> Any:
    """Read the object that torch.save wrote. Its tensors become Tensors that are read on demand.

    Raises:
        WeightsError: the file is damaged, its pickle would call other globals, or a tensor
            reaches outside its storage.
    """
    if (what := content_instead(path)) is not None:
        raise WeightsError(f"{path} {what}")
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                root, storages = _read_zip(path, file)
            else:
                file.seek(0)
                root, storages = _read_legacy(path, file)
    except zipfile.BadZipFile as error:  # is_zipfile raises it too, for multi-disk archives
        _damaged(path, f"its zip directory cannot be read: {error}")
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from None
    size = path.stat().st_size
    return _with_tensors(root, path, storages, size, "", {})


def is_torch_file(path: Path) -> bool:
    """Whether the file begins like one of torch.save: a zip archive, or a pickled magic number."""
    with open(path, "rb") as file:
        start = file.read(16)
    return start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and b"\x8a\x0a\x6c\xfc" in start)


def checked_tensors(root: Any, path: Path) -> dict[str, Tensor]:
    """Check that `root` is a state dict, which maps names to tensors and holds nothing else."""
    if not isinstance(root, dict) or not root:
        raise WeightsError(f"{path} holds a {type(root).__name__}: expected a dict of tensors")
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {name!r} is a {type(value).__name__}: expected a tensor")
    return root


# -- the two layouts: read the pickle, and find where the bytes of each storage begin


def _read_zip(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, tuple[int, int]]]:
    try:
        archive = zipfile.ZipFile(file)
        infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        _damaged(path, f"its zip directory cannot be read: {error}")
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        _damaged(path, "its zip directory names a file twice")
    pickles = [info for info in infos if info.filename.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        _damaged(path, f"its zip archive holds {len(pickles)} data.pkl: expected one")
    prefix = pickles[0].filename.removesuffix("data.pkl")
    if pickles[0].file_size > _MAX_PICKLE:
        _damaged(path, f"its data.pkl claims {pickles[0].file_size} bytes, which is too large")
    begin, n = _stored_range(path, file, pickles[0])
    file.seek(begin)
    stream = io.BytesIO(file.read(n))
    storages = {}
    for info in infos:
        if info.filename.startswith(f"{prefix}data/"):
            key = info.filename.removeprefix(f"{prefix}data/")
            storages[key] = _stored_range(path, file, info)
    if any(info.filename == f"{prefix}byteorder" for info in infos):
        info = archive.getinfo(f"{prefix}byteorder")
        begin, n = _stored_range(path, file, info)
        file.seek(begin)
        if file.read(min(n, 16)) != b"little":
            _damaged(path, "its storages are not little-endian")
    return _unpickle(path, stream, storages), storages


def _stored_range(path: Path, file: io.BufferedReader, info: zipfile.ZipInfo) -> tuple[int, int]:
    """(first byte, length) of an uncompressed entry."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        _damaged(path, f"its entry {info.filename} is compressed: torch.save does not compress")
    header = b""
    if 0 <= info.header_offset < file.seek(0, 2):
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        _damaged(path, f"its entry {info.filename} does not begin where the directory says")
    name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return info.header_offset + 30 + name_length + extra_length, info.file_size


def _read_legacy(path: Path, file: io.BufferedReader) -> tuple[Any, dict[str, tuple[int, int]]]:
    size = file.seek(0, 2)
    file.seek(0)
    declared: dict[str, tuple[int, int]] = {}
    if _unpickle(path, file, {}) != _LEGACY_MAGIC:
        _damaged(path, "it is neither a zip archive nor a legacy file of torch.save")
    if _unpickle(path, file, {}) != _LEGACY_PROTOCOL:
        _damaged(path, "its protocol is not 1001")
    system = _unpickle(path, file, {})
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        _damaged(path, "its storages are not little-endian")
    root = _unpickle(path, file, declared, legacy=True)
    keys = _unpickle(path, file, {})
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        _damaged(path, "its list of storages is not a list of names")
    storages = {}
    for key in keys:
        if key not in declared:
            _damaged(path, f"its storage {key!r} belongs to no tensor")
        n, itemsize = declared[key]
        if int.from_bytes(file.read(8), "little") != n:
            _damaged(path, f"its storage {key} has another length than its tensors say")
        begin = file.tell()
        if begin + n * itemsize > size:
            _damaged(path, f"its storage {key} ends beyond the file")
        storages[key] = (begin, n * itemsize)
        file.seek(begin + n * itemsize)
    return root, storages


# -- the pickle


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, path: Path, note: Callable[[_Storage], None]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._path = path
        self._note = note

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        allowed = _ALLOWED.get((module, name))
        if allowed is None:
            raise WeightsError(
                f"{self._path} would call {module}.{name}, which tensors do not need: "
                "it was not run; get the file from a source that you trust"
            )
        return allowed

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _location, n = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError("a reference to something that is not a storage")
        if not isinstance(key, str) or type(n) is not int or n < 0:
            raise pickle.UnpicklingError("a malformed reference to a storage")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("a view of a storage, which torch no longer writes")
        storage = _Storage(key, storage_type.dtype, n)
        self._note(storage)
        return storage


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_unused: Any) -> _View:
    """Replaces torch._utils._rebuild_tensor(_v2). requires_grad, hooks and metadata are ignored."""
    integers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or not all(type(n) is int and n >= 0 for n in integers):
        raise pickle.UnpicklingError("a malformed tensor")
    if len(shape) != len(stride) or len(shape) > _MAX_AXES:
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} axes and {len(stride)} strides")
    return _View(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_unused: Any) -> Any:
    """Replaces torch._utils._rebuild_parameter. A parameter is represented by its tensor."""
    return data


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
}


def _unpickle(
    path: Path, stream: Any, storages: dict[str, tuple[int, int]], legacy: bool = False
) -> Any:
    """Load one pickle and leave the stream at its end.

    In a legacy file the storages follow the pickle. `storages` then receives (length, item size)
    for each key.
    """

    def note(storage: _Storage) -> None:
        extent = (storage.n, storage.dtype.itemsize)
        if legacy and storages.setdefault(storage.key, extent) != extent:
            raise pickle.UnpicklingError(f"storage {storage.key} has two lengths")
        if not legacy and storage.key not in storages:
            raise pickle.UnpicklingError(f"storage {storage.key} is not in the file")

    begin = stream.tell()
    try:
        content = io.BytesIO(stream.read(_MAX_PICKLE))
        _check_opcodes(content)
        stream.seek(begin + content.tell())
        content.seek(0)
        return _Unpickler(content, path, note).load()
    except WeightsError:
        raise
    except (Exception, MemoryError) as error:  # a damaged pickle can raise almost any exception
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        _damaged(path, f"its pickle cannot be read: {reason}")


def _check_opcodes(content: io.BytesIO) -> None:
    """Scan a pickle without running it, and refuse what could take unbounded memory or time.

    - Lengths that the file does not have, a huge memo, and huge integers or texts take memory.
    - Tuples with many leaves take time: hashing visits every leaf, and recurses without a limit.
    - Tuples as dict keys, and many huge integers, can be made to share one hash. A dict of them
      takes quadratic time.
    """
    stack: list[int] = []  # number of leaves of each value; 0 stands for a mark
    leaves: dict[int, int] = {}  # number of leaves of each memo entry
    puts = huge = 0
    for count, (opcode, argument, _position) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if name in _REFUSED_OPCODES:
            raise pickle.UnpicklingError(f"opcode {name}, which torch does not write")
        if count > _MAX_OPCODES:
            raise pickle.UnpicklingError(f"more than {_MAX_OPCODES} opcodes")
        if isinstance(argument, int) and abs(argument) >= 2**128:
            raise pickle.UnpicklingError("an integer of more than 128 bits")
        if isinstance(argument, int) and abs(argument) >= 2**61 - 1:
            huge += 1
            if huge > _MAX_HUGE:
                raise pickle.UnpicklingError(f"more than {_MAX_HUGE} integers beyond 61 bits")
        if isinstance(argument, str | bytes | bytearray) and len(argument) > _MAX_TEXT:
            raise pickle.UnpicklingError(f"a text of {len(argument)} characters")
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            puts += 1
            key = len(leaves) if name == "MEMOIZE" else argument
            if key > 16 * puts + 256:
                raise pickle.UnpicklingError(f"memo entry {key}, far beyond the previous ones")
            leaves[key] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(leaves.get(argument, 1))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            stack.append(0)
        elif name == "POP":
            stack.pop()
        else:
            before = opcode.stack_before
            taken = []
            if pickletools.markobject in before:
                while item := stack.pop():
                    taken.append(item)
                before = before[: before.index(pickletools.markobject)]
            if name in ("ADDITEMS", "FROZENSET"):
                keys = taken
            else:
                keys = taken[1::2] if name == "SETITEMS" else []
            taken += [stack.pop() for _ in before]
            if name == "SETITEM":
                keys = taken[1:2]
            if any(key > 1 for key in keys):
                raise pickle.UnpicklingError("a tuple as a key")
            total = 1 + sum(taken) if name.startswith("TUPLE") else 1
            if total > _MAX_LEAVES:
                raise pickle.UnpicklingError(f"a tuple of {total} values")
            stack += [total] * len(opcode.stack_after)


# -- views -> tensors


def _with_tensors(
    value: Any,
    path: Path,
    storages: dict[str, tuple[int, int]],
    size: int,
    name: str,
    seen: dict[int, Any],
) -> Any:
    """Replace every view in the object by its Tensor; leave other values unchanged.

    Only dicts are searched, only to the depth that checkpoints have, and each dict only once. In a
    pickle the same dict can occur several times, even inside itself.
    """
    if isinstance(value, _View):
        return _tensor(value, path, storages, size, name)
    if not isinstance(value, dict) or name.count("/") >= 4:
        return value
    if id(value) not in seen:
        seen[id(value)] = out = {}
        for key, item in value.items():
            shown = str(key)[:_MAX_NAME] if isinstance(key, str | int) else type(key).__name__
            out[key] = _with_tensors(item, path, storages, size, f"{name}/{shown}", seen)
    return seen[id(value)]


def _tensor(
    view: _View, path: Path, storages: dict[str, tuple[int, int]], size: int, name: str
) -> Tensor:
    name = name.strip("/")
    if view.storage.key not in storages:
        key = view.storage.key
        _damaged(path, f"tensor {name} lies in storage {key}, which is not in the file")
    begin, n_bytes = storages[view.storage.key]
    dtype = view.storage.dtype
    last = view.offset + sum(
        (n - 1) * step for n, step in zip(view.shape, view.stride, strict=True)
    )
    is_empty = 0 in view.shape
    if is_empty and math.prod(max(n, 1) for n in view.shape) >= 2**59:  # NumPy cannot make it
        _damaged(path, f"tensor {name} of shape {list(view.shape)} is larger than its storage")
    if not is_empty and (last + 1) * dtype.itemsize > n_bytes:
        _damaged(path, f"tensor {name} of shape {list(view.shape)} reaches outside its storage")
    if begin + n_bytes > size:
        _damaged(path, f"tensor {name} of shape {list(view.shape)} ends beyond the file")
    count = 1
    for n in view.shape:
        count *= n
    if count * dtype.itemsize > n_bytes:  # strides of 0 would expand a few bytes to a huge array
        _damaged(path, f"tensor {name} of shape {list(view.shape)} is larger than its storage")

    where = f"{path}: tensor {name}"
    first_byte = begin + view.offset * dtype.itemsize

    def read() -> np.ndarray:
        if is_empty:
            return np.empty(view.shape, dtype)
        flat = read_numbers(path, dtype, last + 1 - view.offset, first_byte, where)
        strides = [step * dtype.itemsize for step in view.stride]
        return np.lib.stride_tricks.as_strided(flat, view.shape, strides, writeable=False)

    place = (path, first_byte, dtype, view.shape, view.stride)
    return Tensor(where, dtype, view.shape, read, place=place)


def _damaged(path: Path, what: str) -> NoReturn:
    raise WeightsError(f"{path} is damaged ({what}): get the file again")
