"""How one of the new tokens is chosen, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from npllama.backend import Array
from npllama.explore.calls import recorded
from npllama.explore.lens import entropy
from npllama.generation import Generation
from npllama.kv_cache import KVCache
from npllama.model import Transformer
from npllama.ops import Ops
from npllama.sampling_options import Sampling
from npllama.uniforms import uniforms

EXAMPLES = {"keep_top_k": 40, "keep_top_p": 0.9, "keep_min_p": 0.05}
"""A usual value of each filter, which shows its effect if the run does not use it."""
_FILTERS = {f.metadata["option"].method for f in fields(Sampling)} - {None}
_CHANGES = ("penalize_repetition", "divide_by_temperature", *sorted(_FILTERS))


@dataclass(frozen=True)
class Stage:
    """One step from the logits to the token.

    Attributes:
        method: the method of Ops that changed the logits; "softmax" for the original logits.
        value: the method's setting, such as the temperature; None for the original logits.
        probability: (V,), the softmax of the logits after this step.
    """

    method: str
    value: float | None
    probability: np.ndarray

    @property
    def n_kept(self) -> int:
        """Tokens that can still be chosen."""
        return int((self.probability > 0).sum())


@dataclass(frozen=True)
class Choice:
    """How one token was chosen.

    Attributes:
        logits: (V,) float32, after the repetition penalty; -inf for ids that are never chosen,
            such as the rows that pad a vocabulary.
        stages: in order of application. The first is the softmax of the original logits.
        alone: the filters that this run does not use, each with a usual value. Each is applied
            alone after the temperature, or at temperature 0 to the logits.
        uniform: the random number in [0, 1); None at temperature 0, which draws no number.
        id: the chosen token.
        step: the number of new tokens before it.
        before: all ids before it.
    """

    logits: np.ndarray
    stages: tuple[Stage, ...]
    alone: tuple[Stage, ...]
    uniform: float | None
    id: int
    step: int
    before: tuple[int, ...]


def choose(
    ops: Ops,
    logits: Array,
    ids: Sequence[int],
    step: int,
    sampling: Sampling,
    generation: Generation,
) -> Choice:
    """Choose a token as a step of the generation does, and record each change of the logits.

    Args:
        logits: (1, V).
        ids: all ids before the token; the repetition penalty counts them.
        step: the number of new tokens before it.
        generation: its seed, and which ids it may choose.
    """
    xp, to_host = ops.backend.xp, ops.backend.to_host
    uniform = None  # temperature 0 draws no random number
    if sampling.temperature != 0:
        uniform = uniforms(generation.seed, [0], [step])[0]  # (1,)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = xp.zeros(logits.shape, dtype=bool)
        seen[0, xp.asarray(sorted(set(ids)))] = True
    on_device = None if uniform is None else ops.backend.to_device(uniform)
    n_tokens, allowed = generation.n_tokens, generation.allowed
    with recorded(ops, _CHANGES) as calls:
        chosen, _ = ops.next_token(logits, on_device, sampling, seen, n_tokens, allowed)

    def stage(method: str, value: float | None, x: Array) -> Stage:
        probability = np.zeros(logits.shape[-1], dtype="float32")
        probability[: x.shape[-1]] = to_host(ops.softmax(x))[0]
        return Stage(method, value, probability)

    x = logits[:, :n_tokens]
    if allowed is not None:
        x = xp.where(allowed, x, -xp.inf)
    stages = [stage("softmax", None, x)]
    stages += [stage(call.name, call.args[-1], call.result) for call in calls]
    results = {call.name: call.result for call in calls}
    x = results.get("penalize_repetition", x)
    if sampling.temperature == 0:  # next_token then takes the largest logit
        stages.append(stage("divide_by_temperature", 0.0, ops.divide_by_temperature(x, 0.0)))
    spread = results.get("divide_by_temperature", x)
    alone = [
        stage(method, value, getattr(ops, method)(spread, value))
        for method, value in EXAMPLES.items()
        if method not in results
    ]
    kept = np.full(logits.shape[-1], -np.inf, dtype="float32")
    kept[: x.shape[-1]] = to_host(x)[0]
    return Choice(
        logits=kept,
        stages=tuple(stages),
        alone=tuple(alone),
        uniform=None if uniform is None else float(uniform[0]),
        id=int(to_host(chosen)[0]),
        step=step,
        before=tuple(ids),
    )


def least_certain(
    model: Transformer, last: np.ndarray, new: Sequence[int], cache: KVCache, temperature: float
) -> tuple[int, Array]:
    """The new token whose distribution has the largest entropy.

    Args:
        model: of reference ops.
        last: (D,), the residual stream of the prompt's last token after the last block.
        new: the ids after the prompt.
        cache: holds the prompt; afterwards also the new ids without the last one.

    Returns:
        its number, from 0, and the logits (1, V) from which it was chosen. Without new tokens,
        0 and the logits of the token that would come next.
    """
    ops, backend = model.ops, model.backend
    x = backend.to_device(last)[None, None]  # (D,) -> (1, 1, D)
    logits = [ops.head(x, model.parameters.head)[0]]  # (1, V)
    if len(new) > 1:
        tokens = model.to_tokens(new[:-1])[None]  # (1, T)
        logits.append(model.forward(tokens, cache, n_last=len(new) - 1)[0])  # (T, V)
    each = backend.xp.concatenate(logits)  # (T + 1, V)
    bits = entropy(ops, ops.divide_by_temperature(each, temperature or 1.0))
    step = int(backend.to_host(bits).argmax())
    return step, each[step : step + 1]
