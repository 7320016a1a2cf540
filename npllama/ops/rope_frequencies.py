"""Rotary frequencies for a context longer than the one that a model was first trained for.

theta_i is the plain frequency of pair i, theta its base, C the head width, s the factor of the
scaling, L0 the context before it. All arrays are (C/2,) float64.
"""

import math
from types import ModuleType
from typing import NamedTuple

from npllama.backend import Array
from npllama.config import LlamaConfig
from npllama.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """What makes the table of cosines and sines.

    Attributes:
        frequencies: (C/2,) float64, radians from one position to the next.
        attention_scaling: what cosines and sines are multiplied by. Queries and keys both are
            turned by them, so scores are multiplied by its square.
    """

    frequencies: Array
    attention_scaling: float = 1.0


def rotation(xp: ModuleType, config: LlamaConfig, context: int) -> Rotation:
    """The frequencies of a config, for a model with room for `context` positions."""
    scaling, theta, head_dim = config.rope_scaling, config.rope_theta, config.head_dim
    if scaling is None:
        return Rotation(plain(xp, theta, head_dim))
    if scaling.kind == "linear":
        return Rotation(linear(plain(xp, theta, head_dim), scaling))
    if scaling.kind == "dynamic":
        return Rotation(plain(xp, dynamic_theta(config, context), head_dim))
    if scaling.kind == "llama3":
        return Rotation(llama3(xp, plain(xp, theta, head_dim), scaling))
    return Rotation(yarn(xp, theta, head_dim, scaling), yarn_attention_scaling(scaling))


def plain(xp: ModuleType, theta: float, head_dim: int) -> Array:
    """theta_i = theta^(-2i / C).

    Source: Su et al. 2021 (RoFormer), section 3.2.2, Theta = {theta_i}.
    """
    pair = xp.arange(head_dim // 2, dtype="float64")  # (C/2,)
    return theta ** (-2.0 * pair / head_dim)


def linear(frequencies: Array, scaling: RopeScaling) -> Array:
    """theta_i / s: every position lies where position / s lay before.

    Source: Chen et al. 2023 (Position Interpolation), equation 4.
    """
    return frequencies / scaling.factor


def dynamic_theta(config: LlamaConfig, context: int) -> float:
    """The base for N positions:  theta (s N / Lmax - (s - 1))^(C / (C - 2)).

    Lmax is max_position_embeddings and N the model's context, at least Lmax, where the base is
    theta itself. Elsewhere N is the length of the text so far; then keys that were turned before
    it grew have another base than those after. Here a model has one N, so a text has the same
    logits whole, in chunks and token by token: those that Hugging Face transformers gives to a
    text of N tokens read at once.

    Source: Peng et al. 2023 (YaRN), sections 3.1 and 3.3, "dynamic NTK", after bloc97 and emozilla.
    """
    factor, most = config.rope_scaling.factor, config.context_length
    growth = factor * max(context, most) / most - (factor - 1)
    return config.rope_theta * growth ** (config.head_dim / (config.head_dim - 2))


def llama3(xp: ModuleType, frequencies: Array, scaling: RopeScaling) -> Array:
    """(1 - t_i) theta_i / s + t_i theta_i, where

        t_i = (L0 theta_i / (2 pi) - low) / (high - low), clipped to [0, 1]

    and L0 theta_i / (2 pi) is how often pair i turns in L0 positions: pairs that turn more than
    `high` times keep their frequency, and that of pairs below `low` is divided.

    Source: the reference code of Llama 3.1 (`apply_scaling`); there is no paper.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # (C/2,)
    t = xp.clip((turns - low) / (high - low), 0.0, 1.0)  # (C/2,)
    return (1 - t) * frequencies / scaling.factor + t * frequencies


def yarn(xp: ModuleType, theta: float, head_dim: int, scaling: RopeScaling) -> Array:
    """(1 - r_i) theta_i + r_i theta_i / s, where

        r_i = (i - first) / (last - first), clipped to [0, 1]

    rises from the pair `first`, which turns beta_fast times in L0 positions, to the pair `last`,
    which turns beta_slow times.

    Source: Peng et al. 2023 (YaRN), section 3.2, "NTK-by-parts", in the form of its code, where
    the ramp runs over the pairs' numbers and its ends are rounded outwards and kept within C.
    """

    def pair_that_turns(times: float) -> float:
        """i with  L0 theta^(-2i / C) = 2 pi times."""
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as its code does, rather than divide by 0
    pair = xp.arange(head_dim // 2, dtype="float64")  # (C/2,)
    ramp = xp.clip((pair - first) / (last - first), 0.0, 1.0)  # (C/2,)
    frequencies = plain(xp, theta, head_dim)
    return (1 - ramp) * frequencies + ramp * frequencies / scaling.factor


def yarn_attention_scaling(scaling: RopeScaling) -> float:
    """sqrt(1 / t) = 0.1 ln s + 1, for scores that are divided by the temperature t.

    attention_factor replaces it. mscale and mscale_all_dim, where both are there, make it a
    quotient,  (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1),  as DeepSeek's files mean it.

    Source: Peng et al. 2023 (YaRN), section 3.4.
    """
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    log_s = math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * log_s + 1) / (0.1 * scaling.mscale_all_dim * log_s + 1)
    return 0.1 * log_s + 1
