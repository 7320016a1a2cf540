"""How far an implementation differs from the truth: per operation, per layer, at the logits."""

from dataclasses import dataclass, field

import numpy as np

from comparing.operations import Arrays, fused_operations, has_kernels, head, operations
from comparing.truth import MakeParameters, Phase, Truth, forward, new_cache
from npllama.kv_cache import KVCache
from npllama.llama import Llama
from npllama.ops import Ops
from npllama.parameters import Parameters
from npllama.sampling_options import Sampling


@dataclass
class OfPhase:
    """Differences in one forward pass. Each is the largest absolute difference divided by the
    largest absolute value.

    Attributes:
        operations: operation -> one difference per layer. The inputs are the truth's, so that
            errors do not accumulate from one operation to the next.
        head: difference of the logits, computed from the truth's last hidden state.
        layers: difference of each layer's output, computed from the embedding.
        logits: difference of the logits, computed from the embedding.
    """

    operations: dict[str, list[float]]
    head: float
    layers: list[float]
    logits: float


@dataclass
class Differences:
    """An implementation compared with the truth.

    Attributes:
        name: name of the implementation.
        phases: "prompt" and "decode".
        ids: its greedy continuation.
        equal_ids: how many ids at the start of the continuation agree with the truth.
        kernels: whether its decode step consists of its own kernels.
    """

    name: str
    phases: dict[str, OfPhase] = field(default_factory=dict)
    ids: list[int] = field(default_factory=list)
    equal_ids: int = 0
    kernels: bool = False


def measure(name: str, ops: Ops, make: MakeParameters, truth: Truth) -> Differences:
    """Run an implementation on the inputs of the truth, and compare the results."""
    config, parameters = truth.config, make(ops)
    dtype = ops.cache_dtype(parameters.layers[0].wq.values.dtype)
    found = Differences(name)
    chained = new_cache(ops, config, len(truth.prompt) + 1, dtype)
    for kind, phase in truth.phases.items():
        cache = _filled_cache(ops, truth, phase, dtype)
        by_operation = _operations(ops, parameters, cache, phase)
        made = _host(ops, head(ops, parameters.head, ops.backend.to_device(phase.last)))[0, 0]
        hidden, logits = forward(ops, parameters, chained, phase.tokens)
        layers = [_difference(*pair) for pair in zip(hidden, phase.hidden, strict=True)]
        found.phases[kind] = OfPhase(
            by_operation,
            _difference(made, phase.head),
            layers,
            _difference(logits, phase.logits),
        )
        if phase.fused:
            found.kernels = has_kernels(ops, parameters.layers[0], cache.layers[0], 1)
    found.ids = _greedy(ops, parameters, truth, dtype)
    pairs = zip(found.ids, truth.ids, strict=True)
    found.equal_ids = next((i for i, (a, b) in enumerate(pairs) if a != b), len(truth.ids))
    return found


def _operations(
    ops: Ops, parameters: Parameters, cache: KVCache, phase: Phase
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    n_new = len(phase.tokens)
    for i, layer in enumerate(parameters.layers):
        given = {name: ops.backend.to_device(array) for name, array in phase.given[i].items()}
        with ops.forward_context(n_new):
            arguments = (ops, layer, given, cache.layers[i], cache.positions(n_new))
            _add(found, ops, operations(*arguments), phase.results[i])
            if phase.fused:
                _add(found, ops, fused_operations(*arguments), phase.fused[i])
    return found


def _add(found: dict[str, list[float]], ops: Ops, results: Arrays, truth: Arrays) -> None:
    for name, result in results.items():
        found.setdefault(name, []).append(_difference(_host(ops, result), truth[name]))


def _filled_cache(ops: Ops, truth: Truth, phase: Phase, dtype: np.dtype) -> KVCache:
    """A cache with the truth's keys and values of the tokens before the phase."""
    start = phase.past[0][0].shape[1]
    cache = new_cache(ops, truth.config, start + len(phase.tokens), dtype)
    for layer, (k, v) in zip(cache.layers, phase.past, strict=True):
        if start:
            layer.k[0, :, :start] = ops.backend.to_device(k.astype(dtype))
            layer.v[0, :, :start] = ops.backend.to_device(v.astype(dtype))
    cache.lengths[0] = start
    cache.device_lengths = ops.backend.to_device(np.array([start], dtype="int32"))
    return cache


def _greedy(ops: Ops, parameters: Parameters, truth: Truth, dtype: np.dtype) -> list[int]:
    """The greedy continuation from the library's own generation loop."""
    context = len(truth.prompt) + len(truth.ids)
    llama = Llama(truth.config, parameters, ops, context, cache_dtype=dtype)
    completion = llama.generate(
        truth.prompt,
        max_new_tokens=len(truth.ids),
        sampling=Sampling(temperature=0),
        ignore_eos=True,
        seed=0,
    )
    return completion.ids


def _host(ops: Ops, x: object) -> np.ndarray:
    return np.array(ops.backend.to_host(x), dtype="float64")


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max |ours - theirs| / max |theirs|."""
    largest = np.abs(theirs).max()
    return float(np.abs(ours - theirs).max() / largest) if largest else float(np.abs(ours).max())
