"""Write a checkpoint of any size with random weights in Meta's layout, to measure conversions.

    python tools/make_synthetic_meta.py 7B DEST      (13.5 GB; also 13B, 34B, 70B, 1.1B)

Then measure with tools/measure_conversion.py.

The checkpoint is one bfloat16 shard in the zip format of torch.save, written without torch: a
pickle of tensors that refer to stored entries. All weights repeat one random block, so that
writing is fast.
"""

import argparse
import json
import pickle
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from tqdm import tqdm

from atomic import atomic_directory, resolved
from command_line import Parser, exit_code, named_path
from interruption import interruptible
from npllama.config import LLAMA_2, LlamaConfig
from npllama.console import open_streams, tell
from npllama.errors import InputError
from npllama.weight_table import named_weights

TINY_LLAMA = LlamaConfig(2048, 22, 32, 4, 5632, 32000, 2048)
_BLOCK = 2**22


class _Global:
    """Pickled as the global `module.name` of torch, which is not imported here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class _StorageReference:
    """Pickled as a persistent id, which is how torch refers to a storage."""

    def __init__(self, key: str, n: int) -> None:
        self.key, self.n = key, n


class _Tensor:
    """Pickled as a call of torch._utils._rebuild_tensor_v2."""

    def __init__(self, key: str, shape: tuple[int, ...]) -> None:
        self.key, self.shape = key, shape


class _Pickler(pickle._Pickler):  # the Python version, which lets us write opcodes directly
    def persistent_id(self, value: object) -> object:
        if isinstance(value, _StorageReference):
            storage_type = _Global("torch", "BFloat16Storage")
            return ("storage", storage_type, value.key, "cpu", value.n)
        return None

    def save(self, value: object, save_persistent_id: bool = True) -> None:
        if isinstance(value, _Global):
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, _Tensor):
            n = int(np.prod(value.shape))
            stride = tuple(int(np.prod(value.shape[i + 1 :])) for i in range(len(value.shape)))
            self.save(_Global("torch._utils", "_rebuild_tensor_v2"))
            self.save((_StorageReference(value.key, n), 0, value.shape, stride, False, {}))
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def meta_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Meta's name and the shape of every tensor."""
    rows = named_weights(config)
    return {weight.meta_name(layer): weight.sizes(config) for _name, weight, layer in rows}


def write_meta(dest: Path, config: LlamaConfig) -> None:
    """Write params.json and consolidated.00.pth to the directory `dest`."""
    params = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    params |= {"n_kv_heads": config.n_kv_heads, "norm_eps": config.norm_eps, "vocab_size": -1}
    (dest / "params.json").write_text(json.dumps(params))
    shapes = meta_shapes(config)
    tensors = {name: _Tensor(str(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    block = np.random.default_rng(0).standard_normal(_BLOCK, dtype="float32") * 0.02
    content = block.astype(ml_dtypes.bfloat16).tobytes()
    path = dest / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("consolidated.00/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(tensors)
        archive.writestr("consolidated.00/byteorder", "little")
        archive.writestr("consolidated.00/version", "3\n")
        total = 2 * config.n_parameters
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            for tensor in tensors.values():
                left = 2 * int(np.prod(tensor.shape))
                entry = zipfile.ZipInfo(f"consolidated.00/data/{tensor.key}")
                entry.file_size = left
                with archive.open(entry, "w", force_zip64=True) as file:
                    while left:
                        file.write(content[:left])
                        left -= min(left, len(content))
                bar.update(2 * int(np.prod(tensor.shape)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    open_streams()
    p = Parser("make_synthetic_meta", __doc__.split("\n")[0])
    p.add_argument("size", help="7B, 13B, 34B, 70B, or 1.1B (TinyLlama's shape)")
    p.add_argument("dest", type=named_path, help="the directory to make")
    p.add_argument("--layers", type=int, metavar="N", help="number of layers, for a smaller test")
    args = p.parse_args(argv)
    return exit_code("make_synthetic_meta", lambda: _make(args))


def _make(args: argparse.Namespace) -> None:
    sizes = LLAMA_2 | {"1.1B": TINY_LLAMA}
    config = sizes.get(args.size.upper())
    if config is None:
        raise InputError(f"size is {args.size!r}: expected one of {', '.join(sizes)}")
    if args.layers is not None:
        config = replace(config, n_layers=args.layers)
    n_bytes = 2 * config.n_parameters
    with interruptible(), atomic_directory(resolved(args.dest), n_bytes, False) as partial:
        write_meta(partial, config)
    tell(f"wrote {args.dest}: {config.n_parameters:,} parameters in bfloat16")


if __name__ == "__main__":
    sys.exit(main())
