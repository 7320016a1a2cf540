"""LLaMA-2 on one page: the whole model in plain NumPy, for one prompt, float32 and greedy.

    python -m npllama.plain --prompt "Once upon a time" [--model DIR]

The program prints the same text as `python -m npllama.generate --temperature 0 --backend numpy`,
except that the latter never chooses ids that only pad the vocabulary. The code is written to be
read and not to be fast, and the tests compare the library with it. It does not support RoPE
scaling. Letters: T new tokens, N cached positions including the new ones, D width, H query heads,
K key-value heads, G = H/K, C head width, F ffn width, V vocabulary.
"""

if __name__ == "__main__":  # before the imports, because they take a while
    from npllama.early_interrupt import end_at_once

    end_at_once()

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from npllama.backend import Backend
from npllama.config import LlamaConfig
from npllama.console import exit_code, open_streams, started_as, utf8, write
from npllama.errors import InputError, TokenizerError
from npllama.llama import MAX_NEW_TOKENS, SHIPPED
from npllama.ops import Ops
from npllama.parameters import Layer, Parameters
from npllama.tokenizer_files import read_tokenizer
from npllama.weights import Checkpoint


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    mean_square = np.mean(x * x, axis=-1, keepdims=True)  # (T, D) -> (T, 1)
    return x / np.sqrt(mean_square + eps) * weight  # (T, D)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))  # (..., N)
    return e / np.sum(e, axis=-1, keepdims=True)  # (..., N)


def rope(x: np.ndarray, start: int, theta: float) -> np.ndarray:
    n_new, _, head_dim = x.shape  # (T, heads, C)
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # (C/2,)
    angle = np.outer(np.arange(start, start + n_new), frequency)[:, None]  # (T, 1, C/2)
    cos, sin = np.cos(angle).astype("float32"), np.sin(angle).astype("float32")  # (T, 1, C/2)
    a, b = np.split(x, 2, axis=-1)  # (T, heads, C) -> 2 x (T, heads, C/2)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)  # (T, heads, C)


class Block:
    """One layer of the transformer (attention and feed-forward), and its part of the KV cache."""

    def __init__(self, layer: Layer, config: LlamaConfig, context: int) -> None:
        self.layer, self.config = layer, config
        shape = (context, config.n_kv_heads, config.head_dim)
        self.k, self.v = np.zeros(shape, "float32"), np.zeros(shape, "float32")  # (context, K, C)

    def __call__(self, x: np.ndarray, start: int) -> np.ndarray:
        layer, eps = self.layer, self.config.norm_eps
        x = x + self.attention(rms_norm(x, layer.attention_norm, eps), start)  # (T, D)
        return x + self.feed_forward(rms_norm(x, layer.ffn_norm, eps))  # (T, D)

    def attention(self, h: np.ndarray, start: int) -> np.ndarray:
        layer, config = self.layer, self.config
        end = start + len(h)  # N = start + T
        q = (h @ layer.wq.values.T).reshape(len(h), -1, config.head_dim)  # (T, D) -> (T, H, C)
        k = (h @ layer.wk.values.T).reshape(len(h), -1, config.head_dim)  # (T, D) -> (T, K, C)
        v = (h @ layer.wv.values.T).reshape(len(h), -1, config.head_dim)  # (T, D) -> (T, K, C)
        q = rope(q, start, config.rope_theta)  # (T, H, C)
        self.k[start:end] = rope(k, start, config.rope_theta)  # (T, K, C)
        self.v[start:end] = v  # (T, K, C)
        groups = config.n_heads // config.n_kv_heads  # G query heads share a key-value head
        keys = np.repeat(self.k[:end], groups, axis=1)  # (N, K, C) -> (N, H, C)
        values = np.repeat(self.v[:end], groups, axis=1)  # (N, K, C) -> (N, H, C)
        scores = np.einsum("thc,nhc->htn", q, keys) / np.sqrt(np.float32(config.head_dim))
        future = np.arange(end) > np.arange(start, end)[:, None]  # (T, N)
        scores = np.where(future, np.float32(-np.inf), scores)  # (H, T, N)
        o = np.einsum("htn,nhc->thc", softmax(scores), values)  # (T, H, C)
        return o.reshape(len(h), -1) @ layer.wo.values.T  # (T, H*C) -> (T, D)

    def feed_forward(self, h: np.ndarray) -> np.ndarray:
        gate = h @ self.layer.w_gate.values.T  # (T, D) -> (T, F)
        up = h @ self.layer.w_up.values.T  # (T, D) -> (T, F)
        silu = gate / (1 + np.exp(-gate))  # (T, F)
        return (silu * up) @ self.layer.w_down.values.T  # (T, F) -> (T, D)


def generate(
    parameters: Parameters, config: LlamaConfig, ids: Sequence[int], max_new_tokens: int
) -> Iterator[int]:
    """Yield at most max_new_tokens ids, each the most likely next one, until an end-of-text id."""
    context = min(config.context_length, len(ids) + max_new_tokens)
    blocks = [Block(layer, config, context) for layer in parameters.layers]
    head, start, new = parameters.head, 0, np.array(ids)  # (T,): the prompt, later the last id
    while start + len(new) < context:
        x = parameters.embedding.values[new]  # (T,) -> (T, D)
        for block in blocks:
            x = block(x, start)  # (T, D)
        h = rms_norm(x[-1:], head.norm, head.norm_eps)  # (T, D) -> (1, D)
        logits = h @ head.lm_head.values.T  # (1, D) -> (1, V)
        start += len(new)
        new = np.argmax(logits, axis=-1)  # (1, V) -> (1,)
        yield int(new[0])
        if new[0] in config.eos_ids:
            return


def main(arguments: Sequence[str] | None = None) -> int:
    open_streams()
    p = argparse.ArgumentParser(
        prog=started_as("plain", "python -m npllama.plain"), description=__doc__.split("\n")[0]
    )
    p.add_argument("--prompt", required=True, type=utf8, help="the text to continue")
    p.add_argument("--model", default=SHIPPED, help="model directory (default: the shipped model)")
    p.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    options = p.parse_args(arguments)
    return exit_code("plain", lambda: run(options.model, options.prompt, options.max_new_tokens))


def run(model: str | Path, prompt: str, max_new_tokens: int) -> None:
    if not str(model) or not Path(model).is_dir():
        raise InputError(f"--model is {str(model)!r}: expected a model directory")
    directory = Path(model)
    config = LlamaConfig.from_directory(directory)
    if config.rope_scaling is not None:
        raise InputError(
            f"{directory} uses RoPE scaling, which npllama.plain does not support: "
            "use npllama.generate"
        )
    parameters = Checkpoint(directory, config, "float32").parameters(Ops(Backend()))
    tokenizer = read_tokenizer(directory, config)
    if tokenizer is None:
        raise TokenizerError(
            f"{directory} has no tokenizer.model or tokenizer.json: put the checkpoint's there"
        )
    ids = tokenizer.encode_prompt(prompt)  # BOS first
    if len(ids) > config.context_length or max_new_tokens < 0:
        raise InputError(
            f"{len(ids)} tokens in the prompt and {max_new_tokens} new ones: expected at most "
            f"{config.context_length} tokens in the prompt, and at least 0 new ones"
        )
    new = list(generate(parameters, config, ids, max_new_tokens))
    said = tokenizer.decode(ids)
    write(prompt + tokenizer.decode(ids + new)[len(said) :] + "\n")


if __name__ == "__main__":
    sys.exit(main())
