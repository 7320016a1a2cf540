"""One run of a model as plain NumPy arrays: everything that the page shows, without HTML.

The arrays come from `Ops`, the reference whose source the page shows: its blocks run, and the
arguments and results of its methods are recorded. Letters: N tokens of the prompt, T of them in the
window, L layers, H query heads, K key-value heads, C head width, D width, F ffn width, V pieces.
"""

from dataclasses import dataclass

import numpy as np

from npllama.config import LlamaConfig
from npllama.errors import InputError
from npllama.explore.choice import Choice, choose, least_certain
from npllama.explore.layers import LayerRecord, record_layers
from npllama.explore.lens import Lens, look_through
from npllama.explore.rotation import Rotations, rotate
from npllama.explore.running import Growth, Times, measure_growth, time_operations
from npllama.llama import DEFAULT_SAMPLING, Llama, Prompt
from npllama.model import Transformer
from npllama.ops import Ops
from npllama.parameters import Layer
from npllama.sampling_options import Sampling

WINDOW = 24
"""Tokens that the pictures show by default: the last ones of a longer prompt."""
MAX_WINDOW = 48
LIKELIEST = 5
"""Tokens that the lens records per layer and position."""
NEW_TOKENS = 24
BUDGET, MAX_BUDGET = 1.2, 5.0


@dataclass(frozen=True, repr=False)
class Record:
    """One run.

    Attributes:
        model: a name for the model.
        config, dtype, backend, device, context: properties of the `Llama`.
        prompt: the text; None if token ids were given.
        ids: (N,), the ids of the prompt.
        start: the first position of the window, which is ids[start:].
        window_text: the text of the window; None without a tokenizer.
        embedded: (T, D), the residual stream before the first layer.
        layers: the arrays of the L layers.
        layer_normed: (T, D), LayerNorm of `embedded` without a bias, with the weight of the first
            layer's attention norm.
        rotations: RoPE's frequencies, and one query and key at many positions.
        lens: the likeliest tokens after each layer.
        choice: how the least certain of the new tokens was chosen.
        sampling, seed: how all new tokens were chosen.
        new_ids, new_text, finish_reason: the result of `Llama.generate` with this seed, which
            uses the backend's overrides. The text is None without a tokenizer.
        growth: the cost of a token with and without the cache, as the text grows.
        times: the time of each operation of this generation.
        weight_nbytes: bytes of weights that one forward pass reads.
        cache_itemsize: bytes of an element of the cache.
        vocabulary: how the tokenizer writes each of its tokens; empty without a tokenizer.
    """

    model: str
    config: LlamaConfig
    dtype: str
    backend: str
    device: str
    context: int
    prompt: str | None
    ids: tuple[int, ...]
    start: int
    window_text: str | None
    embedded: np.ndarray
    layers: tuple[LayerRecord, ...]
    layer_normed: np.ndarray
    rotations: Rotations
    lens: Lens
    choice: Choice
    sampling: Sampling
    seed: int
    new_ids: tuple[int, ...]
    new_text: str | None
    finish_reason: str
    growth: Growth
    times: Times
    weight_nbytes: int
    cache_itemsize: int
    vocabulary: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"<Record of {len(self.ids)} tokens and {len(self.new_ids)} new ones through "
            f"{self.config.n_layers} layers of {self.model}>"
        )

    @property
    def hidden(self) -> np.ndarray:
        """(L+1, T, D), the residual stream after the embedding and after each layer."""
        return np.stack([self.embedded, *(layer.hidden for layer in self.layers)])

    @property
    def pieces(self) -> list[str]:
        """The T pieces of the window."""
        return [self.piece(id_) for id_ in self.ids[self.start :]]

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.vocabulary)

    def piece(self, id_: int) -> str:
        """How the tokenizer writes a token; "#" and the id if the tokenizer lacks the token."""
        return (self.vocabulary[id_] if id_ < len(self.vocabulary) else "") or f"#{id_}"

    def stacked(self, name: str) -> np.ndarray:
        """One field of LayerRecord for all layers: (L, ...)."""
        return np.stack([getattr(layer, name) for layer in self.layers])


