"""The tensors of a model directory -> Parameters, with checks of names, shapes and dtypes.

Names and row order are Hugging Face's, so any Hugging Face LLaMA-2 directory loads unchanged.
Tensors are views of memory-mapped files. `ops.prepare` moves them to the device one at a time.
"""

import os
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import numpy as np

from npllama.backend import Array
from npllama.config import LlamaConfig, read_json
from npllama.errors import WeightsError
from npllama.not_a_model import directory_instead, unfinished_download
from npllama.ops import Ops
from npllama.parameters import Head, Layer, Matrix, Parameters
from npllama.progress import advance, work
from npllama.safetensors_file import SafetensorsFile, TensorInfo
from npllama.weight_formats import FORMATS, Format, format_of
from npllama.weight_table import (
    EMBEDDING,
    LM_HEAD,
    NORM,
    OF_LAYER,
    layer_name,
    named_weights,
    tensor_shapes,
)

JOINED_NBYTES = 10**9
"""Up to this model size, q, k and v that are not contiguous in the file are copied into one
matrix. The copy reads them from disk while loading; larger models are only mapped."""
NORM_FORMAT = FORMATS["float32"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def named_arrays(parameters: Parameters, config: LlamaConfig) -> dict[str, Array]:
    """Every tensor of `tensor_shapes` by its name in a file. The arrays are not copied. The
    scales of int8 matrices are not included."""
    arrays = {}
    for name, weight, layer in named_weights(config):
        if layer is not None:
            owner: object = parameters.layers[layer]
        else:
            owner = parameters if weight.field == "embedding" else parameters.head
        part = getattr(owner, weight.field)
        arrays[name] = part.values if weight.is_matrix else part
    return arrays


def check_none_missing(directory: Path, expected: list[str], found: Container[str]) -> None:
    """Raise WeightsError that names the tensors in `expected` that `found` lacks."""
    missing = [name for name in expected if name not in found]
    if missing:
        hint = ""
        if missing == [LM_HEAD]:
            hint = ' (if the head is tied, set "tie_word_embeddings": true in config.json)'
        raise WeightsError(
            f"{directory}: {_listed(missing)} missing: expected the {len(expected)} "
            f"tensors that the config describes{hint}"
        )


class Checkpoint:
    """The tensors of a model directory, checked against its config before any tensor is read.

    Args:
        directory: holds model.safetensors, or shards and model.safetensors.index.json.
        config: the model that the tensors must make up.
        dtype: name of the format of the matrices; None keeps each as stored. Norms are float32.

    Raises:
        WeightsError: tensors are missing, unexpected, misshapen or truncated. The message names
            them.
    """

    def __init__(self, directory: Path, config: LlamaConfig, dtype: str | None = None) -> None:
        self.directory = Path(directory)
        self.config = config
        self.format = None if dtype is None else FORMATS[dtype]
        self._file_of = _open_files(self.directory, config.tie_embeddings)
        self._check()

    @property
    def storage_dtype(self) -> np.dtype:
        """The dtype of the matrices once loaded, taken from the first query projection."""
        return (self.format or self._stored_format(layer_name(0, "wq"))).dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters once loaded."""
        return sum(self._each_nbytes())

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest tensor once loaded."""
        return max(self._each_nbytes())

    def _each_nbytes(self) -> Iterator[int]:
        for name, shape in tensor_shapes(self.config).items():
            is_norm = len(shape) == 1
            loaded = NORM_FORMAT if is_norm else self.format or self._stored_format(name)
            yield loaded.nbytes(shape)

    def parameters(self, ops: Ops) -> Parameters:
        """Load the tensors one at a time: convert each if asked to; pass it to `ops.prepare`."""
        with work("loading the weights", self.nbytes):
            return self._parameters(ops)

    def _parameters(self, ops: Ops) -> Parameters:
        eps = self.config.norm_eps
        is_small = self.nbytes <= JOINED_NBYTES
        embedding = ops.prepare(self._matrix(EMBEDDING))
        layers = []
        for i in range(self.config.n_layers):
            parts = {}
            for weight in OF_LAYER:
                read = self._matrix if weight.is_matrix else self._norm
                parts[weight.field] = read(layer_name(i, weight.field))
            layers.append(ops.prepare(Layer(**parts, norm_eps=eps), may_copy=is_small))
        lm_head = embedding if self.config.tie_embeddings else self._matrix(LM_HEAD)
        head = ops.prepare(Head(self._norm(NORM), lm_head, eps))
        return Parameters(embedding, tuple(layers), head)

    def _info(self, name: str) -> TensorInfo:
        return self._file_of[name].tensors[name]

    def _stored_format(self, name: str) -> Format:
        return format_of(self._info(name).dtype)

    def _norm(self, name: str) -> np.ndarray:
        norm = self._file_of[name][name].astype(NORM_FORMAT.dtype)
        advance(norm.nbytes)
        return norm

    def _matrix(self, name: str) -> Matrix:
        matrix = self._converted(name)
        advance(matrix.nbytes)
        return matrix

    def _converted(self, name: str) -> Matrix:
        stored = self._stored_format(name)
        parts = stored.stored(name, self._info(name).shape)
        arrays = [self._file_of[part][part] for part in parts]
        if self.format is None or stored is self.format:
            return Matrix(*arrays)
        values = stored.to_float(*arrays)
        converted = self.format.from_float(values)
        if self.format.largest and (np.isinf(converted[0]) & ~np.isinf(values)).any():
            raise WeightsError(
                f"{self._file_of[name].path}: tensor {name} has values beyond {self.format.name}'s "
                f"range of {self.format.largest}: use --dtype bfloat16 or float32"
            )
        return Matrix(*converted)

    def _check(self) -> None:
        if self.config.n_layers > len(self._file_of):  # before tensor_shapes lists every layer
            raise WeightsError(
                f"{self.directory}: config.json describes {self.config.n_layers} layers, but "
                f"the files hold {len(self._file_of)} tensors: get the missing layers as well"
            )
        shapes = tensor_shapes(self.config)
        for name, shape in list(shapes.items()):
            if len(shape) == 2 and name in self._file_of:
                parts = self._stored_format(name).stored(name, shape)
                shapes |= {part: part_shape for part, (_dtype, part_shape) in parts.items()}
        check_none_missing(self.directory, list(shapes), self._file_of)
        surplus = [name for name in self._file_of if name not in shapes and not self._is_tie(name)]
        if surplus:
            raise WeightsError(
                f"{self.directory}: {_listed(surplus)} not part of the model that config.json "
                f"describes: expected {len(shapes)} tensors"
            )
        for name, shape in shapes.items():
            found = self._info(name).shape
            if found != shape:
                raise WeightsError(
                    f"{self._file_of[name].path}: tensor {name} has shape {list(found)}: "
                    f"config.json asks for {list(shape)}"
                )
            stored = self._stored_format(name)
            if len(shape) == 1 and not stored.is_float:
                raise WeightsError(
                    f"{self._file_of[name].path}: tensor {name} is {stored.name}: expected a "
                    "float dtype"
                )

    def _is_tie(self, name: str) -> bool:
        """Whether `name` is a tied head that the file stores although it equals the embedding."""
        if name != LM_HEAD or EMBEDDING not in self._file_of:
            return False
        head, embedding = (self._file_of[n][n] for n in (LM_HEAD, EMBEDDING))
        return np.array_equal(head, embedding)


def read_index(path: Path) -> dict[str, str]:
    """Read the weight_map of an index: tensor name -> name of a file in the index's directory.

    Rotary tables are left out, because older indexes name them and newer shards do not hold them.

    Raises:
        ConfigError, WeightsError: the index is damaged, or names a file in another directory.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and shard == Path(shard).name and shard not in ("", "..")
        for shard in weight_map.values()
    ):
        raise WeightsError(
            f"{path}: weight_map does not name a file for each tensor: get the index again"
        )
    return {name: shard for name, shard in weight_map.items() if not is_rotary_table(name)}


def check_index(index: Path, tensors_of: Mapping[str, Container[str]], is_tied: bool) -> None:
    """Check that each file holds the tensors that the index assigns to it.

    Args:
        tensors_of: file name -> names of the tensors that the file holds.
        is_tied: whether the head is the embedding; if so, its tensor may be missing.

    Raises:
        WeightsError: a file lacks a tensor that the index assigns to it.
    """
    for name, shard in read_index(index).items():
        if name not in tensors_of[shard] and not (is_tied and name == LM_HEAD):
            raise WeightsError(
                f"{index.parent / shard} lacks tensor {name}, which {index.name} assigns to it: "
                "get both files again"
            )


def shard_files(directory: Path, single: str = SINGLE, index: str = INDEX) -> list[Path]:
    """The files that hold a model: `single`, or else all files that `index` names.

    Raises:
        ConfigError, WeightsError: neither exists, or a file that the index names is missing.
    """
    if (directory / single).exists():
        return [directory / single]
    if not (directory / index).exists():
        what = (
            f"has neither {single} nor {index}: expected a Hugging Face model directory; "
            "npllama convert makes one from other formats"
        )
        raise WeightsError(f"{directory} {directory_instead(directory) or what}")
    paths = [directory / shard for shard in sorted(set(read_index(directory / index).values()))]
    for path in paths:
        if not os.path.exists(path):  # for a name that is too long: False, not an OSError
            unfinished = unfinished_download(directory)
            hint = f"; {unfinished} is an unfinished download, run it again" if unfinished else ""
            raise WeightsError(f"{path} is missing: {index} names it, get it as well{hint}")
    return paths


def is_rotary_table(name: str) -> bool:
    """Whether a tensor is a rotary table. Older files hold them; this code computes its own."""
    return name.endswith(".rotary_emb.inv_freq")


def _open_files(directory: Path, is_tied: bool) -> dict[str, SafetensorsFile]:
    """Tensor name -> the open file that holds it."""
    files = {
        path.name: SafetensorsFile(path, is_ignored=is_rotary_table)
        for path in shard_files(directory)
    }
    file_of = {name: file for file in files.values() for name in file.tensors}
    if SINGLE not in files:
        tensors_of = {shard: file.tensors for shard, file in files.items()}
        check_index(directory / INDEX, tensors_of, is_tied)
    for shard, file in files.items():
        twice = next((name for name in file.tensors if file_of[name] is not file), None)
        if twice is not None:
            raise WeightsError(
                f"{directory}: tensor {twice} is in more than one shard, "
                f"{shard} and {file_of[twice].path.name}: expected it in one"
            )
    return file_of


def _listed(names: list[str]) -> str:
    """ "tensor a is", "tensors a, b, c and 4 more are"."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += f" and {len(names) - 3} more"
    return f"tensor {shown} is" if len(names) == 1 else f"tensors {shown} are"
