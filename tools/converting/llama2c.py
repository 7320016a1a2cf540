"""llama2.c's checkpoints: versions 0, 1 and 2 of its .bin files, and .pt files of its training."""

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

_MAGIC = 0x616B3432  # "ak42": versions 1 and 2 begin with it, version 0 does not
_SEVEN = struct.Struct("<7i")  # dim, hidden, layers, heads, kv_heads, vocab, seq_len
_HEADER_BYTES = 256  # of versions 1 and 2
_MAX_SIZE = 2**24  # no dimension of a real model is larger; a header that says so is none
_FLOAT, _INT8 = np.dtype("<f4"), np.dtype("int8")


def is_llama2c_bin(path: Path) -> bool:
    """Whether the file's header makes a model; version 0 has no magic to go by."""
    try:
        _read_header(path)
    except (InputError, ConfigError):
        return False
    return True


def read_llama2c_bin(path: Path) -> Source:
    """A version 0, 1 or 2 file.

    All are little-endian. None holds norm eps or rope theta: 1e-5 and 10000. Rows of wq and wk
    are in Meta's order.

    - Version 0: 7 int32 (a negative vocab means an untied classifier), then float32: embedding;
      attention norms, wq, wk, wv, wo, ffn norms, w1, w2, w3, each of all layers; final norm;
      cosine and sine tables; classifier if untied.
    - Version 1: magic, version, 7 int32, uint8 shared classifier, zeros to byte 256, then float32:
      attention norms, ffn norms, final norm, embedding, wq, wk, wv, wo, w1, w2, w3, classifier
      if not shared.
    - Version 2: as version 1 with an int32 group size after the flag; norms float32, every other
      tensor int8 values and behind them one float32 scale a group of the flattened tensor.

    Raises:
        InputError, WeightsError: another format, or a file of another size than its header says.
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
                raise InputError(f"{path}: its group size {group} does not divide {list(shape)}")
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
            f"{path} has {size} bytes and its header describes {offset}: "
            "it is truncated or damaged, get the file again"
        )
    return Source(
        format=f"llama2.c, version {version}" + (f", int8 in groups of {group}" if group else ""),
        config=config,
        tensors=from_meta_row_order(tensors, config),
        tokenizer=tokenizer_beside(path),
    )


def read_llama2c_training(path: Path) -> Source:
    """A .pt file of llama2.c's train.py: {"model": tensors, "model_args": ..., ...}.

    Raises:
        ConfigError, WeightsError: naming file and tensor.
    """
    root = read_torch_file(path)
    if not isinstance(root, dict) or not {"model", "model_args"} <= root.keys():
        raise InputError(
            f"{path} is not a llama2.c training checkpoint: expected 'model' and 'model_args'; "
            "a directory is read as Meta's or Hugging Face's"
        )
    args = root["model_args"]
    if not isinstance(args, dict):
        raise ConfigError(f"{path}: model_args is a {type(args).__name__}: expected a dict")
    state = checked_tensors(root["model"], path)
    plain = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
    if len(plain) != len(state):
        raise WeightsError(f"{path}: a tensor stands there with and without _orig_mod.")
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
    """tokenizer.model or tokenizer.bin in the file's folder."""
    beside = (path.with_name("tokenizer.model"), path.with_name("tokenizer.bin"))
    return next((file for file in beside if file.exists()), None)


def _read_header(path: Path) -> tuple[int, LlamaConfig, int, int]:
    """(version, config, group size or 0, first byte of the tensors)."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(header) < _SEVEN.size:
        raise InputError(f"{path} has {len(header)} bytes: it is no checkpoint")
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
        raise WeightsError(f"{path} is damaged: its header's flag or group size makes no sense")
    return version, _config(path, fields, tied=shared == 1), group, _HEADER_BYTES


def _config(path: Path, fields: tuple[int, ...], tied: bool) -> LlamaConfig:
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab, context = fields
    sizes = (dim, ffn_dim, n_layers, n_heads, n_kv_heads, abs(vocab), context)
    # a float32 of trained weights, read as an integer, is far larger than any dimension
    if not all(0 < n < _MAX_SIZE for n in sizes) or n_layers > 2**12:
        raise InputError(f"{path} is no llama2.c checkpoint: its header makes no model")
    try:
        return LlamaConfig(
            dim, n_layers, n_heads, n_kv_heads, ffn_dim, abs(vocab), context, tie_embeddings=tied
        )
    except ConfigError as error:
        raise InputError(f"{path} is no llama2.c checkpoint: {error}") from None


def _training_config(args: dict[Any, Any], tensors: dict[str, Tensor], path: Path) -> LlamaConfig:
    gate, embedding = tensors.get(layer_name(0, "w_gate")), tensors.get(EMBEDDING)
    for name, tensor in (("feed_forward.w1", gate), ("tok_embeddings", embedding)):
        if tensor is None or len(tensor.shape) != 2:
            raise WeightsError(f"{path}: tensor {name}.weight is missing or no matrix")
    return config_from(
        args,
        path,
        ffn_dim=gate.shape[0],
        vocab_size=embedding.shape[0],
        context_length=number(args, "max_seq_len", path, 2048),
    )


def _is_tied(tensors: dict[str, Tensor]) -> bool:
    """train.py ties the head to the embedding: two names of one tensor in its state dict."""
    return LM_HEAD not in tensors or tensors[LM_HEAD].place == tensors[EMBEDDING].place
