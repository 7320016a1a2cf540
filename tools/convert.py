"""Turn any LLaMA-2 checkpoint into a model directory, without PyTorch.

    python tools/convert.py SOURCE DEST [--dtype float32|float16|bfloat16|int8] [--tokenizer FILE]

SOURCE is recognized by itself: a directory of Meta's (params.json, consolidated.*.pth) or of
Hugging Face's (safetensors or pytorch_model*.bin), or a file of llama2.c's (.bin of version 0, 1
or 2, .pt of its training). DEST becomes a directory that npllama and Hugging Face transformers
open: config.json, generation_config.json, safetensors and, where there is a tokenizer,
tokenizer.model and tokenizer_config.json.
"""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from converting.huggingface import is_hugging_face, read_hugging_face
from converting.llama2c import is_llama2c_bin, read_llama2c_bin, read_llama2c_training
from converting.meta import is_meta, read_meta
from converting.numbers import FLOATS, Loss, as_dtype, check_finite
from converting.source import Source
from converting.tokenizers import CONFIG as TOKENIZER_CONFIG
from converting.tokenizers import read_tokenizer
from converting.torch_file import is_torch_file
from converting.writer import (
    Entry,
    check_dest,
    new_directory,
    plan,
    write_json,
    write_shards,
)
from npllama.errors import InputError, NpllamaError, WeightsError
from npllama.quantization import quantize
from npllama.weights import INT8_CONFIG, STORAGE_DTYPES, scale_name, tensor_shapes

MAX_SHARD_SIZE = "4GB"
_FLOAT32 = np.dtype("float32")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    args = _parser().parse_args(argv)
    try:
        source = read_source(args.source)
        if args.inspect or args.dry_run:
            print(description(source))
        if args.inspect:
            return 0
        if args.dest is None:
            raise InputError("DEST is missing: name the model directory to make")
        max_shard_size = _bytes(args.max_shard_size)
        refuse_to_replace(args.source, args.dest)
        if args.tokenizer is not None:
            refuse_to_replace(args.tokenizer, args.dest)
        if args.dry_run:
            check_dest(args.dest, args.overwrite)
            print(dry_run(source, args.dest, args.dtype, max_shard_size))
            return 0
        convert(source, args.dest, args.dtype, args.tokenizer, max_shard_size, args.overwrite)
    except NpllamaError as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def refuse_to_replace(source: Path, dest: Path) -> None:
    """With --overwrite, DEST goes: it must not be, or hold, what is read.

    Raises:
        InputError: `source` is `dest` or lies within it.
    """
    if source.resolve().is_relative_to(dest.resolve()):
        raise InputError(f"{dest} is or holds {source}, which is read: choose another directory")


