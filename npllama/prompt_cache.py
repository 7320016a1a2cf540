"""A prompt cache: a file with the keys and values of token ids, which need not be computed again.

The file has the safetensors format. It contains the ids (n,) int32 and, for each layer, keys and
values (K, n, C) in the dtype of the cache. Its metadata contain the version of the format and what
the keys and values depend on (npllama.cache_fingerprint).

A file may come from an untrusted source: everything in it is checked, and nothing is executed.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from npllama.atomic_file import atomic_file
from npllama.backend import Array
from npllama.cache_fingerprint import DIGESTS, SHAPE, fingerprint, shape_of
from npllama.errors import InputError, WeightsError
from npllama.kv_cache import KVCache, common_length
from npllama.model import Transformer
from npllama.safetensors_file import DTYPES, SafetensorsFile, header_of
from npllama.sampling_options import is_integer

VERSION = "1"
"""The version of the file format, and of the computation of keys and values."""
_KIND, _KIND_VALUE, _VERSION = "format", "npllama prompt cache", "version"
_IDS = "ids"
_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.kind != "i"}
_DTYPES = _FLOATS | {"I32": np.dtype("int32")}
_INSTEAD = "give another file, or delete this one"


def save_cache(model: Transformer, cache: KVCache, path: str | Path, row: int = 0) -> None:
    """Write the keys, values and ids of a row to a file, whole or not at all.

    Args:
        cache: a cache of `model`.
        path: a new file, or a prompt cache, which is replaced. A link is followed.

    Raises:
        InputError: the row is empty, the cache is from another model, `path` is another kind of
            file, or it cannot be written.
    """
    model.check_own_cache(cache)
    cache.check_row(row)
    ids = cache.ids[row][: cache.lengths[row]]  # after Ctrl-C, fewer may be known
    if not ids:
        raise InputError(f"row {row} of the cache is empty: there is nothing to save")
    if not is_new(path):
        check_is_prompt_cache(path)
    metadata = {_KIND: _KIND_VALUE, _VERSION: VERSION} | fingerprint(model, ids)
    tensors = {_IDS: (np.dtype("int32"), (len(ids),))}
    shape = (model.sizes.n_kv_heads, len(ids), model.sizes.head_dim)
    tensors |= dict.fromkeys(_names(model), (cache.dtype, shape))
    model.backend.use()
    with atomic_file(Path(os.path.realpath(path))) as partial, open(partial, "wb") as file:
        file.write(header_of(tensors, metadata))
        file.write(np.asarray(ids, dtype="int32"))
        for buffer in cache.buffers(row):  # (K, context, C)
            part = model.backend.to_host(buffer[:, : len(ids)])
            file.write(np.ascontiguousarray(part).reshape(-1).view("uint8"))


def load_cache(
    model: Transformer,
    path: str | Path,
    ids: Sequence[int] | None = None,
    context: int | None = None,
) -> KVCache:
    """A cache of one row, read from a file that `save_cache` wrote.

    If the dtype of the file differs from the dtype of the model's caches, the elements are
    converted.

    Args:
        ids: a prompt. The row gets the first ids that the file and the prompt have in common,
            without the prompt's last id. None is all ids of the file.
        context: positions of the cache; None is the model's context. Ids of the file that do not
            fit are left out.

    Raises:
        InputError: the file does not exist, is damaged, is no prompt cache, or is from another
            model or other options; or `ids` is not a prompt.
        OutOfMemoryError: the positions do not fit the memory.
    """
    return StoredPrompt(model, path).to_cache(ids, context)


class StoredPrompt:
    """An open prompt cache that fits a model.

    Args:
        model: the model that will use it.
        path: the file.

    Attributes:
        ids: (n,) int32, a view of the file.

    Raises:
        InputError: see `load_cache`.
    """

    def __init__(self, model: Transformer, path: str | Path) -> None:
        self._model, self._path = model, path
        self._file = _open(path)
        self._check_version()
        self._check_same({SHAPE: shape_of(model)})  # first: the tensors' shapes follow from it
        self.ids = self._checked_ids()
        self._check_tensors()
        self._check_same(fingerprint(model, self.ids))

    def to_cache(self, ids: Sequence[int] | None = None, context: int | None = None) -> KVCache:
        """A cache with the content of the file; see `load_cache`."""
        model = self._model
        context = model.context if context is None else context
        if not is_integer(context):
            raise InputError(f"context is {context!r:.60}: expected a whole number from 1")
        stored = self.ids.tolist()
        n = len(stored)
        if ids is not None:
            model.to_tokens(ids)  # raises an error if they are not a prompt
            n = common_length(stored, ids)
        model.check_memory(1, context)
        cache = model.new_cache(1, context)
        n = min(n, context)
        cache.fill(0, stored[:n], self._arrays(n, cache.dtype))
        return cache

    def _arrays(self, n: int, dtype: np.dtype) -> Iterator[Array]:
        """The keys and values (K, n, C) of each layer, in the order of `KVCache.buffers`."""
        for name in _names(self._model):
            with np.errstate(over="ignore"):  # infinite elements are refused below
                part = self._file[name][:, :n].astype(dtype, copy=False)
            if not np.isfinite(part).all():
                raise self._refused(f"its tensor {name} has elements that are not finite")
            yield self._model.backend.to_device(part)

    def _check_version(self) -> None:
        version = self._file.metadata.get(_VERSION, "")
        if version != VERSION:
            raise self._refused(
                f"it has version {version[:20]!r} and this npllama reads version {VERSION!r}"
            )

    def _check_same(self, ours: Mapping[str, str]) -> None:
        """Refuse a file whose keys and values another model or computation gave."""
        for name, value in ours.items():
            theirs = self._file.metadata.get(name, "")
            if theirs != value:
                values = f" ({theirs!r:.80} there, {value!r} here)" if name not in DIGESTS else ""
                raise InputError(
                    f"{self._path} is the prompt cache of another model, or of other options: the "
                    f"difference is in the {name}{values}; {_INSTEAD}"
                )

    def _checked_ids(self) -> Array:
        info = self._file.tensors.get(_IDS)
        if info is None or info.dtype != np.int32 or len(info.shape) != 1 or not info.shape[0]:
            raise self._refused("it has no token ids")
        ids = self._file[_IDS]
        n_vocab, most = self._model.config.vocab_size, self._model.config.longest_context
        if len(ids) > most:
            raise self._refused(f"it has {len(ids)} positions, and the model at most {most}")
        if ids.min() < 0 or ids.max() >= n_vocab:
            raise self._refused(f"it has token ids outside the vocabulary of {n_vocab}")
        return ids

    def _check_tensors(self) -> None:
        sizes, tensors = self._model.sizes, self._file.tensors
        shape = (sizes.n_kv_heads, len(self.ids), sizes.head_dim)
        names = list(_names(self._model))
        for name in names:
            if name not in tensors:
                raise self._refused(f"it has no tensor {name}")
        dtype = tensors[names[0]].dtype
        for name in names:
            if tensors[name].shape != shape:
                raise self._refused(
                    f"its tensor {name} has shape {list(tensors[name].shape)}, expected "
                    f"{list(shape)}"
                )
            if tensors[name].dtype != dtype or dtype not in _FLOATS.values():
                raise self._refused(f"its tensor {name} has dtype {tensors[name].dtype.name}")

    def _refused(self, why: str) -> InputError:
        return InputError(f"{self._path} cannot be used as a prompt cache: {why}; {_INSTEAD}")


def check_is_prompt_cache(path: str | Path) -> None:
    """Raise InputError unless a file is a prompt cache, of any model.

    Raises:
        InputError: it does not exist, is another kind of file, is damaged, or cannot be read.
    """
    _open(path)


def is_new(path: str | Path) -> bool:
    """Whether a path does not exist. Links are followed.

    Raises:
        InputError: the path is not a valid name of a file, or cannot be read.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise InputError(f"the path of a prompt cache is {path!r}: expected the name of a file")
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the prompt cache {path} cannot be read: {reason}") from None
    return False


def _open(path: str | Path) -> SafetensorsFile:
    """An open prompt cache, of any model.

    Raises:
        InputError: see `check_is_prompt_cache`.
    """
    if is_new(path):
        raise InputError(f"the prompt cache {path} does not exist: give the name of a prompt cache")
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):  # reading a pipe would wait
        what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"the prompt cache {path} is {what}: expected the name of a file")
    try:
        file = SafetensorsFile(Path(path), _DTYPES, is_ignored=_is_foreign, remedy=_INSTEAD)
    except WeightsError as error:
        raise InputError(f"the prompt cache {error}") from None
    if file.metadata.get(_KIND) != _KIND_VALUE:
        raise InputError(
            f"{path} is not a prompt cache of npllama: give the name of a new file, or of a file "
            "that --prompt-cache or save_cache wrote"
        )
    return file


def _is_foreign(name: str) -> bool:
    return name != _IDS and re.fullmatch(r"layers\.\d+\.[kv]", name) is None


def _names(model: Transformer) -> Iterator[str]:
    """The tensors of keys and values, in the order of `KVCache.buffers`."""
    return (f"layers.{i}.{part}" for i in range(model.sizes.n_layers) for part in "kv")
