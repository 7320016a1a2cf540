"""Recognizes the format of a checkpoint, and checks its tensors against its config."""

from pathlib import Path

from converting.dtypes import FLOATS
from converting.huggingface import is_hugging_face, read_hugging_face
from converting.llama2c import is_llama2c_bin, read_llama2c_bin, read_llama2c_training
from converting.meta import is_meta, read_meta
from converting.source import Source
from converting.torch_file import is_torch_file
from npllama.errors import InputError, WeightsError
from npllama.not_a_model import as_given, directory_instead, file_instead, missing_instead
from npllama.weight_table import tensor_shapes
from npllama.weights import check_none_missing


def read_source(path: Path) -> Source:
    """Recognize a checkpoint, read its headers, and check its tensors against its config.

    Raises:
        NpllamaError: the path holds no checkpoint, one of an unknown format, or a damaged one.
    """
    try:
        source = _recognized(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if source.config.n_layers > len(source.tensors):  # before tensor_shapes lists every layer
        raise WeightsError(
            f"{path}: the config describes {source.config.n_layers} layers, but there are only "
            f"{len(source.tensors)} tensors: layers are missing, get the files again"
        )
    shapes = tensor_shapes(source.config)
    check_none_missing(path, list(shapes), source.tensors)
    for name, shape in shapes.items():
        tensor = source.tensors[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"{tensor.where} has shape {list(tensor.shape)}: the config asks for {list(shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise WeightsError(f"{tensor.where} has dtype {tensor.dtype}: expected a float dtype")
    for name in source.tensors:
        if name not in shapes:
            raise WeightsError(
                f"{path}: tensor {name} is not part of the model that the config describes"
            )
    return source


def _recognized(path: Path) -> Source:
    if not path.is_file() and not path.is_dir():
        given = as_given(path)
        what = missing_instead(given, is_converting=True) if not path.exists() else None
        raise InputError(f"{given} {what or 'does not exist or is no file: expected a checkpoint'}")
    if is_hugging_face(path):
        source = read_hugging_face(path)
        if is_meta(path):
            source.notes += (f"{path} also holds Meta's files; those of Hugging Face are read",)
        return source
    if is_meta(path):
        return read_meta(path)
    if path.is_dir():
        what = (
            "holds no checkpoint: expected Meta's params.json and consolidated.*.pth, or "
            "Hugging Face's config.json and safetensors or pytorch_model.bin"
        )
        raise InputError(f"{path} {directory_instead(path, is_converting=True) or what}")
    if (what := file_instead(path, is_converting=True)) is not None:
        raise InputError(f"{path} {what}")
    if is_torch_file(path):
        return read_llama2c_training(path)
    if is_llama2c_bin(path):
        return read_llama2c_bin(path)
    raise InputError(
        f"{path} is not a checkpoint of a known format: expected a llama2.c .bin or .pt file, or a "
        "directory in Meta's or Hugging Face's format"
    )
