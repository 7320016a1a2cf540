"""Turn a checkpoint into a model directory that npllama and Hugging Face transformers open.

    python tools/convert.py SOURCE DEST [--dtype float32|bfloat16|float16] [--tokenizer FILE]

SOURCE is a llama2.c checkpoint of version 0 (stories15M.bin, ...); DEST becomes a directory
with config.json, generation_config.json, model.safetensors and, where there is a tokenizer,
tokenizer.model and tokenizer_config.json.
"""

import argparse
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors.numpy

from npllama.config import LlamaConfig
from npllama.errors import InputError, NpllamaError, TokenizerError, WeightsError
from npllama.sentencepiece_model import PieceType, bpe_model, special_and_byte_pieces
from npllama.tokenizer import Tokenizer
from npllama.weights import EMBEDDING, LM_HEAD, NORM, STORAGE_DTYPES, layer_name

_LLAMA2C_MAGIC = 0x616B3432  # "ak42": versions 1 and above begin with it, version 0 does not
_LLAMA2C_HEADER = struct.Struct("<7i")
_MAX_SIZE = 2**24  # no dimension of a real model is larger; a header that says so is not one


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    args = _parser().parse_args(argv)
    try:
        convert(args.source, args.dest, args.dtype, args.tokenizer)
    except NpllamaError as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def convert(
    source: Path, dest: Path, dtype: str = "float32", tokenizer: Path | None = None
) -> None:
    """Read `source` and write the model directory `dest`, whole or not at all.

    Raises:
        NpllamaError: a source that is damaged or of another format, or a `dest` with content.
    """
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise InputError(f"{dest} exists: choose a new directory, or remove it first")
    config, tensors = read_llama2c(source)
    if tokenizer is None:
        beside = (source.with_name("tokenizer.model"), source.with_name("tokenizer.bin"))
        tokenizer = next((path for path in beside if path.exists()), None)
    model = None if tokenizer is None else read_tokenizer(tokenizer)
    if model is not None:
        n_pieces = Tokenizer.from_bytes(model).vocab_size
        if n_pieces > config.vocab_size:
            raise TokenizerError(
                f"{tokenizer} has {n_pieces} pieces and the model {config.vocab_size}: "
                "expected the tokenizer that the model was trained with"
            )
    _write_directory(dest, config, tensors, dtype, model)
    print(f"convert: wrote {dest}: {config.n_parameters:,} parameters in {dtype}", file=sys.stderr)
    if model is None:
        print(
            "convert: no tokenizer was found beside the source: the model takes token ids only; "
            "--tokenizer FILE adds one",
            file=sys.stderr,
        )


