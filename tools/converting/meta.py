"""Meta's checkpoints: params.json and consolidated.NN.pth, one file a model-parallel shard."""

from pathlib import Path
from typing import Any

import numpy as np

from converting.source import Source, Tensor, concatenated, from_meta_row_order
from converting.torch_file import read_torch_file
from npllama.config import LlamaConfig, read_json
from npllama.errors import ConfigError, WeightsError
from npllama.weights import EMBEDDING, LAYER_NAMES, LM_HEAD, NORM, layer_name

# Meta's name within a layer -> the field of Layer
LAYER_FIELDS = {
    "attention_norm.weight": "attention_norm",
    "attention.wq.weight": "wq",
    "attention.wk.weight": "wk",
    "attention.wv.weight": "wv",
    "attention.wo.weight": "wo",
    "ffn_norm.weight": "ffn_norm",
    "feed_forward.w1.weight": "w_gate",
    "feed_forward.w2.weight": "w_down",
    "feed_forward.w3.weight": "w_up",
}
TOP_NAMES = {"tok_embeddings.weight": EMBEDDING, "norm.weight": NORM, "output.weight": LM_HEAD}
# shards hold columns of these, and rows of the other matrices
_SPLIT_BY_COLUMNS = (EMBEDDING, LAYER_NAMES["wo"], LAYER_NAMES["w_down"])
_SKIPPED = ("rope.freqs", "freqs_cos", "freqs_sin")  # rotary tables, computed here instead


def is_meta(directory: Path) -> bool:
    """Whether the directory holds what Meta's download writes."""
    return directory.is_dir() and (
        (directory / "params.json").exists() or any(directory.glob("consolidated.*.pth"))
    )


def read_meta(directory: Path) -> Source:
    """Read params.json and every shard's header.

    Raises:
        ConfigError, WeightsError: naming file and tensor.
    """
    params = read_json(directory / "params.json")
    paths = sorted(directory.glob("consolidated.*.pth"))
    if not paths:
        raise WeightsError(f"{directory} has no consolidated.*.pth beside params.json")
    numbers = [path.name.split(".")[1] for path in paths]
    if numbers != [f"{i:02}" for i in range(len(paths))]:
        raise WeightsError(
            f"{directory} holds the shards {', '.join(numbers)}: "
            f"expected consolidated.00.pth to consolidated.{len(paths) - 1:02}.pth, none missing"
        )
    if len(paths) & (len(paths) - 1):
        raise WeightsError(f"{directory} holds {len(paths)} shards: expected 1, 2, 4 or 8")
    shards = [by_hf_name(checked_tensors(read_torch_file(path), path), path) for path in paths]
    config = _config(params, shards, directory / "params.json")
    tensors = {name: _merged(name, shards, paths) for name in shards[0]}
    tokenizers = (directory / "tokenizer.model", directory.parent / "tokenizer.model")
    return Source(
        format=f"Meta, {len(paths)} {'shard' if len(paths) == 1 else 'shards'}",
        config=config,
        tensors=from_meta_row_order(tensors, config),
        tokenizer=next((path for path in tokenizers if path.exists()), None),
    )


def checked_tensors(root: Any, path: Path) -> dict[str, Tensor]:
    """A state dict: names to tensors and nothing else."""
    if not isinstance(root, dict) or not root:
        raise WeightsError(f"{path} holds a {type(root).__name__}: expected tensors by name")
    for name, value in root.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{path}: {name!r} is a {type(value).__name__}: expected a tensor")
    return root


