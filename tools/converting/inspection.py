"""The texts of --inspect and --dry-run."""

from pathlib import Path

from converting.conversion import entries, other_files
from converting.source import Source
from converting.writer import index_files, plan
from npllama.config import LlamaConfig


def description(source: Source) -> str:
    """The text of --inspect: format, config, dtype, parameters, bytes, and list of tensors."""
    config = source.config
    dtypes = sorted({tensor.stored_dtype.name for tensor in source.tensors.values()})
    lines = [
        f"format      {source.format}",
        f"config      D {config.dim}, L {config.n_layers}, H {config.n_heads}, "
        f"K {config.n_kv_heads}, C {config.head_dim}, F {config.ffn_dim}, V {config.vocab_size}",
        f"            context {config.context_length}, norm eps {config.norm_eps:g}, "
        f"rope theta {config.rope_theta:g}{_scaling(config)}, "
        f"{'tied' if config.tie_embeddings else 'untied'} head",
        f"dtype       {', '.join(dtypes)}",
        f"parameters  {config.n_parameters:,}",
        f"bytes       {source.nbytes:,}",
        f"tokenizer   {source.tokenizer or 'none found'}",
        "tensors",
    ]
    for name, tensor in source.tensors.items():
        lines.append(f"  {name:<55} {tensor.stored_dtype.name:<9} {list(tensor.shape)}")
    return "\n".join(lines)


def _scaling(config: LlamaConfig) -> str:
    scaling = config.rope_scaling
    return "" if scaling is None else f" scaled by {scaling.kind}, factor {scaling.factor:g}"


def dry_run(
    source: Source, dest: Path, dtype: str | None, tokenizer: Path | None, max_shard_size: int
) -> str:
    """The text of --dry-run: the files that would be written.

    Raises:
        NpllamaError: the conversion would refuse a file of the source, or the tokenizer.
    """
    shards = plan(entries(source, dtype), max_shard_size)
    sizes = {shard.file: shard.nbytes for shard in shards}
    others = index_files(shards) | other_files(source, dtype, tokenizer)
    sizes |= {name: len(content) for name, content in others.items()}
    lines = [f"would write {dest}"]
    lines += [f"  {name:<40} {size:>16,} bytes" for name, size in sizes.items()]
    return "\n".join(lines)
