"""What --inspect and --dry-run print."""

from pathlib import Path

from converting.conversion import entries
from converting.source import Source
from converting.writer import plan


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
