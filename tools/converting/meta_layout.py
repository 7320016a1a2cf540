"""What Meta's checkpoints and llama2.c's training checkpoints share: names and parameters."""

from pathlib import Path
from typing import Any

from converting.source import Tensor
from npllama.config import LlamaConfig
from npllama.errors import ConfigError, WeightsError
from npllama.weight_table import find_meta

_SKIPPED = ("rope.freqs", "freqs_cos", "freqs_sin")  # rotary tables; this code computes its own


def by_hf_name(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors by Hugging Face's names, without rotary tables."""
    named = {}
    for name, tensor in tensors.items():
        if name in _SKIPPED:
            continue
        found = find_meta(name)
        if found is None:
            raise WeightsError(f"{path}: tensor {name} is not part of a LLaMA")
        weight, layer = found
        named[weight.hf_name(layer)] = tensor
    return named


def config_from(
    params: dict[Any, Any],
    path: Path,
    *,
    ffn_dim: int,
    vocab_size: int,
    context_length: int,
    rope_theta: float = 10000.0,
) -> LlamaConfig:
    """The config that `params` describes. `params` is Meta's params.json or llama2.c's model_args.

    Args:
        path: the file that holds `params`, for messages.
        ffn_dim, vocab_size, context_length, rope_theta: values that `params` may lack.

    Raises:
        ConfigError: a field is missing, is not a number, or is out of range.
    """
    n_heads = number(params, "n_heads", path)
    fields = {
        "dim": number(params, "dim", path),
        "n_layers": number(params, "n_layers", path),
        "n_heads": n_heads,
        "n_kv_heads": number(params, "n_kv_heads", path, n_heads),
        "norm_eps": number(params, "norm_eps", path, 1e-5),
    }
    if params.get("head_dim") is not None:  # Meta's own models do not state it: C is D / H
        fields["head_dim"] = number(params, "head_dim", path)
    try:
        return LlamaConfig(
            **fields,
            ffn_dim=ffn_dim,
            vocab_size=vocab_size,
            context_length=context_length,
            rope_theta=rope_theta,
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def number(params: dict[Any, Any], name: str, path: Path, default: Any = None) -> Any:
    """A numeric field of `params`. LlamaConfig checks its range."""
    value = params.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        # repr of a list from a pickle could recurse too deeply or never end
        shown = repr(value) if isinstance(value, str | None) else f"a {type(value).__name__}"
        raise ConfigError(f"{path}: {name} is {shown}: expected a number")
    return value
