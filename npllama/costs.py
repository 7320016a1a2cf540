"""The costs of a model of some shape: its parameters, and the FLOPs of a forward pass."""

from npllama.config import LlamaConfig
from npllama.weight_table import EMBEDDING, LM_HEAD, named_weights, tensor_shapes

_PARTS = {
    "embedding": ("embedding",),
    "attention": ("wq", "wk", "wv", "wo"),
    "feed-forward": ("w_gate", "w_up", "w_down"),
    "head": ("lm_head",),
    "norms": ("attention_norm", "ffn_norm", "norm"),
}
_PART_OF = {field: part for part, some in _PARTS.items() for field in some}


def parameters_by_part(config: LlamaConfig) -> dict[str, int]:
    """Parameters of the embedding, attention, feed-forward, head and norms of all layers.

    A tied head has no parameters of its own. The sum is `config.n_parameters`.

    >>> parameters_by_part(LlamaConfig.named("7B"))["attention"]
    2147483648
    """
    counts = dict.fromkeys(_PARTS, 0)
    for _name, weight, _layer in named_weights(config):
        n = 1
        for size in weight.sizes(config):
            n *= size
        counts[_PART_OF[weight.field]] += n
    return counts


def forward_matrices(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Name and shape (O, D) of each matrix that a forward pass multiplies by, in its order.

    The embedding is included only as a tied head, because a lookup reads just one row per token.
    """
    shapes = tensor_shapes(config)
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    embedding = matrices.pop(EMBEDDING)
    head = EMBEDDING if config.tie_embeddings else LM_HEAD
    return matrices | {head: embedding}


def forward_flops(config: LlamaConfig, n_tokens: int, n_logits: int) -> int:
    """Floating point operations of a forward pass's matrix products: 2 O D per matrix and row.

    Attention over the cache and elementwise operations are not counted, because the roofline has
    neither. All rows count in all layers, as in the roofline, although npllama's last layer skips
    most rows of a prompt.

    Args:
        n_tokens: rows that go through the layers.
        n_logits: rows that go through the head.
    """
    *layers, head = [n * d for n, d in forward_matrices(config).values()]
    return 2 * (sum(layers) * n_tokens + head * n_logits)


def attention_flops(config: LlamaConfig, n_new: int, n_past: int) -> int:
    """Floating point operations of q k^T and P v in all layers: 4 C per query head and visible key.

    The n_new queries follow n_past positions, and each sees the keys up to its own.
    """
    pairs = n_new * n_past + n_new * (n_new + 1) // 2
    return 4 * config.n_layers * config.n_heads * config.head_dim * pairs