def read_llama2c(path: Path) -> tuple[LlamaConfig, dict[str, np.ndarray]]:
    """A llama2.c version 0 checkpoint: its config, and its tensors under Hugging Face's names.

    Layout, little-endian: 7 int32 (dim, hidden, layers, heads, kv_heads, vocab, seq_len; a
    negative vocab means an untied classifier), then float32: embedding; for all layers in turn
    each of attention norm, wq, wk, wv, wo, ffn norm, w1, w2, w3; final norm; cosine and sine
    tables; classifier if untied.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_LLAMA2C_HEADER.size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(header) == 28 and int.from_bytes(header[:4], "little") == _LLAMA2C_MAGIC:
        version = int.from_bytes(header[4:8], "little")
        raise InputError(
            f"{path} is a llama2.c checkpoint of version {version}: only version 0 can be "
            "converted (export.py --version 0 writes it)"
        )
    fields = _LLAMA2C_HEADER.unpack(header) if len(header) == 28 else (0,) * 7
    d, f, n_layers, n_heads, n_kv_heads, vocab, context = fields
    v = abs(vocab)
    plausible = all(0 < n < _MAX_SIZE for n in (d, f, n_layers, n_heads, n_kv_heads, v, context))
    if not plausible or d % n_heads or n_heads % n_kv_heads:
        raise InputError(f"{path} is not a llama2.c checkpoint: its header makes no model")
    config = LlamaConfig(
        d, n_layers, n_heads, n_kv_heads, f, v, context, tie_embeddings=vocab > 0
    )  # fmt: skip
    c, kv = config.head_dim, n_kv_heads * config.head_dim
    stacked = {  # in the file each is one array over all layers
        "attention_norm": (d,),
        "wq": (d, d),
        "wk": (kv, d),
        "wv": (kv, d),
        "wo": (d, d),
        "ffn_norm": (d,),
        "w_gate": (f, d),
        "w_down": (d, f),
        "w_up": (f, d),
    }
    rotary_tables = context * c
    expected = 28 + 4 * (config.n_parameters + rotary_tables)
    if size != expected:
        raise WeightsError(
            f"{path} has {size} bytes and its header describes {expected}: "
            "it is truncated or damaged, get the file again"
        )
    numbers = np.memmap(path, dtype="<f4", mode="r", offset=28)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return numbers[position - count : position].reshape(shape)

    tensors = {EMBEDDING: take(v, d)}
    for field, shape in stacked.items():
        layers = take(n_layers, *shape)
        for i in range(n_layers):
            tensors[layer_name(i, field)] = layers[i]
    tensors[NORM] = take(d)
    take(rotary_tables)
    if not config.tie_embeddings:
        tensors[LM_HEAD] = take(v, d)
    for i in range(n_layers):
        for field, heads in (("wq", n_heads), ("wk", n_kv_heads)):
            name = layer_name(i, field)
            tensors[name] = to_hf_row_order(tensors[name], heads)
    return config, tensors


def to_hf_row_order(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of wq or wk from Meta's order, where rotation pairs (2i, 2i+1), to Hugging Face's,
    where it pairs (i, i + C/2).

    Args:
        w: (heads*C, D).
        heads: H for wq, K for wk.
    """
    rows, width = w.shape
    pairs = w.reshape(heads, rows // heads // 2, 2, width)  # (heads*C, D) -> (heads, C/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(rows, width)  # -> (heads, 2, C/2, D) -> (heads*C, D)


def read_tokenizer(path: Path) -> bytes:
    """A tokenizer.model as it is, or a llama2.c tokenizer.bin rewritten as one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror}") from None
    if path.suffix != ".bin":
        Tokenizer(path)  # raises where it is none
        return content
    pieces = [
        (text.decode("utf-8", errors="replace").replace(" ", "\u2581"), score, PieceType.NORMAL)
        for text, score in _tokenizer_bin_pieces(content, path)
    ]
    special = special_and_byte_pieces()
    if len(pieces) < len(special):
        raise TokenizerError(
            f"{path} has {len(pieces)} pieces: expected at least the {len(special)} special "
            "tokens and bytes of a llama2.c tokenizer"
        )
    return bpe_model(special + pieces[len(special) :])


def _tokenizer_bin_pieces(content: bytes, path: Path) -> Iterator[tuple[bytes, float]]:
    """int32 longest length, then for each piece float32 score, int32 length, bytes."""
    position = 4
    while position < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, position)
        except struct.error:
            length = -1
        text = content[position + 8 : position + 8 + max(length, 0)]
        if length < 0 or len(text) != length:
            raise TokenizerError(f"{path} is truncated or not a llama2.c tokenizer.bin")
        yield text, score
        position += 8 + length


def _write_directory(
    dest: Path,
    config: LlamaConfig,
    tensors: dict[str, np.ndarray],
    dtype: str,
    tokenizer_model: bytes | None,
) -> None:
    """Write everything beside `dest`, then rename: it appears whole or not at all."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{dest.name}.partial-", dir=dest.parent))
    try:
        _write_json(partial / "config.json", config.to_hf(dtype))
        _write_json(
            partial / "generation_config.json",
            {"bos_token_id": config.bos_id, "eos_token_id": list(config.eos_ids)},
        )
        storage = {
            name: np.ascontiguousarray(values, STORAGE_DTYPES[dtype])
            for name, values in tensors.items()
        }
        for name, values in storage.items():
            if not np.isfinite(values.astype("float32")).all():
                raise WeightsError(f"tensor {name} has values that {dtype} cannot hold")
        safetensors.numpy.save_file(storage, partial / "model.safetensors", {"format": "pt"})
        if tokenizer_model is not None:
            (partial / "tokenizer.model").write_bytes(tokenizer_model)
            _write_json(
                partial / "tokenizer_config.json",
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "add_bos_token": True,
                    "add_eos_token": False,
                    "bos_token": "<s>",
                    "eos_token": "</s>",
                    "unk_token": "<unk>",
                    "legacy": False,
                },
            )
        partial.chmod(0o755)  # mkdtemp makes folders for their owner alone, save_file files
        (partial / "model.safetensors").chmod(0o644)
        if dest.exists():
            dest.rmdir()  # empty
        partial.rename(dest)
    except OSError as error:
        raise InputError(f"{dest} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"convert: error: {message} (--help lists all options)\n")


def _parser() -> argparse.ArgumentParser:
    p = _Parser(prog="python tools/convert.py", description=__doc__.split("\n")[0])
    p.add_argument("source", type=Path, help="a llama2.c checkpoint of version 0")
    p.add_argument("dest", type=Path, help="the model directory to make; must not exist")
    p.add_argument(
        "--dtype",
        choices=tuple(STORAGE_DTYPES),
        default="float32",
        help="number format of the weights (default: %(default)s, as in the source)",
    )
    p.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="tokenizer.model, or llama2.c's tokenizer.bin (default: the one beside SOURCE)",
    )
    return p


if __name__ == "__main__":
    sys.exit(main())
