"""The loss over a batch of tokens, and its gradient with respect to every parameter.

The forward pass calls the model's blocks, and stores the input of each block. The backward pass
goes through the blocks in reverse order. Each block recomputes its intermediate results from its
input, so there is neither a tape nor a second implementation of the model. The memory is
(2 L + 1) * B * T * D elements for these inputs, and the intermediate results of one block.
"""

from dataclasses import replace
from typing import TypeVar

import numpy as np

from npllama.backend import Array
from npllama.errors import InputError
from npllama.kv_cache import KVCache
from npllama.model import Transformer
from npllama.parameters import Head, Layer, Matrix, Parameters

Part = TypeVar("Part", Layer, Head)


def loss_and_gradients(
    model: Transformer, tokens: Array, targets: Array, weights: Array
) -> tuple[Array, Parameters]:
    """loss = sum over b, t of weights[b, t] * -log p(targets[b, t] | tokens[b, :t+1]).

    With weights of 1 / (number of targets) the loss is the mean in nats per token. A weight of 0
    excludes a position, such as padding at the end of a row. Earlier positions do not attend to
    padding.

    Args:
        model: a model whose parameters are all float32 or all float64, without a scale.
        tokens: (B, T) integers in [0, V); T is at most the model's context.
        targets: (B, T) integers in [0, V), usually the token after each position.
        weights: (B, T) in the parameters' dtype.

    Returns:
        The loss, an array of shape (), and its gradients in the structure of model.parameters. If
        the head is tied to the embedding, both have the same gradient, the sum over both uses.

    Raises:
        InputError: the parameters have another dtype, such as those of an int8 model.

    Source: Rumelhart et al. 1986 (back-propagation); Chen et al. 2016 (recomputation).
    """
    ops, parameters = model.ops, model.parameters
    dtype = _dtype_of(parameters)
    cache = _cache_of_one_layer(model, *tokens.shape, dtype)
    positions = cache.positions(tokens.shape[1])

    x = ops.embedding(tokens, parameters.embedding, dtype)  # (B, T) -> (B, T, D)
    inputs = []
    for layer in parameters.layers:
        before = x
        between = ops.attention_block(x, layer, cache.layers[0], positions)
        x = ops.feed_forward(between, layer)
        inputs.append((before, between))
    loss, dx, dhead = _loss_of_head(model, x, targets, weights)
    dlayers = []
    for layer in reversed(parameters.layers):
        before, between = inputs.pop()
        dx, feed_forward = ops.feed_forward_backward(dx, between, layer)
        dx, attention = ops.attention_block_backward(dx, before, layer, positions)
        dlayers.append(_like(layer, attention | feed_forward))
    dembedding = ops.embedding_backward(dx, tokens, parameters.embedding)
    if model.config.tie_embeddings:
        dembedding = dhead["lm_head"] = dembedding + dhead["lm_head"]
    return loss, Parameters(
        embedding=Matrix(dembedding),
        layers=tuple(reversed(dlayers)),
        head=_like(parameters.head, dhead),
    )


def _loss_of_head(
    model: Transformer, x: Array, targets: Array, weights: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """The loss, dx and the head's gradients. The logits, (B, T, V), are freed at the end."""
    ops, head = model.ops, model.parameters.head
    logits = ops.head(x, head)  # (B, T, D) -> (B, T, V)
    loss = (ops.cross_entropy(logits, targets) * weights).sum()
    dlogits = ops.cross_entropy_backward(weights, logits, targets)
    return loss, *ops.head_backward(dlogits, x, head)


def _dtype_of(parameters: Parameters) -> np.dtype:
    dtypes: set[np.dtype] = set()
    for part in (parameters.embedding, *parameters.layers, parameters.head):
        part.map(lambda array: dtypes.add(array.dtype) or array)
    if len(dtypes) > 1 or not dtypes <= {np.dtype("float32"), np.dtype("float64")}:
        names = " and ".join(sorted(dtype.name for dtype in dtypes))
        raise InputError(
            f"the weights are {names}: gradients need them all in float32 (or all in float64); "
            'npllama.load(..., dtype="float32") widens them'
        )
    return dtypes.pop()


def _cache_of_one_layer(model: Transformer, batch: int, n_new: int, dtype: np.dtype) -> KVCache:
    """A cache for one layer. All layers use it in turn, because keys and values are not needed
    after their block."""
    ops, sizes = model.ops, model.sizes
    return KVCache(
        model.backend,
        ops.rope_table(n_new, model.rotation, dtype),
        n_layers=1,
        n_kv_heads=sizes.n_kv_heads,
        head_dim=sizes.head_dim,
        batch=batch,
        context=n_new,
        dtype=dtype,
        scratch_size=ops.scratch_size(sizes.n_heads, sizes.n_kv_heads, n_new, n_new),
    )


def _like(part: Part, gradients: dict[str, Array]) -> Part:
    """A part that contains gradients, given by field name, in place of its parameters."""
    arrays = {
        name: Matrix(gradient) if isinstance(getattr(part, name), Matrix) else gradient
        for name, gradient in gradients.items()
    }
    return replace(part, **arrays)  # norm_eps does not change