def by_hf_name(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors under Hugging Face's names, without rotary tables."""
    named = {}
    for name, tensor in tensors.items():
        if name in _SKIPPED:
            continue
        hf_name = TOP_NAMES.get(name)
        parts = name.split(".", 2)
        if (
            hf_name is None
            and len(parts) == 3
            and parts[0] == "layers"
            and parts[1].isdecimal()
            and len(parts[1]) < 9
        ):
            layer_field = LAYER_FIELDS.get(parts[2])
            if layer_field is not None and str(int(parts[1])) == parts[1]:
                hf_name = layer_name(int(parts[1]), layer_field)
        if hf_name is None:
            raise WeightsError(f"{path}: tensor {name} is not part of a LLaMA")
        named[hf_name] = tensor
    return named


def number(params: dict, name: str, path: Path, default: Any = None) -> Any:
    """A field of params.json; the config checks its range."""
    value = params.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        # a list of a pickle may be too deep to print, or without end
        shown = repr(value) if isinstance(value, str | None) else f"a {type(value).__name__}"
        raise ConfigError(f"{path}: {name} is {shown}: expected a number")
    return value


def _config(params: dict, shards: list[dict[str, Tensor]], path: Path) -> LlamaConfig:
    for name in ("use_scaled_rope", "rope_scaling", "quantization_args", "moe", "lora_args"):
        if params.get(name):
            raise ConfigError(f"{path}: {name} is set: only plain LLaMA-2 is implemented")
    theta = number(params, "rope_theta", path, 10000.0)
    n_heads = number(params, "n_heads", path)
    try:
        return LlamaConfig(
            dim=number(params, "dim", path),
            n_layers=number(params, "n_layers", path),
            n_heads=n_heads,
            n_kv_heads=number(params, "n_kv_heads", path, n_heads),
            # params.json has no ffn width, and -1 for an unknown vocabulary
            ffn_dim=_rows(shards, layer_name(0, "w_gate"), path),
            vocab_size=_vocab_size(params, shards, path),
            context_length=16384 if theta == 1e6 else 4096,
            norm_eps=number(params, "norm_eps", path, 1e-5),
            rope_theta=theta,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _vocab_size(params: dict, shards: list[dict[str, Tensor]], path: Path) -> int:
    given = number(params, "vocab_size", path, -1)
    if given != -1:
        return given
    if EMBEDDING not in shards[0] or len(shards[0][EMBEDDING].shape) != 2:
        raise WeightsError(f"{path.parent}: tensor tok_embeddings.weight is missing or no matrix")
    return shards[0][EMBEDDING].shape[0]  # shards hold columns of it


def _rows(shards: list[dict[str, Tensor]], name: str, path: Path) -> int:
    missing = [i for i, shard in enumerate(shards) if name not in shard or not shard[name].shape]
    if missing:
        raise WeightsError(
            f"{path.parent}: shard {missing[0]} lacks tensor layers.0.feed_forward.w1.weight"
        )
    return sum(shard[name].shape[0] for shard in shards)


def _merged(name: str, shards: list[dict[str, Tensor]], paths: list[Path]) -> Tensor:
    """One tensor of all shards: norms are equal in each, matrices are split by rows or columns."""
    for shard, path in zip(shards, paths, strict=True):
        if shard.keys() != shards[0].keys():
            odd = sorted(shard.keys() ^ shards[0].keys())[0]
            raise WeightsError(
                f"{path} and {paths[0].name} are shards of different models: tensor {odd} is in "
                "one of them only"
            )
    parts = [shard[name] for shard in shards]
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts):
        raise WeightsError(
            f"{parts[0].where} has shape {list(parts[0].shape)} in {parts[0].dtype} and another "
            "in another shard: these are shards of different models"
        )
    if len(parts[0].shape) != 2:
        return _equal_in_all(parts)
    return concatenated(parts, axis=1 if name.endswith(_SPLIT_BY_COLUMNS) else 0)


def _equal_in_all(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]

    def read() -> np.ndarray:
        first = parts[0].read()
        for part in parts[1:]:
            if part.read().tobytes() != first.tobytes():
                raise WeightsError(
                    f"{part.where} differs from the other shards': these are shards of "
                    "different models"
                )
        return first

    return Tensor(parts[0].where, parts[0].dtype, parts[0].shape, read)