def record(
    llama: Llama,
    prompt: Prompt,
    *,
    model: str = "the model",
    seed: int | None = 0,
    sampling: Sampling = DEFAULT_SAMPLING,
    max_new_tokens: int = NEW_TOKENS,
    window: int = WINDOW,
    budget: float = BUDGET,
) -> Record:
    """Run a prompt through the model, and record what the page shows.

    Args:
        prompt: a text, or token ids.
        model: a name for the model.
        seed, sampling, max_new_tokens: as in `Llama.generate`.
        window: the largest number of tokens to record, 1 to 48; the last ones of the prompt.
        budget: seconds for measuring the time per token, 0 to 5. Other times are extrapolated.

    Raises:
        InputError: as in `Llama.generate`; or the window or the budget is out of range.

    >>> import npllama
    >>> run = record(npllama.load(), "Once upon a time", budget=0)
    >>> run.stacked("attention").shape  # (L, H, T, T)
    (6, 6, 5, 5)
    """
    if not 1 <= window <= MAX_WINDOW:
        raise InputError(f"window is {window}: expected 1 to {MAX_WINDOW} tokens")
    if not 0 <= budget <= MAX_BUDGET:
        raise InputError(
            f"the time to measure is {budget} seconds: expected 0 to {MAX_BUDGET:g} seconds"
        )
    options = {"max_new_tokens": max_new_tokens, "seed": seed, "sampling": sampling}
    generation = llama.new_generation([prompt], **options)  # checks all options
    options["seed"] = generation.seed
    ids = [int(id_) for id_ in llama.encode(prompt)]
    start = max(0, len(ids) - window)

    completion = llama.generate(ids, **options)
    new = list(completion.ids)

    ops = Ops(llama.backend)
    reference = Transformer(llama.config, llama.parameters, ops, llama.context)
    cache = reference.new_cache(context=len(ids) + max(len(new) - 1, 0))
    embedded, layers = record_layers(reference, ids, start, cache)
    hidden = [embedded, *(layer.hidden for layer in layers)]
    lens = look_through(ops, hidden, llama.parameters.head, LIKELIEST)
    step, logits = least_certain(reference, hidden[-1][-1], new, cache, sampling.temperature)
    choice = choose(ops, logits, [*ids, *new[:step]], step, sampling, generation)

    def again() -> int:
        if new:
            return len(llama.generate(ids, **options).ids)
        llama.logits(ids)
        return 0

    tokenizer = llama.tokenizer
    return Record(
        model=model,
        config=llama.config,
        dtype=llama.dtype,
        backend=llama.backend.name,
        device=llama.backend.device_name(),
        context=llama.context,
        prompt=prompt if isinstance(prompt, str) else None,
        ids=tuple(ids),
        start=start,
        window_text=_window_text(llama, prompt, ids, start),
        embedded=embedded,
        layers=layers,
        layer_normed=_layer_norm(ops, embedded, llama.parameters.layers[0]),
        rotations=rotate(ops, llama.config, reference.rotation, layers[0], WINDOW),
        lens=lens,
        choice=choice,
        sampling=sampling,
        seed=generation.seed,
        new_ids=tuple(new),
        new_text=completion.text,
        finish_reason=completion.finish_reason,
        growth=measure_growth(llama, budget),
        times=time_operations(llama, again, len(ids)),
        weight_nbytes=llama.bytes_per_forward,
        cache_itemsize=llama.cache_dtype.itemsize,
        vocabulary=() if tokenizer is None else tuple(map(tokenizer.piece, range(tokenizer.n_ids))),
    )


def _layer_norm(ops: Ops, x: np.ndarray, layer: Layer) -> np.ndarray:
    """LayerNorm without a bias: RMSNorm of x minus its mean; (T, D) -> (T, D)."""
    centred = ops.backend.to_device(x - x.mean(axis=-1, keepdims=True))
    return ops.backend.to_host(ops.rms_norm(centred, layer.attention_norm, layer.norm_eps))


def _window_text(llama: Llama, prompt: Prompt, ids: list[int], start: int) -> str | None:
    if llama.tokenizer is None:
        return None
    return prompt if isinstance(prompt, str) and start == 0 else llama.decode(ids[start:])
