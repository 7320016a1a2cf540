"""Reads llama2.c's checkpoints: .bin files of versions 0, 1 and 2, and .pt training checkpoints."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from converting.meta_layout import by_hf_name, config_from, number
from converting.source import Source, Tensor, file_tensor, from_meta_row_order, grouped_int8
from converting.torch_file import checked_tensors, read_torch_file
from npllama.config import LlamaConfig
from npllama.errors import ConfigError, InputError, WeightsError
from npllama.weight_table import EMBEDDING, LM_HEAD, NORM, layer_name, tensor_shapes

_MAGIC = 0x616B3432  # "ak42", the start of versions 1 and 2; version 0 has no magic number
_SEVEN = struct.Struct("<7i")  # dim, hidden, layers, heads, kv_heads, vocab, seq_len
_HEADER_BYTES = 256  # header size of versions 1 and 2
_MAX_SIZE = 2**24  # no dimension of a real model is larger, so larger values are no header
_FLOAT, _INT8 = np.dtype("<f4"), np.dtype("int8")


def is_llama2c_bin(path: Path) -> bool:
    """Whether the header describes a valid model; version 0 has no magic number to check."""
    try:
        _read_header(path)
    except (InputError, ConfigError):
        return False
    return True


def read_llama2c_bin(path: Path) -> Source:
    """Read a file of version 0, 1 or 2.

    All versions are little-endian. None states norm eps or rope theta, so 1e-5 and 10000 are
    assumed. The rows of wq and wk are in Meta's order.

    - Version 0: 7 int32 (a negative vocab means an untied classifier), then float32: embedding;
      attention norms, wq, wk, wv, wo, ffn norms, w1, w2, w3, each for all layers; final norm;
      cosine and sine tables; classifier if untied.
    - Version 1: magic, version, 7 int32, uint8 shared classifier, zeros up to byte 256, then
      float32: attention norms, ffn norms, final norm, embedding, wq, wk, wv, wo, w1, w2, w3,
      classifier if not shared.
    - Version 2: like version 1, with an int32 group size after the flag. Norms are float32. Every
      other tensor is stored as int8 values, followed by one float32 scale per group of the
      flattened tensor.

    Raises:
        InputError, WeightsError: the file has another format, or its size contradicts its header.
    """
    version, config, group, begin = _read_header(path)
    layers = range(config.n_layers)

    def of_all_layers(*fields: str) -> list[str]:
        return [layer_name(i, field) for field in fields for i in layers]

    matrices = of_all_layers("wq", "wk", "wv", "wo")
    feed_forward = of_all_layers("w_gate", "w_down", "w_up")
    head = [] if config.tie_embeddings else [LM_HEAD]
    if version == 0:
        tables = ["rotary tables"]
        order = [EMBEDDING, *of_all_layers("attention_norm"), *matrices]
        order += [*of_all_layers("ffn_norm"), *feed_forward, NORM, *tables, *head]
    else:
        order = [*of_all_layers("attention_norm", "ffn_norm"), NORM, EMBEDDING]
        order += [*matrices, *feed_forward, *head]
    shapes = tensor_shapes(config) | {"rotary tables": (config.context_length, config.head_dim)}
    tensors: dict[str, Tensor] = {}
    offset = begin
    for name in order:
        shape = shapes[name]
        n = int(np.prod(shape, dtype=np.int64))
        if version == 2 and len(shape) == 2:
            if n % group:
                raise InputError(
                    f"{path}: the group size {group} does not divide the shape {list(shape)}: get "
                    "the file again"
                )
            values = file_tensor(path, name, _INT8, shape, offset)
            scales = file_tensor(path, name, _FLOAT, (n // group,), offset + n)
            tensors[name] = grouped_int8(values, scales, group)
            offset += n + 4 * (n // group)
        else:
            tensors[name] = file_tensor(path, name, _FLOAT, shape, offset)
            offset += 4 * n
    tensors.pop("rotary tables", None)
    size = path.stat().st_size
    if size != offset:
        raise WeightsError(
            f"{path} has {size} bytes, but its header describes {offset}: "
            "it is truncated or damaged, get the file again"
        )
    return Source(
        format=f"llama2.c, version {version}" + (f", int8 in groups of {group}" if group else ""),
        config=config,
        tensors=from_meta_row_order(tensors, config),
        tokenizer=tokenizer_beside(path),
    )


def read_llama2c_training(path: Path) -> Source:
    """Read a .pt file of llama2.c's train.py: {"model": tensors, "model_args": ..., ...}.

    Raises:
        ConfigError, WeightsError: something is missing or wrong. The message names file and tensor.
    """
    root = read_torch_file(path)
    if not isinstance(root, dict) or not {"model", "model_args"} <= root.keys():
        raise InputError(
            f"{path} is not a llama2.c training checkpoint: expected 'model' and 'model_args'; to "
            "convert a checkpoint of Meta or Hugging Face, give its directory"
        )
    args = root["model_args"]
    if not isinstance(args, dict):
        raise ConfigError(f"{path}: model_args is a {type(args).__name__}: expected a dict")
    state = checked_tensors(root["model"], path)
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    if len(plain) != len(state):
        raise WeightsError(f"{path}: a tensor is there both with and without the prefix _orig_mod.")
    tensors = by_hf_name(plain, path)
    config = _training_config(args, tensors, path)
    if _is_tied(tensors):
        del tensors[LM_HEAD]
        config = replace(config, tie_embeddings=True)
    return Source(
        format="llama2.c, training checkpoint",
        config=config,
        tensors=from_meta_row_order(tensors, config),
        tokenizer=tokenizer_beside(path),
    )


def tokenizer_beside(path: Path) -> Path | None:
    """tokenizer.model or tokenizer.bin in the same folder, if there is one."""
    beside = (path.with_name("tokenizer.model"), path.with_name("tokenizer.bin"))
    return next((file for file in beside if file.exists()), None)


def _read_header(path: Path) -> tuple[int, LlamaConfig, int, int]:
    """Read (version, config, group size or 0, first byte of the tensors)."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(header) < _SEVEN.size:
        raise InputError(f"{path} has {len(header)} bytes: too few for a checkpoint")
    if int.from_bytes(header[:4], "little") != _MAGIC:
        fields = _SEVEN.unpack_from(header)
        return 0, _config(path, fields, tied=fields[5] > 0), 0, _SEVEN.size
    version = int.from_bytes(header[4:8], "little")
    if version not in (1, 2):
        raise InputError(f"{path} is llama2.c version {version}: expected 0, 1 or 2")
    if len(header) < _HEADER_BYTES:
        raise WeightsError(f"{path} is truncated: its header has {len(header)} of 256 bytes")
    fields, shared = _SEVEN.unpack_from(header, 8), header[36]
    group = int.from_bytes(header[37:41], "little", signed=True) if version == 2 else 0
    if shared not in (0, 1) or (version == 2 and not 0 < group < _MAX_SIZE):
        raise WeightsError(
            f"{path} is damaged (its header has an invalid flag or group size): get the file again"
        )
    return version, _config(path, fields, tied=shared == 1), group, _HEADER_BYTES