def read_source(path: Path) -> Source:
    """Recognize a checkpoint, read its headers, and check its tensors against its config.

    Raises:
        NpllamaError: no checkpoint, one of another kind, or a damaged one.
    """
    try:
        source = _recognized(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if source.config.n_layers > len(source.tensors):  # before a name is made for each
        raise WeightsError(
            f"{path}: the config describes {source.config.n_layers} layers and there are "
            f"{len(source.tensors)} tensors: layers are missing"
        )
    shapes = tensor_shapes(source.config)
    for name, shape in shapes.items():
        if name not in source.tensors:
            raise WeightsError(f"{path}: tensor {name} is missing")
        tensor = source.tensors[name]
        if tensor.shape != shape:
            raise WeightsError(
                f"{tensor.where} has shape {list(tensor.shape)}: the config asks for {list(shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise WeightsError(f"{tensor.where} is stored as {tensor.dtype}: expected floats")
    for name in source.tensors:
        if name not in shapes:
            raise WeightsError(f"{path}: tensor {name} is not part of the model")
    return source


def _recognized(path: Path) -> Source:
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path} does not exist or is no file: expected a checkpoint")
    if is_hugging_face(path):
        return read_hugging_face(path)
    if is_meta(path):
        return read_meta(path)
    if path.is_dir():
        raise InputError(
            f"{path} holds no checkpoint: expected Meta's params.json and consolidated.*.pth, or "
            "Hugging Face's config.json and safetensors or pytorch_model.bin"
        )
    if is_torch_file(path):
        return read_llama2c_training(path)
    if is_llama2c_bin(path):
        return read_llama2c_bin(path)
    raise InputError(
        f"{path} is no checkpoint of a known format: expected a llama2.c .bin or .pt file, or the "
        "directory of Meta's or Hugging Face's files"
    )


def convert(
    source: Source,
    dest: Path,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 4 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write `source` as the model directory `dest`, one tensor at a time, whole or not at all.

    Args:
        dtype: of the matrices; None keeps each tensor's own.
        tokenizer: tokenizer.model or tokenizer.bin; None takes the one beside the source.

    Raises:
        NpllamaError: broken weights, a `dest` in the way, too little disk space.
    """
    config = source.config
    tokenizer = tokenizer or source.tokenizer
    model = None if tokenizer is None else read_tokenizer(tokenizer, config.vocab_size)
    shards = plan(entries(source, dtype), max_shard_size)
    total = sum(shard.nbytes for shard in shards)
    loss = Loss()
    with new_directory(dest, total + 2**24, overwrite) as partial:
        # None: a bar on a terminal, quiet otherwise
        numbers = sum(shard.nbytes - len(shard.header) for shard in shards)
        with tqdm(total=numbers, unit="B", unit_scale=True, disable=None) as bar:
            write_shards(partial, shards, converted(source, dtype, loss), bar.update)
        for path in source.copied:
            shutil.copyfile(path, partial / path.name)
        if model is not None:
            (partial / "tokenizer.model").write_bytes(model)
            if not (partial / "tokenizer_config.json").exists():
                write_json(partial / "tokenizer_config.json", TOKENIZER_CONFIG)
        generation = {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)}
        write_json(partial / "generation_config.json", source.generation_config or generation)
        write_json(partial / "config.json", hf_config(source, dtype))  # last: now it can load
    print(
        f"convert: wrote {dest}: {config.n_parameters:,} parameters, {total / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    if loss.changed:
        print(f"convert: {loss}", file=sys.stderr)
    if model is None:
        print(
            "convert: no tokenizer was found beside the source: the model takes token ids only; "
            "--tokenizer FILE adds one",
            file=sys.stderr,
        )


def entries(source: Source, dtype: str | None) -> Iterator[Entry]:
    """What is written, in the order of the file."""
    for name, shape in tensor_shapes(source.config).items():
        target = _target_dtype(source, name, dtype)
        yield Entry(name, target, shape)
        if target == np.int8:
            yield Entry(scale_name(name), _FLOAT32, shape[:1])


def converted(source: Source, dtype: str | None, loss: Loss) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of `entries`, read, checked and converted when its turn comes."""
    for name in tensor_shapes(source.config):
        tensor = source.tensors[name]
        values = np.ascontiguousarray(tensor.read())
        check_finite(values, tensor.where)
        target = _target_dtype(source, name, dtype)
        if target == np.int8:
            values, scale = quantize(values)
            yield scale_name(name), scale
            yield name, values
        else:
            yield name, as_dtype(values, target, tensor.where, loss)


def _target_dtype(source: Source, name: str, dtype: str | None) -> np.dtype:
    """As stored unless given (float64 becomes float32); norms beside int8 are float32."""
    tensor = source.tensors[name]
    if dtype is None:
        return _FLOAT32 if tensor.dtype == np.float64 else tensor.dtype
    if dtype == "int8" and len(tensor.shape) == 1:
        return _FLOAT32
    return STORAGE_DTYPES[dtype]


def hf_config(source: Source, dtype: str | None) -> dict[str, object]:
    """config.json: the source's own where it has one, with the dtype that was written."""
    first = next(entries(source, dtype)).dtype
    name = "float32" if first == np.int8 else first.name
    fields = (source.hf_config or source.config.to_hf(name)) | {"torch_dtype": name}
    fields.pop("dtype", None)  # transformers 5's spelling, which would contradict the other
    fields.pop("quantization_config", None)
    if first == np.int8:
        fields["quantization_config"] = INT8_CONFIG
    return fields


def description(source: Source) -> str:
    """What --inspect prints: format, config, dtype, parameters, bytes, tensor list."""
    config = source.config
    dtypes = sorted({tensor.dtype.name for tensor in source.tensors.values()})
    lines = [
        f"format      {source.format}",
        f"config      D {config.dim}, L {config.n_layers}, H {config.n_heads}, "
        f"K {config.n_kv_heads}, C {config.head_dim}, F {config.ffn_dim}, V {config.vocab_size}",
        f"            context {config.context_length}, norm eps {config.norm_eps:g}, "
        f"rope theta {config.rope_theta:g}, {'tied' if config.tie_embeddings else 'untied'} head",
        f"dtype       {', '.join(dtypes)}",
        f"parameters  {config.n_parameters:,}",
        f"bytes       {source.nbytes:,}",
        f"tokenizer   {source.tokenizer or 'none found'}",
        "tensors",
    ]
    for name, tensor in source.tensors.items():
        lines.append(f"  {name:<55} {tensor.dtype.name:<9} {list(tensor.shape)}")
    return "\n".join(lines)


def dry_run(source: Source, dest: Path, dtype: str | None, max_shard_size: int) -> str:
    """What --dry-run adds: the files that would be written."""
    shards = plan(entries(source, dtype), max_shard_size)
    lines = [f"would write {dest}"]
    lines += [f"  {shard.file:<40} {shard.nbytes:>16,} bytes" for shard in shards]
    others = ["config.json", "generation_config.json"]
    if source.tokenizer is not None:
        others += ["tokenizer.model", "tokenizer_config.json"]
    lines += [f"  {name}" for name in others]
    return "\n".join(lines)


def _bytes(size: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}
    number = size.upper().rstrip("KMGB")
    with contextlib.suppress(ValueError, KeyError, OverflowError):
        n = int(float(number) * units[size.upper().removeprefix(number)])
        if n > 0:
            return n
    raise InputError(f"--max-shard-size is {size!r}: expected a size such as 4GB or 500MB")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"convert: error: {message} (--help lists all options)\n")


def _parser() -> argparse.ArgumentParser:
    p = _Parser(
        prog="python tools/convert.py",
        description="Turn a LLaMA-2 checkpoint of Meta's, Hugging Face's or llama2.c's into a "
        "directory that npllama and Hugging Face transformers open. PyTorch is not needed.",
    )
    p.add_argument("source", type=Path, metavar="SOURCE", help="a checkpoint: directory or file")
    p.add_argument("dest", type=Path, nargs="?", metavar="DEST", help="the model directory to make")
    p.add_argument(
        "--dtype",
        choices=tuple(STORAGE_DTYPES),
        help="number format of the weights; int8 is a quarter of float32 (default: as stored)",
    )
    p.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.model, or llama2.c's tokenizer.bin (default: the one beside SOURCE)",
    )
    p.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="begin a new file beyond this size (default: %(default)s)",
    )
    p.add_argument(
        "--overwrite", action="store_true", help="replace DEST once the new one is complete"
    )
    p.add_argument("--inspect", action="store_true", help="only say what SOURCE is")
    p.add_argument("--dry-run", action="store_true", help="also say what would be written")
    return p


if __name__ == "__main__":
    sys.exit(main())
