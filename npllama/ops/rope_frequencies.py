"""Rotary frequencies, and their scaling for contexts longer than the original training context.

theta_i is the unscaled frequency of pair i, theta the base, C the head width, s the scaling factor
and L0 the original context (original_max_position_embeddings). All arrays are (C/2,) float64.
"""

import math
from types import ModuleType
from typing import NamedTuple

from npllama.backend import Array
from npllama.config import LlamaConfig
from npllama.rope_scaling import RopeScaling


class Rotation(NamedTuple):
    """The parameters of the table of cosines and sines.

    Attributes:
        frequencies: (C/2,) float64, in radians per position.
        attention_scaling: the factor of all cosines and sines. Both queries and keys are multiplied
            by it, so the scores are multiplied by its square.
    """

    frequencies: Array
    attention_scaling: float = 1.0


def rotation(xp: ModuleType, config: LlamaConfig, context: int) -> Rotation:
    """The frequencies and the attention scaling that a config specifies, for a model with at most
    `context` positions."""
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
    """theta_i / s. Position p then has the rotation angle that position p / s has without scaling.

    Source: Chen et al. 2023 (Position Interpolation), equation 4.
    """
    return frequencies / scaling.factor


def dynamic_theta(config: LlamaConfig, context: int) -> float:
    """The base for a context of P positions:  theta (s P / Lmax - (s - 1))^(C / (C - 2)).

    Lmax is max_position_embeddings, and P is the larger of Lmax and `context`. For P = Lmax the
    base is theta. In Hugging Face transformers P is the current length of the text, so keys that
    were cached at different lengths have different bases. Here P is fixed per model, so the logits
    of a text do not depend on how the text is split into chunks. For a text of P tokens in one
    forward pass, the logits equal those of transformers.

    Source: Peng et al. 2023 (YaRN), sections 3.1 and 3.3, "dynamic NTK", after bloc97 and emozilla.
    """
    factor, most = config.rope_scaling.factor, config.context_length
    growth = factor * max(context, most) / most - (factor - 1)
    return config.rope_theta * growth ** (config.head_dim / (config.head_dim - 2))


def llama3(xp: ModuleType, frequencies: Array, scaling: RopeScaling) -> Array:
    """(1 - t_i) theta_i / s + t_i theta_i, where

        t_i = (L0 theta_i / (2 pi) - low) / (high - low), clipped to [0, 1].

    `low` and `high` are the config's low_freq_factor and high_freq_factor. L0 theta_i / (2 pi) is
    the number of rotations of pair i in L0 positions. Pairs with more than `high` rotations keep
    their frequency. The frequency of pairs with fewer than `low` rotations is divided by s.

    Source: the reference code of Llama 3.1 (`apply_scaling`); there is no paper.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # (C/2,)
    t = xp.clip((turns - low) / (high - low), 0.0, 1.0)  # (C/2,)
    return (1 - t) * frequencies / scaling.factor + t * frequencies


def yarn(xp: ModuleType, theta: float, head_dim: int, scaling: RopeScaling) -> Array:
    """(1 - r_i) theta_i + r_i theta_i / s, where

        r_i = (i - first) / (last - first), clipped to [0, 1].

    Pair number `first` makes beta_fast rotations in L0 positions, and pair number `last` makes
    beta_slow rotations. Both are real numbers. If the config's `truncate` is true, `first` is
    rounded down and `last` up. In every case, `first` is then raised to at least 0, and `last`
    lowered to at most C - 1.

    Source: Peng et al. 2023 (YaRN), section 3.2, "NTK-by-parts", in the form of its reference code,
    in which the ramp r is linear in the index i.
    """

    def pair_that_turns(times: float) -> float:
        """The index i of the pair with `times` rotations in L0 positions:

        L0 theta^(-2i / C) = 2 pi * times.
        """
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # avoids a division by 0, as in the reference code
    pair = xp.arange(head_dim // 2, dtype="float64")  # (C/2,)
    ramp = xp.clip((pair - first) / (last - first), 0.0, 1.0)  # (C/2,)
    frequencies = plain(xp, theta, head_dim)
    return (1 - ramp) * frequencies + ramp * frequencies / scaling.factor


def yarn_attention_scaling(scaling: RopeScaling) -> float:
    """sqrt(1 / t) = 0.1 ln s + 1, where yarn divides the attention scores by a temperature t.

    A config's attention_factor replaces this value. If mscale and mscale_all_dim are both set, the
    value is (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1), as in DeepSeek's models.

    Source: Peng et al. 2023 (YaRN), section 3.4.
    """
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)
    log_s = math.log(scaling.factor)
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * log_s + 1) / (0.1 * scaling.mscale_all_dim * log_s + 1)
    return 0.1 * log_s + 1