def _config(path: Path, fields: tuple[int, ...], tied: bool) -> LlamaConfig:
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab, context = fields
    sizes = (dim, ffn_dim, n_layers, n_heads, n_kv_heads, abs(vocab), context)
    # if the file is something else, such as float32 weights, these integers are far larger
    if not all(0 < n < _MAX_SIZE for n in sizes) or n_layers > 2**12:
        raise InputError(f"{path} is not a llama2.c checkpoint: its header describes no model")
    try:
        return LlamaConfig(
            dim, n_layers, n_heads, n_kv_heads, ffn_dim, abs(vocab), context, tie_embeddings=tied
        )
    except ConfigError as error:
        raise InputError(f"{path} is not a llama2.c checkpoint: {error}") from None


def _training_config(args: dict[Any, Any], tensors: dict[str, Tensor], path: Path) -> LlamaConfig:
    gate, embedding = tensors.get(layer_name(0, "w_gate")), tensors.get(EMBEDDING)
    for name, tensor in (("feed_forward.w1", gate), ("tok_embeddings", embedding)):
        if tensor is None or len(tensor.shape) != 2:
            raise WeightsError(f"{path}: tensor {name}.weight is missing or is not a matrix")
    return config_from(
        args,
        path,
        ffn_dim=gate.shape[0],
        vocab_size=embedding.shape[0],
        context_length=number(args, "max_seq_len", path, 2048),
    )


def _is_tied(tensors: dict[str, Tensor]) -> bool:
    """Whether head and embedding are the same tensor. train.py then stores it under two names."""
    return LM_HEAD not in tensors or tensors[LM_HEAD].place == tensors[EMBEDDING].place
