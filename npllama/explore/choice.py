"""How one token after the prompt is chosen, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from npllama.backend import Array
from npllama.explore.calls import recorded
from npllama.explore.lens import entropy
from npllama.ops import Ops
from npllama.sampling_options import Sampling
from npllama.uniforms import uniforms

EXAMPLES = {"keep_top_k": 40, "keep_top_p": 0.9, "keep_min_p": 0.05}
"""A usual value of each filter, to show what it would do where the run does not use it."""


@dataclass(frozen=True)
class Stage:
    """One step from the logits to the token.

    Attributes:
        method: of Ops: softmax for the logits as the head returns them, or what changed them.
        value: the setting, such as the temperature; None where there is none.
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
        logits: (V,) float32; -inf for ids that are never chosen, as rows that pad a vocabulary.
        stages: in their order, the softmax of the logits first.
        alone: each filter that this run does not use, with a usual value, after the temperature.
        uniform: the random number in [0, 1); None at temperature 0, which draws none.
        id: the token.
        step: which of the tokens after the prompt it is, from 0.
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
    seed: int,
    n_tokens: int,
    allowed: Array | None,
) -> Choice:
    """Choose as a step of a generation does, and keep what it passes through.

    Args:
        logits: (1, V).
        ids: all before it, which the repetition penalty counts.
        step: which of the tokens after the prompt it is, from 0.
        n_tokens, allowed: as for `Ops.next_token`.
    """
    xp, to_host = ops.backend.xp, ops.backend.to_host
    uniform = None if sampling.temperature == 0 else uniforms(seed, [0], [step])[0]  # (1,)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = xp.zeros(logits.shape, dtype=bool)
        seen[0, xp.asarray(sorted(set(ids)))] = True
    on_device = None if uniform is None else ops.backend.to_device(uniform)
    filters = {f.metadata["option"].method for f in fields(Sampling)} - {None}
    changes = ("penalize_repetition", "divide_by_temperature", *sorted(filters))
    with recorded(ops, changes) as calls:
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
    before = next((c.result for c in calls if c.name == "divide_by_temperature"), x)
    used = {call.name for call in calls}
    alone = [
        stage(method, value, getattr(ops, method)(before, value))
        for method, value in EXAMPLES.items()
        if method not in used
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


def most_open(ops: Ops, logits: Array, temperature: float) -> int:
    """The row of logits, (n, V), whose distribution has the largest entropy: the choice that was
    least certain."""
    x = ops.divide_by_temperature(logits, temperature or 1.0)
    return int(ops.backend.to_host(entropy(ops, x)).argmax())
